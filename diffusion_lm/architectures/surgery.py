"""Moving the rows of a vocabulary between networks: pruning to the tokens of a task, and restoring the whole.

Whatever has a logical axis `vocab` is moved: the embedding, an output projection of its own, its bias, an exponent a
token. Source of the idea: arXiv 2308.12219, which fine-tunes XLM-R with the embeddings of the training set's tokens.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_lm.core.errors import require
from diffusion_lm.core.types import Params

VOCAB = "vocab"


def vocabulary_rows(source: Sequence[int] | np.ndarray, target: Sequence[int] | np.ndarray) -> np.ndarray:
    """Returns i32[len(target)], the row of each target token in the source, -1 where the source has none.

    Args:
      source: full ids of the tokens that the source network knows, row by row.
      target: full ids of the tokens of the target network.
    """
    source, target = np.asarray(source, np.int64), np.asarray(target, np.int64)
    table = np.full(int(max(source.max(), target.max())) + 1, -1, np.int32)
    table[source] = np.arange(len(source), dtype=np.int32)
    return table[target]


def move_rows(given: jax.Array, fresh: jax.Array, axes: tuple[str | None, ...], rows: np.ndarray) -> jax.Array:
    """Returns `fresh` with the rows of `given` that `rows` names, in the dtype and sharding of `fresh`.

    Args:
      given: an array of the source.
      fresh: its counterpart in the target; rows that the source lacks, and those that pad the vocabulary, stay.
      axes: logical axes of both; one is `vocab`.
      rows: i32[n] as from `vocabulary_rows`.

    Raises:
      ConfigError: the source has fewer rows than `rows` asks for, or another axis differs.
    """
    axis = axes.index(VOCAB)
    require(
        given.ndim == fresh.ndim
        and all(a == b for i, (a, b) in enumerate(zip(given.shape, fresh.shape, strict=True)) if i != axis),
        f"an array of the vocabulary has shape {list(given.shape)} in one network and {list(fresh.shape)} in the other",
        where="TrainRun.model",
        fix="Use the checkpoint's width; only the vocabulary can be pruned or restored.",
    )
    require(
        int(rows.max(initial=-1)) < given.shape[axis] and len(rows) <= fresh.shape[axis],
        f"the vocabulary map names row {int(rows.max(initial=-1))} of {given.shape[axis]}",
        where="DataPipeline.vocabulary_map",
        fix="Use data of the checkpoint's own vocabulary.",
    )
    there = np.flatnonzero(rows >= 0)
    taken = jnp.take(jnp.asarray(given), jnp.asarray(rows[there]), axis=axis).astype(fresh.dtype)
    index = (*(slice(None),) * axis, jnp.asarray(there))
    return jax.device_put(fresh.at[index].set(taken), fresh.sharding)


def move_vocabulary(given: Params, fresh: Params, axes: Any, rows: np.ndarray) -> Params:
    """Returns `given` with every array of the vocabulary replaced by `move_rows` into that of `fresh`.

    Pruning and restoring are the same with `rows` of the other direction; both trees and `axes` have one structure.
    """

    def move(leaf: jax.Array, other: jax.Array, names: tuple[str | None, ...]) -> jax.Array:
        return move_rows(leaf, other, names, rows) if VOCAB in names else leaf

    return jax.tree.map(move, given, fresh, axes)
