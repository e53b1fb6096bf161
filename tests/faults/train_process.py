"""Trains the small run in a process of its own that a test may kill: `train_process.py WORKDIR CACHE SECONDS_PER_BATCH`."""

import dataclasses
import pathlib
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "unit" / "training"))

from training_stubs import AUTOREGRESSIVE, RaggedRows, SumOfParameters, small_run

from diffusion_lm.training.checkpoint import CheckpointPolicy
from diffusion_lm.training.loop import train
from diffusion_lm.training.step import enable_compile_cache


@dataclasses.dataclass(frozen=True)
class SlowRows(RaggedRows):
    """Rows that take their time, so that a test can hit the process between two of them."""

    seconds: float = dataclasses.field(default=0.0, compare=False)

    def batch(self, index, batch_size, **slice_of):
        time.sleep(self.seconds)
        return super().batch(index, batch_size, **slice_of)


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
