"""The base network compiled for eight H100s that are not here: it fits, its state is donated, and what it communicates.

Needs the `plan-gpu` extra: `make test-aot` runs it.
"""

import pytest

from diffusion_lm.cli import config
from diffusion_lm.planning import plan, programs, topologies
from diffusion_lm.planning.accelerators import GIB
from diffusion_lm.recipes.comparison import Comparison

pytestmark = pytest.mark.aot


def test_a_training_step_of_the_base_network_on_a_machine_of_h100s():
    stages = {s.name: s.run for s in config.load(["gin/recipes/ar2diff_base.gin"]).build(Comparison).stages}
    run = stages["pretrain_ar"]
    h100 = topologies.parse("h100-8")
    compiled = programs.train(run, topologies.devices(h100))
    assert compiled.executable is not None, compiled.refusal
    found = plan.examine(compiled, h100, model_flops=1e15, tokens=1)
    assert found.fits
    assert found.memory.peak < 12 * GIB
    assert found.memory.donated > 0.99 * (found.memory.donated + found.memory.outputs), "the state is updated in place"
    spec = run.model.spec
    logits = 4 * run.batch_size * run.data.row_length // h100.devices * spec.padded_vocab_size
    assert found.largest[0][2] <= logits / 8, "no [B,T,V]"
    sent = {one.kind: one for one in found.collectives}
    # Each gradient is scattered once, in the dtype that it is computed in: between two and four bytes a parameter.
    scattered = sent["reduce-scatter"].bytes / (7 / 8)
    parameters = run.model.count_parameters()["total"]
    assert 2 * parameters < scattered < 4 * parameters, f"{scattered / parameters:.2f} bytes a parameter"
    assert all(one.group == one.local == 8 for one in found.collectives), "nothing leaves the machine"
    assert found.roof.dcn == 0
    assert found.roof.hbm > 0
