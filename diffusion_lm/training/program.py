"""The compiled program of a run: what `train` runs is what `plan` compiles."""

import jax

from diffusion_lm.training.run import TrainRun
from diffusion_lm.training.step import Program, make_program


def run_program(run: TrainRun, devices: tuple[jax.Device, ...] | None = None) -> Program:
    """Returns the program of a run; `devices` as in `make_program`."""
    return make_program(
        run.model,
        run.objective,
        run.optimizer,
        mesh=run.mesh,
        rules=run.rules,
        microbatches=run.microbatches,
        ema_decay=run.ema_decay,
        devices=devices,
        xla_option_sets=run.xla_options,
    )
