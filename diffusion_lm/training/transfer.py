"""Transfer of parameters from one network to another, with a report about every array."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from diffusion_lm.architectures import lora
from diffusion_lm.architectures.surgery import VOCAB, move_rows
from diffusion_lm.core.axes import AxesTree
from diffusion_lm.core.errors import ConfigError
from diffusion_lm.core.types import Params
from diffusion_lm.parallel.shardings import is_axes

RESIZABLE = ("vocab", "positions")


@dataclasses.dataclass(frozen=True)
class TransferReport:
    """What happened to the arrays of source and target; names are paths such as `blocks/attention/query`.

    Attributes:
      mapped: copied unchanged.
      resized: `(name, source shape, target shape)`; the common part is copied, new rows keep their fresh values.
      added: only in the target; they keep their fresh values.
      dropped: only in the source.
      merged: adapters of the source that were added to the matrices of a target without adapters.
      vocabulary: (number of tokens copied, number of tokens of the target) if tokens have other ids in the target, else
        None; `resized` has the arrays whose rows were copied that way.
    """

    mapped: tuple[str, ...]
    resized: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...] = ()
    added: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    merged: tuple[str, ...] = ()
    vocabulary: tuple[int, int] | None = None

    def __str__(self) -> str:
        lines = [
            f"transfer: {len(self.mapped)} arrays mapped, {len(self.resized)} resized, {len(self.added)} added, "
            f"{len(self.dropped)} dropped" + (f", {len(self.merged)} adapters merged" if self.merged else "")
        ]
        if self.vocabulary is not None:
            lines.append(
                f"  vocabulary: {self.vocabulary[0]:,} of {self.vocabulary[1]:,} tokens moved to their new ids"
            )
        lines += [f"  resized  {name}  {list(old)} -> {list(new)}" for name, old, new in self.resized]
        lines += [f"  added    {name}  (fresh)" for name in self.added]
        lines += [f"  dropped  {name}" for name in self.dropped]
        lines += [f"  merged   {name}" for name in self.merged]
        return "\n".join(lines)


def transfer(
    source: Params, target: Params, axes: AxesTree, rows: np.ndarray | None = None
) -> tuple[Params, TransferReport]:
    """Returns `target` with every array that `source` also has replaced by the source's, and the report.

    Dtypes and shardings are the target's. The axes `vocab` and `positions` may differ in size, others may not. Adapters
    (`architectures/lora.py`) are never lost: a target without adapters gets them merged into its matrices, and a target
    with different adapters is an error.

    Args:
      source: parameters of the trained network.
      target: freshly initialised parameters of the network to train.
      axes: logical axes of the target (`Architecture.logical_axes()`).
      rows: i32[tokens of the target], the source's row of each token, or -1 (`surgery.vocabulary_rows`); None if both
        have the same ids.

    Raises:
      ConfigError: an array differs in an axis that cannot be resized, no array matches, or the adapters of source and
        target differ.
    """
    # Adapters first: what follows compares array by array.
    merged: tuple[str, ...] = ()
    if lora.PART in source:
        if lora.PART in target:
            require_arrays(source[lora.PART], target[lora.PART], where="TrainRun.initial", prefix=f"{lora.PART}/")
        else:
            names = (name for name, _ in named_leaves(source[lora.PART]) if name.endswith("/a"))
            merged, source = tuple(name.removesuffix("/a") for name in names), lora.merge(source)
    old = dict(named_leaves(source))
    leaf_axes = jax.tree.leaves(axes, is_leaf=is_axes)
    mapped, resized, added, leaves = [], [], [], []
    for (name, fresh), dims in zip(named_leaves(target), leaf_axes, strict=True):
        given = old.get(name)
        if given is None:
            added.append(name)
            leaves.append(fresh)
        elif rows is not None and VOCAB in dims:  # even with equal shapes, the ids differ
            leaves.append(move_rows(given, fresh, dims, rows))
            resized.append((name, tuple(given.shape), tuple(fresh.shape)))
        elif given.shape == fresh.shape:
            mapped.append(name)
            leaves.append(_like(given, fresh))
        else:
            leaves.append(_resize(name, given, fresh, dims))
            resized.append((name, tuple(given.shape), tuple(fresh.shape)))
    dropped = sorted(set(old) - set(mapped) - {name for name, _, _ in resized})
    if not mapped and not resized:
        raise ConfigError(
            "the checkpoint and the model have no array in common",
            where="TrainRun.initial",
            fix="Start from a checkpoint of the same model family.",
        )
    moved = None if rows is None else (int((rows >= 0).sum()), len(rows))
    report = TransferReport(tuple(mapped), tuple(resized), tuple(added), tuple(dropped), merged, moved)
    return jax.tree.unflatten(jax.tree.structure(target), leaves), report


def require_arrays(found: Params, expected: Params, *, where: str, prefix: str = "") -> None:
    """Raises `ConfigError` unless two trees have arrays of the same names and shapes.

    Args:
      found: arrays that were read.
      expected: arrays of the model, or their shapes.
      where: file or directory of `found`, for the message.
      prefix: of the names in the message.
    """
    there = {prefix + name: tuple(leaf.shape) for name, leaf in named_leaves(found)}
    here = {prefix + name: tuple(leaf.shape) for name, leaf in named_leaves(expected)}
    differing = {
        "is missing": sorted(set(here) - set(there)),
        "is not an array of the model": sorted(set(there) - set(here)),
        "has another shape": sorted(name for name in set(here) & set(there) if here[name] != there[name]),
    }
    for what, names in differing.items():
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise ConfigError(
                f"array {names[0]} of the checkpoint {what}{more}",
                where=where,
                fix="Use the model that wrote it, including its adapters.",
            )


def named_leaves(tree: Params) -> list[tuple[str, Any]]:
    """Returns the arrays of a tree with their paths, `a/b/c`."""
    return [
        (jax.tree_util.keystr(path, simple=True, separator="/"), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]


def _like(given: ArrayLike, fresh: jax.Array) -> jax.Array:
    # Cast before placing: the sharding is that of the target's array.
    value = jnp.asarray(given)
    value = value.astype(fresh.dtype) if value.dtype != fresh.dtype else value
    return jax.device_put(value, fresh.sharding)


def _resize(name: str, given: jax.Array, fresh: jax.Array, dims: tuple[str | None, ...]) -> jax.Array:
    same_rank = given.ndim == fresh.ndim
    differing = [axis for axis, a, b in zip(dims, given.shape, fresh.shape, strict=False) if a != b]
    if not same_rank or any(axis not in RESIZABLE for axis in differing):
        raise ConfigError(
            f"'{name}' has shape {list(given.shape)} in the checkpoint and {list(fresh.shape)} in the model",
            where="TrainRun.model",
            fix="Use the checkpoint's width, heads and layers; only vocabulary and positions can be resized.",
        )
    # The leading part of each axis: tokens and positions keep their ids.
    common = tuple(slice(0, min(a, b)) for a, b in zip(given.shape, fresh.shape, strict=True))
    return jax.device_put(fresh.at[common].set(jnp.asarray(given)[common].astype(fresh.dtype)), fresh.sharding)
