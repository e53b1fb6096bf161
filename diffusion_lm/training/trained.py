"""The trained network of a run, on its devices."""

from pathlib import Path

import jax

from diffusion_lm.architectures.base import BoundModel
from diffusion_lm.parallel.shardings import Placement, tree_shardings
from diffusion_lm.training.checkpoint import restore_params
from diffusion_lm.training.run import TrainRun
from diffusion_lm.training.transfer import require_arrays


def trained_model(run: TrainRun, folder: str | Path, *, step: int | None = None) -> BoundModel:
    """Returns a run's network with the parameters of a checkpoint, read onto the run's mesh.

    Args:
      run: the run.
      folder: its run directory.
      step: which checkpoint; None = the final one of the run (`checkpoint.chosen_step`).

    Raises:
      ConfigError: there is no such checkpoint, or it belongs to another network.
    """
    mesh, model = run.mesh.build(), run.model
    abstract = model.abstract_params()
    like = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        abstract,
        tree_shardings(model.logical_axes(), abstract, run.rules, mesh),
    )
    params = restore_params(folder, step=step, like=like)
    require_arrays(params, abstract, where=str(folder))
    return BoundModel(model, params, Placement(mesh, run.rules))
