"""`plan` for CPU devices of this machine, whose compiler is always installed."""

import jax
import pytest

from diffusion_lm.cli import main
from diffusion_lm.planning import topologies


def test_devices_of_this_machine():
    four = topologies.devices(topologies.parse("cpu-4"))
    assert four == jax.devices("cpu")[:4]


def test_a_plan_of_all_three_programs(capsys):
    """Memory and collectives, but no roofline, because the peak of a CPU is unknown."""
    code = main.main(
        ["plan", "--gin_file", "gin/recipes/quickstart.gin", "--stage", "tune_qa_diffusion", "--topology", "cpu-2"]
    )
    printed = capsys.readouterr().out
    assert code == 0
    for program in ("tune_qa_diffusion: train", "tune_qa_diffusion: bound", "diffusion on qa: decode"):
        assert program in printed
    assert "all-reduce" in printed
    assert "donated" in printed
    assert "at best" not in printed


@pytest.mark.thorough
def test_a_speed_study_is_planned_as_it_runs(capsys):
    """Its longest decodes on one device; the other arm of the comparison does not change them."""
    given = ["--gin_file", "gin/recipes/ar2diff/speed.gin", "--gin_file", "gin/models/sizes/nano.gin"]
    small = ["--gin.VOCAB_SIZE=1280", "--gin.SPEED_LENGTHS=(4, 8)"]
    code = main.main(["plan", *given, *small, "--topology", "cpu-2", "--programs", "decode"])
    printed = capsys.readouterr().out
    assert code == 0
    assert printed.count("8 tokens on one device") == 5
    assert "speed: diffusion, 10 steps, best of 8" in printed
