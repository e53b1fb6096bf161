"""The files of gin/bench are the shapes that the performance page reports; each is built as `bench` builds it."""

import pytest

from diffusion_lm.cli import config
from diffusion_lm.cli.search_path import packaged_folder
from diffusion_lm.evaluation.speed import SpeedStudy
from diffusion_lm.training.run import TrainRun

FILES = sorted(path.name for path in (packaged_folder() / "bench").glob("*.gin"))


def test_files_are_those_that_are_described():
    assert FILES == ["data.gin", "decode.gin", "decode_batch8.gin", "train.gin", "train_masked.gin"]


@pytest.mark.parametrize(
    ("name", "parameters", "batch"), [("train", 5_322_240, (16, 256)), ("train_masked", 6_819_840, (8, 128))]
)
def test_training_shapes(name, parameters, batch):
    run = config.load([f"gin/bench/{name}.gin"]).build(TrainRun)
    assert run.model.count_parameters()["total"] == parameters
    assert (run.batch_size, run.data.row_length) == batch
    assert run.model.spec.dtype == "float32"


@pytest.mark.parametrize(("name", "batch_size"), [("decode", 1), ("decode_batch8", 8)])
def test_decoding_shapes(name, batch_size):
    study = config.load([f"gin/bench/{name}.gin"]).build(SpeedStudy)
    assert (study.batch_size, study.prompt_length, study.lengths) == (batch_size, 32, (64,))
    samplers = {arm.label: arm.sampler for arm in study.arms}
    assert [samplers[f"masked, {steps} steps"].steps for steps in (64, 16)] == [64, 16]
    assert all(samplers[f"masked, {steps} steps"].blocks is None for steps in (64, 16))
    assert [samplers[f"AR, {name}"].decoding.temperature for name in ("greedy", "temperature 1")] == [0.0, 1.0]
    assert {arm.architecture.count_parameters()["total"] for arm in study.arms} == {6_819_840}
