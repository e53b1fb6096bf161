"""Keeps compiled programs from piling up: each holds memory maps, and a process that runs out of them crashes.

And `break_checkpoint`, which puts a NaN into a run folder.
"""

import os
import pathlib
import shutil

import pytest

from diffusion_lm.core.memory_maps import free_programs

os.environ.pop("WANDB_PROJECT", None)  # or every run of the tests would be logged there


@pytest.fixture(scope="module", autouse=True)
def programs_do_not_pile_up():
    """Frees what this process has compiled once it holds many maps, between one test file and the next."""
    yield
    free_programs()


@pytest.fixture
def break_checkpoint():
    """Returns `f(workdir, step)`, which puts a NaN into a checkpoint; of its items only the parameters stay."""

    def damage(workdir, step):
        import orbax.checkpoint as ocp

        from diffusion_lm.training.checkpoint import FOLDER, restore_params

        params = restore_params(workdir, step=step)
        params["final_norm"]["scale"] = params["final_norm"]["scale"].at[0].set(float("nan"))
        folder = pathlib.Path(workdir).absolute() / FOLDER
        shutil.rmtree(folder / str(step))
        with ocp.CheckpointManager(folder, item_names=("params",)) as manager:
            assert manager.save(step, args=ocp.args.Composite(params=ocp.args.StandardSave(params)), force=True)
            manager.wait_until_finished()

    return damage
