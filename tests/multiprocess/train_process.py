"""Trains the small run as one of any number of processes: `train_process.py WORKDIR STEPS_A_SECOND OBJECTIVE`."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "unit" / "training"))

from training_stubs import AUTOREGRESSIVE, DIFFUSION, SlowRows, small_run

from diffusion_lm.parallel import multihost
from diffusion_lm.parallel.mesh import MeshSpec
from diffusion_lm.training.checkpoint import CheckpointPolicy
from diffusion_lm.training.loop import train

if __name__ == "__main__":
    multihost.initialize()
    workdir, seconds, objective = sys.argv[1:]
    train(
        small_run(
            objective={"ar": AUTOREGRESSIVE, "diffusion": DIFFUSION}[objective],
            data=SlowRows(seconds=float(seconds)),
            steps=12,
            batch_size=8,
            log_every=1,
            mesh=MeshSpec(data=2, fsdp=2),
            checkpoint=CheckpointPolicy(every=4),
        ),
        workdir,
    )
