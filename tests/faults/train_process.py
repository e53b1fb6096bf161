"""Trains the small run in a process of its own that a test may kill: `train_process.py WORKDIR CACHE SECONDS`."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "unit" / "training"))

from training_stubs import AUTOREGRESSIVE, SlowRows, SumOfParameters, small_run

from diffusion_lm.training.checkpoint import CheckpointPolicy
from diffusion_lm.training.loop import train
from diffusion_lm.training.step import enable_compile_cache


def run(seconds: float = 0.0):
    return small_run(
        objective=AUTOREGRESSIVE,
        data=SlowRows(seconds=seconds),
        steps=12,
        log_every=1,
        evaluations=(SumOfParameters(every=4),),
        checkpoint=CheckpointPolicy(every=2),
    )


if __name__ == "__main__":
    enable_compile_cache(sys.argv[2])
    train(run(float(sys.argv[3])), sys.argv[1])
