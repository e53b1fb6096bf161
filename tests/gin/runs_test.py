"""The runs and optimizers of gin/ build what they say."""

import pytest

from diffusion_lm.cli import config
from diffusion_lm.cli.arguments import build_root
from diffusion_lm.objectives.sundae import Sundae
from diffusion_lm.recipes.comparison import Comparison
from diffusion_lm.training.optimizers import Adafactor, AdamW, Muon
from diffusion_lm.training.run import TrainRun
from diffusion_lm_tasks import vocabularies


def test_train_is_a_whole_run():
    run = build_root(config.load(["gin/runs/train.gin"]))
    assert isinstance(run, TrainRun)
    assert run == build_root(config.load(["gin/runs/train.gin"]))
    assert run.evaluations[0].objective == run.objective
    assert run.data.row_length == 96


def test_train_can_be_turned_into_diffusion():
    files = ["gin/runs/train.gin", "gin/objectives/sundae.gin"]
    run = build_root(config.load(files, ["TARGET_WINDOW=@target_window.PadFilled()"]))
    assert isinstance(run.objective, Sundae)
    assert type(run.data.converter.target_window).__name__ == "PadFilled"


def test_finetune_starts_from_a_checkpoint_with_its_own_budget():
    run = build_root(config.load(["gin/runs/finetune.gin"], ["INITIAL='runs/first'"]))
    assert run.initial == "runs/first"
    assert run.steps == 300
    assert run.optimizer.schedule.peak == 5e-4


@pytest.mark.parametrize(
    ("name", "kind", "step", "rate"),
    [
        ("adamw_cosine", AdamW, 100, 1e-3),
        ("adamw_wsd", AdamW, 500, 1e-3),
        ("muon_cosine", Muon, 20, 6e-3),
        ("adafactor_inverse_sqrt", Adafactor, 0, 1e-2),
        ("adafactor_constant", Adafactor, 0, 1e-3),
    ],
)
def test_optimizers(name, kind, step, rate):
    run = build_root(config.load(["gin/runs/train.gin", f"gin/optimizers/{name}.gin"]))
    assert type(run.optimizer) is kind
    assert run.optimizer.schedule.value(step, 1000) == pytest.approx(rate)


@pytest.mark.parametrize("file", ["gin/runs/train.gin", "gin/recipes/quickstart.gin"])
def test_the_network_knows_the_embedded_vocabulary(file):
    root = config.load([file]).build(Comparison if "recipes" in file else TrainRun)
    runs = [stage.run for stage in root.stages] if "recipes" in file else [root]
    assert {run.model.spec.vocab_size for run in runs} == {vocabularies.EMBEDDED_SIZE}
