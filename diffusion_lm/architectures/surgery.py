"""Copies vocabulary rows between networks: pruning to the tokens of a task, and restoring the full vocabulary.

Every array with a logical axis `vocab` is converted: the embedding, an untied output projection, its bias, the exponent
per token. The method is from arXiv 2308.12219, which fine-tunes XLM-R with the embeddings of the training set's tokens.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_lm.core.axes import AxesTree
from diffusion_lm.core.errors import require
from diffusion_lm.core.types import Params

VOCAB = "vocab"


def vocabulary_rows(source: Sequence[int] | np.ndarray, target: Sequence[int] | np.ndarray) -> np.ndarray:
    """Returns i32[len(target)], the row of each target token in the source, or -1 if the source does not have it.

    Args:
      source: ids, in the full vocabulary, of the source network's tokens in the order of its rows.
      target: likewise of the target network.
    """
    source, target = np.asarray(source, np.int64), np.asarray(target, np.int64)
    # Source row by id, -1 for ids that the source does not have.
    table = np.full(int(max(source.max(), target.max())) + 1, -1, np.int32)
    table[source] = np.arange(len(source), dtype=np.int32)
    return table[target]


def move_rows(given: jax.Array, fresh: jax.Array, axes: tuple[str | None, ...], rows: np.ndarray) -> jax.Array:
    """Returns `fresh` with the rows of `given` that `rows` names, in the dtype and sharding of `fresh`.

    Args:
      given: an array of the source.
      fresh: the array of the same name in the target; rows that the source does not have, and padding rows, stay.
      axes: logical axes of both; one is `vocab`.
      rows: i32[n], from `vocabulary_rows`.

    Raises:
      ConfigError: `rows` has a row that the source does not have, or another axis differs in size.
    """
    axis = axes.index(VOCAB)
    require(
        given.ndim == fresh.ndim
        and all(a == b for i, (a, b) in enumerate(zip(given.shape, fresh.shape, strict=True)) if i != axis),
        f"a vocabulary array has shape {list(given.shape)} in the checkpoint and {list(fresh.shape)} in the model",
        where="TrainRun.model",
        fix="Use the checkpoint's width; only the size of the vocabulary may differ.",
    )
    require(
        int(rows.max(initial=-1)) < given.shape[axis] and len(rows) <= fresh.shape[axis],
        f"the vocabulary map has row {int(rows.max(initial=-1))}, and the checkpoint has {given.shape[axis]} rows",
        where="DataPipeline.vocabulary_map",
        fix="Use data with the checkpoint's own vocabulary.",
    )
    shared = np.flatnonzero(rows >= 0)
    copied = jnp.take(jnp.asarray(given), jnp.asarray(rows[shared]), axis=axis).astype(fresh.dtype)
    index = (*(slice(None),) * axis, jnp.asarray(shared))
    return jax.device_put(fresh.at[index].set(copied), fresh.sharding)


def move_vocabulary(given: Params, fresh: Params, axes: AxesTree, rows: np.ndarray) -> Params:
    """Returns `given` with every array of the vocabulary replaced by `move_rows` into that of `fresh`.

    Pruning and restoring differ only in the direction of `rows`. Both trees and `axes` have the same structure.
    """

    def move(leaf: jax.Array, other: jax.Array, names: tuple[str | None, ...]) -> jax.Array:
        return move_rows(leaf, other, names, rows) if VOCAB in names else leaf

    return jax.tree.map(move, given, fresh, axes)
