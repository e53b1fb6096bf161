"""Starting one network from the parameters of another, with a report of what happened to every array."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_lm.architectures import lora
from diffusion_lm.architectures.surgery import VOCAB, move_rows
from diffusion_lm.core.errors import ConfigError
from diffusion_lm.core.types import Params
from diffusion_lm.parallel.shardings import is_axes

RESIZABLE = ("vocab", "positions")


@dataclasses.dataclass(frozen=True)
class TransferReport:
    """What became of the arrays of both sides; names are paths such as `blocks/attention/query`.

    Attributes:
      mapped: taken over as they are.
      resized: `(name, source shape, target shape)`; what both have is taken over, new rows keep their fresh values.
      added: only in the target; keep their fresh values.
      dropped: only in the source.
      merged: adapters of the source, added to the matrices of a target that has none.
      vocabulary: (tokens taken over, tokens of the target) where tokens were moved to other ids, else None; `resized`
        holds the arrays that this was done to.
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
    source: Params, target: Params, axes: Any, rows: np.ndarray | None = None
) -> tuple[Params, TransferReport]:
    """Returns `target` with every array that `source` has too replaced by it, and the report.

    Dtypes and shardings are the target's. The axes `vocab` and `positions` may differ in size; others may not. Adapters
    (`architectures/lora.py`) never get lost on the way: a target without any gets them merged into its matrices, one
    with others is refused.

    Args:
      source: parameters of the trained network.
      target: freshly initialised parameters of the network to train.
      axes: logical axes of the target (`Architecture.logical_axes()`).
      rows: i32[tokens of the target], the source's row of each, -1 for none (`surgery.vocabulary_rows`); None where
        both have the same ids.

    Raises:
      ConfigError: an array has another shape in an axis that cannot be resized, nothing matches, or the adapters of
        the source are not those of the target.
    """
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
        elif rows is not None and VOCAB in dims:
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
            "no array of the checkpoint has a counterpart in the model",
            where="TrainRun.initial",
            fix="Start from a checkpoint of the same family of networks.",
        )
    moved = None if rows is None else (int((rows >= 0).sum()), len(rows))
    report = TransferReport(tuple(mapped), tuple(resized), tuple(added), tuple(dropped), merged, moved)
    return jax.tree.unflatten(jax.tree.structure(target), leaves), report


def require_arrays(found: Any, expected: Any, *, where: str, prefix: str = "") -> None:
    """Raises `ConfigError` unless two trees have arrays of the same names and shapes.

    Args:
      found: what was read.
      expected: what the model takes; arrays or their shapes.
      where: what was read from, for the message.
      prefix: of the names in the message.
    """
    there = {prefix + name: tuple(leaf.shape) for name, leaf in named_leaves(found)}
    here = {prefix + name: tuple(leaf.shape) for name, leaf in named_leaves(expected)}
    differing = {
        "is missing": sorted(set(here) - set(there)),
        "has no place in the model": sorted(set(there) - set(here)),
        "has another shape": sorted(name for name in set(here) & set(there) if here[name] != there[name]),
    }
    for what, names in differing.items():
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise ConfigError(
                f"array {names[0]} of the checkpoint {what}{more}",
                where=where,
                fix="Use the model that wrote it, adapters included.",
            )


def named_leaves(tree: Any) -> list[tuple[str, Any]]:
    """Returns the arrays of a tree with their paths, `a/b/c`."""
    return [
        (jax.tree_util.keystr(path, simple=True, separator="/"), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]


def _like(given: Any, fresh: Any) -> jax.Array:
    value = jnp.asarray(given)
    value = value.astype(fresh.dtype) if value.dtype != fresh.dtype else value
    return jax.device_put(value, fresh.sharding)


def _resize(name: str, given: Any, fresh: jax.Array, dims: tuple[str | None, ...]) -> jax.Array:
    same_rank = given.ndim == fresh.ndim
    differing = [axis for axis, a, b in zip(dims, given.shape, fresh.shape, strict=False) if a != b]
    if not same_rank or any(axis not in RESIZABLE for axis in differing):
        raise ConfigError(
            f"'{name}' has shape {list(given.shape)} in the checkpoint and {list(fresh.shape)} in the model",
            where="TrainRun.model",
            fix="Use the checkpoint's width, heads and layers; only vocabulary and positions can be resized.",
        )
    common = tuple(slice(0, min(a, b)) for a, b in zip(given.shape, fresh.shape, strict=True))
    return jax.device_put(fresh.at[common].set(jnp.asarray(given)[common].astype(fresh.dtype)), fresh.sharding)
