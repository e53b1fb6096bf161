"""Shardings from logical axis names, and the table of them that `explain` prints."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from diffusion_lm.core.axes import AxesTree
from diffusion_lm.core.types import Batch, Params
from diffusion_lm.parallel.rules import LogicalRules

Axes = Sequence[str | None]
Shared = TypeVar("Shared")
Tree = TypeVar("Tree")
Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True)
class Fallback:
    """A dimension that could not be split as the rules say.

    Attributes:
      logical: the logical axis.
      size: its size.
      mesh_axes: the mesh axes that it was not split over.
      reason: why it was not split.
    """

    logical: str
    size: int
    mesh_axes: tuple[str, ...]
    reason: str

    def __str__(self) -> str:
        return f"{self.logical} ({self.size}) not split over {', '.join(self.mesh_axes)}: {self.reason}"


def resolve(
    axes: Axes, rules: LogicalRules, shape: Sequence[int], mesh: Mesh
) -> tuple[PartitionSpec, tuple[Fallback, ...]]:
    """Returns the partition of one array and the dimensions that could not be split as the rules say.

    A dimension is split over the leading mesh axes of its rule as long as they divide its size. A mesh axis splits at
    most one dimension of an array, the first whose rule has it. Mesh axes of size 1 are omitted.

    Args:
      axes: one logical name (or None) per dimension.
      rules: logical axis -> mesh axes.
      shape: sizes of the dimensions.
      mesh: the mesh.

    Raises:
      ConfigError: a logical axis has no rule.
    """
    assert len(axes) == len(shape), f"{len(axes)} logical axes {tuple(axes)} for an array of shape {tuple(shape)}"
    used: set[str] = set()
    parts: list[str | tuple[str, ...] | None] = []
    fallbacks = []
    for logical, size in zip(axes, shape, strict=True):
        wanted = [axis for axis in rules.mesh_axes(logical) if mesh.shape[axis] > 1]
        kept: list[str] = []
        for position, axis in enumerate(wanted):
            pieces = math.prod(mesh.shape[name] for name in (*kept, axis))
            # A mesh axis can split only one dimension, and the size must be divisible.
            if axis in used:
                reason = "another dimension of the array is"
            elif size % pieces:
                reason = f"{size} is not divisible by {pieces}"
            else:
                kept.append(axis)
                continue
            fallbacks.append(Fallback(str(logical), size, tuple(wanted[position:]), reason))
            break
        used.update(kept)
        parts.append(None if not kept else kept[0] if len(kept) == 1 else tuple(kept))
    # Trailing Nones are dropped, so that equal partitions compare equal.
    while parts and parts[-1] is None:
        parts.pop()
    return PartitionSpec(*parts), tuple(fallbacks)


def spec_for(axes: Axes, rules: LogicalRules, shape: Sequence[int], mesh: Mesh) -> PartitionSpec:
    """Returns the partition of one array; see `resolve` for dimensions that cannot be split."""
    return resolve(axes, rules, shape, mesh)[0]


def is_axes(node: object) -> bool:
    """Returns True for a leaf of an `AxesTree`: a tuple of names and Nones, empty for a scalar."""
    return isinstance(node, tuple) and all(name is None or isinstance(name, str) for name in node)


def tree_shardings(axes_tree: AxesTree, abstract_tree: Params, rules: LogicalRules, mesh: Mesh) -> Any:
    """Returns a tree of `NamedSharding`s for a tree of arrays or `ShapeDtypeStruct`s.

    Args:
      axes_tree: the same structure, with logical axes at each leaf (`Architecture.logical_axes()`).
      abstract_tree: arrays or `ShapeDtypeStruct`s.
      rules: logical axis -> mesh axes.
      mesh: the mesh.
    """
    return jax.tree.map(
        lambda axes, leaf: NamedSharding(mesh, spec_for(axes, rules, leaf.shape, mesh)),
        axes_tree,
        abstract_tree,
        is_leaf=is_axes,
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a value that every device has completely (keys, counters, metrics)."""
    return NamedSharding(mesh, PartitionSpec())


def batch_shardings(batch: Tree, rules: LogicalRules, mesh: Mesh) -> Any:
    """Returns the shardings of a tree of [B, T, ...] arrays: rows over `batch`, tokens over `length`."""

    def one(leaf: jax.Array | jax.ShapeDtypeStruct) -> NamedSharding:
        axes = ("batch", "length")[: len(leaf.shape)] + (None,) * (len(leaf.shape) - 2)
        return NamedSharding(mesh, spec_for(axes, rules, leaf.shape, mesh))

    return jax.tree.map(one, batch)


def batch_divisor(rules: LogicalRules, mesh: Mesh) -> int:
    """Returns the number of shards of a batch: its rows must be a multiple of it."""
    return math.prod(mesh.shape[axis] for axis in rules.mesh_axes("batch"))


def place_batch(batch: Batch, rules: LogicalRules, mesh: Mesh) -> Batch:
    """Returns the global batch on the devices, from the rows that this process has.

    With one process these are all rows. With P processes each has the rows of its own devices, B / P of them.
    """
    processes = jax.process_count()
    if processes == 1:
        return jax.device_put(batch, batch_shardings(batch, rules, mesh))

    def one(leaf: ArrayLike) -> jax.Array:
        rows = np.asarray(leaf)
        shape = (rows.shape[0] * processes, *rows.shape[1:])
        sharding = batch_shardings(jax.ShapeDtypeStruct(shape, rows.dtype), rules, mesh)
        return jax.make_array_from_process_local_data(sharding, rows, shape)

    return jax.tree.map(one, batch)


