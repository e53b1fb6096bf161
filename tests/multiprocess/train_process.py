"""Trains the small run as one of any number of processes: `train_process.py WORKDIR STEPS_A_SECOND OBJECTIVE`."""

import dataclasses
import pathlib
import sys

import jax
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "unit" / "training"))

from training_stubs import AUTOREGRESSIVE, DIFFUSION, RaggedRows, SlowRows, small_run

from diffusion_lm.core.rng import StreamKeys
from diffusion_lm.evaluation.generation import compiled_generate
from diffusion_lm.evaluation.likelihood import compiled_bound
from diffusion_lm.parallel import multihost
from diffusion_lm.parallel.mesh import MeshSpec
from diffusion_lm.samplers.autoregressive import AutoregressiveSampler
from diffusion_lm.training.checkpoint import CheckpointPolicy
from diffusion_lm.training.loop import train


@dataclasses.dataclass(frozen=True)
class DecodeAndBound:
    """Decodes and scores eight rows, which the devices of all processes share."""

    name: str = "probe"
    every: int = 0

    def run(self, model, step):
        del step
        batch, keys = model.constrain.rows(RaggedRows(seed=5).batch(0, 8)), StreamKeys.create(0)
        decoded = compiled_generate(model.architecture, AutoregressiveSampler(), model.constrain)
        tokens = jax.device_get(decoded(model.params, batch, keys)).tokens
        terms = jax.device_get(
            compiled_bound(model.architecture, AUTOREGRESSIVE, model.constrain)(model.params, batch, keys)
        )
        return {
            "bound": float(terms.loss),
            "tokens": float((tokens * np.arange(tokens.size).reshape(tokens.shape)).sum()),
        }


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
            evaluations=(DecodeAndBound(),),
        ),
        workdir,
    )