@dataclasses.dataclass(frozen=True)
class Placement:
    """The placement of arrays inside a jitted function: mesh and rules.

    It is passed explicitly. Rules in a context variable would silently have no effect on functions traced outside it.

    Attributes:
      mesh: the devices.
      rules: logical axis -> mesh axes.
    """

    mesh: Mesh
    rules: LogicalRules

    def __call__(self, x: jax.Array, axes: Axes) -> jax.Array:
        """Constrains the sharding of an activation by the rules."""
        if self.mesh.size == 1:
            return x
        spec = spec_for(axes, self.rules, x.shape, self.mesh)
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec))

    def per_device(self, function: Callable[[Shared, Tree], Result], shared: Shared, tokens: Tree) -> Result:
        """Returns `function(shared, tokens)`, run by each device on its own part of the tokens.

        For loops: partitioned by XLA, the gradient of `shared` would be summed over the devices in every iteration.
        Here it is summed once, after the loop.

        Args:
          function: from `shared` and arrays [b,t,...] to arrays [b,t,...]; it must treat tokens (or rows, if the length
            is not split) independently.
          shared: arrays that every device needs completely, except dimensions over mesh axes that do not split tokens.
          tokens: a tree of arrays [B,T,...].
        """
        shape = jax.tree.leaves(tokens)[0].shape[:2]
        spec = spec_for(("batch", "length"), self.rules, shape, self.mesh)
        # Only the axes that split tokens; XLA partitions over the others as usual.
        manual = {axis for part in spec if part for axis in ((part,) if isinstance(part, str) else part)}
        if not manual:
            return function(shared, tokens)
        return jax.shard_map(
            function,
            mesh=self.mesh,
            in_specs=(PartitionSpec(), spec),
            out_specs=spec,
            axis_names=manual,
            check_vma=False,
        )(shared, tokens)

    def rows(self, batch: Tree) -> Tree:
        """Returns a tree of host arrays [B,T,...] on the devices; every process passes all rows."""
        return jax.device_put(batch, batch_shardings(batch, self.rules, self.mesh))

    def whole(self, tree: Tree) -> Tree:
        """Inside a compiled function, replicates a result on every device, so that the host can read it."""
        return jax.lax.with_sharding_constraint(tree, replicated(self.mesh))

    def split(
        self, function: Callable[..., Result], arguments: tuple[Any, ...], axes: tuple[Axes, ...], out_axes: Axes
    ) -> Result:
        """Returns `function(*arguments)`, each device computing its own part; see `nn.constrain.Constrain.split`."""
        if self.mesh.size == 1:
            return function(*arguments)

        def of(leaf: Any, names: Axes) -> PartitionSpec:
            return spec_for(names[: leaf.ndim], self.rules, leaf.shape, self.mesh)

        specs = tuple(
            jax.tree.map(lambda leaf, names=names: of(leaf, names), argument)
            for argument, names in zip(arguments, axes, strict=True)
        )
        return jax.shard_map(
            function, mesh=self.mesh, in_specs=specs, out_specs=of(arguments[0], out_axes), check_vma=False
        )(*arguments)


@dataclasses.dataclass(frozen=True)
class ShardingRow:
    """One line of the sharding table.

    Attributes:
      name: path of the array, e.g. `blocks/attention/query`.
      shape: global shape.
      dtype: name of the dtype.
      axes: logical axes.
      spec: mesh axes of each dimension, as text.
      bytes_per_device: size of one shard.
      fallbacks: dimensions that could not be split as the rules say, as text.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    axes: tuple[str | None, ...]
    spec: str
    bytes_per_device: int
    fallbacks: tuple[str, ...]


def sharding_table(axes_tree: AxesTree, abstract_tree: Params, rules: LogicalRules, mesh: Mesh) -> list[ShardingRow]:
    """Returns one row per array of the tree, in the tree's order."""
    axes_leaves = jax.tree.leaves(axes_tree, is_leaf=is_axes)
    leaves = jax.tree_util.tree_leaves_with_path(abstract_tree)
    assert len(axes_leaves) == len(leaves), "the tree of logical axes has another structure than the parameters"
    rows = []
    for axes, (path, leaf) in zip(axes_leaves, leaves, strict=True):
        spec, fallbacks = resolve(axes, rules, leaf.shape, mesh)
        shard = NamedSharding(mesh, spec).shard_shape(tuple(leaf.shape))
        rows.append(
            ShardingRow(
                name=jax.tree_util.keystr(path, simple=True, separator="/"),
                shape=tuple(leaf.shape),
                dtype=str(leaf.dtype),
                axes=tuple(axes),
                spec=", ".join("+".join(p) if isinstance(p, tuple) else p or "-" for p in spec) or "whole",
                bytes_per_device=math.prod(shard) * leaf.dtype.itemsize,
                fallbacks=tuple(str(fallback) for fallback in fallbacks),
            )
        )
    return rows
