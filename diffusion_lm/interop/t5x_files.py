"""A checkpoint of T5X: the msgpack file `checkpoint`, and a zarr folder beside it for each array that it names.

Layers that were scanned lie in one array, stacked on axis 1; they are given out one by one, under the names that layers
have in a checkpoint without scan.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_lm.core.errors import ConfigError

INDEX = "checkpoint"
"""Name of the msgpack file."""

BIAS = "relpos_bias.rel_embedding"
"""The relative bias of a stack, or behind the name of a layer, that of the layer."""

SCAN_AXIS = 1
"""Where T5X stacks the layers (`param_scan_axis`)."""

# `layers` in t5x/examples/scalable_t5; a second `encoder` or `decoder` in Flaxformer.
_STACKED = re.compile(r"(encoder|decoder)\.(?:layers|\1)\.(.+)")
_OWN_BIAS = re.compile(r"(encoder|decoder)\.layers_(\d+)\.(?:relpos_bias|relative_posemb)\.rel_embedding")


class T5xFile:
    """The tensors of one T5X checkpoint, named without `target`, kernels of attention with heads and head size joined.

    Args:
      path: the msgpack file.

    Raises:
      ConfigError: the file is no index of T5X, or an array is missing.
    """

    def __init__(self, path: Path):
        self._path = path
        self._leaves = dict(_flat(_target(path)))
        self._opened: dict[str, Any] = {}
        self._places: dict[str, tuple[str, int | None]] = {}
        for name in self._leaves:
            stacked = _STACKED.fullmatch(name)
            if stacked is None:
                self._places[name] = (name, None)
                continue
            stack, rest = stacked.groups()
            for layer in range(self._array(name).shape[SCAN_AXIS]):
                self._places[f"{stack}.layers_{layer}.{rest}"] = (name, layer)
        self._join_biases()

    def names(self) -> list[str]:
        """Returns the names of the tensors."""
        return list(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a tensor."""
        place, layer = self._places[name]
        shape = list(self._array(place).shape)
        if layer is not None:
            del shape[SCAN_AXIS]
        return _joined(name, tuple(shape))

    def dtype(self, name: str) -> np.dtype | None:
        """Returns the dtype of a tensor."""
        array = self._array(self._places[name][0])
        return array.dtype if isinstance(array, np.ndarray) else array.dtype.numpy_dtype

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """Returns rows of a tensor."""
        place, layer = self._places[name]
        array = self._array(place)
        # Rows of the joined axis of [H, E, D] are not rows of the stored array.
        joined = len(self.shape(name)) < len(array.shape) - (layer is not None)
        part = slice(None) if joined else rows
        region: Any = (part,) if layer is None else (part, layer)
        read = array[region] if isinstance(array, np.ndarray) else array[region].read().result()
        read = np.asarray(read).reshape(_joined(name, read.shape))
        return read[rows] if joined else read

    def _array(self, name: str) -> Any:
        """Returns an array of the index, or the opened zarr folder that stands for it."""
        if name in self._opened:
            return self._opened[name]
        leaf = self._leaves[name]
        if isinstance(leaf, dict):
            leaf = self._open(name, leaf)
        self._opened[name] = leaf
        return leaf

    def _open(self, name: str, spec: dict[str, Any]) -> Any:
        import tensorstore

        # Wherever it was written, the path is relative to the index; older versions of TensorStore put it outside.
        store = spec["kvstore"] if isinstance(spec["kvstore"], dict) else {}
        told = str(store.get("path") or spec.get("path") or "").rstrip("/")
        folder = self._path.parent / told
        if not told or Path(told).name != told or not folder.is_dir():
            raise ConfigError(
                f"array {name!r} is not there: {self._path.name} says that it is the folder {told!r}",
                where=str(self._path.parent),
                fix="Download the checkpoint with all of its folders.",
            )
        place = {"driver": "file", "path": str(folder)}
        try:
            return tensorstore.open({"driver": "zarr", "kvstore": place}, open=True, read=True).result()
        except (ValueError, OSError) as error:
            raise ConfigError(
                f"cannot read {told}: {error}", where=str(folder), fix="Download the folder again."
            ) from error

    def _join_biases(self) -> None:
        """Makes the relative biases of the layers the one of their stack where those of every stack are equal.

        A T5 that was converted to scanned layers has copies; in umT5, and in whatever was trained scanned, they differ.
        """
        found: dict[str, list[str]] = {}
        for name in list(self._places):
            own = _OWN_BIAS.fullmatch(name)
            if own:
                stack, layer = own.groups()
                called = f"{stack}.layers_{layer}.{BIAS}"
                self._places[called] = self._places.pop(name)
                found.setdefault(stack, []).append(called)
        first = {stack: self.read(names[0]) for stack, names in found.items()}
        if not all(np.array_equal(self.read(name), first[stack]) for stack, names in found.items() for name in names):
            return
        for stack, names in found.items():
            place = self._places[names[0]]
            for name in names:
                del self._places[name]
            self._places[f"{stack}.{BIAS}"] = place


def _target(path: Path) -> dict[str, Any]:
    """Returns the tree of parameters of an index."""
    from flax import serialization

    try:
        tree = serialization.msgpack_restore(path.read_bytes())["optimizer"]["target"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path.name} is no index of a T5X checkpoint: {error}", where=str(path), fix="Download the file again."
        ) from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path.name} holds no parameters", where=str(path), fix="Download the file again.")
    return tree


def _flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (dotted name, array or TensorStore spec)."""
    for key, value in tree.items():
        if isinstance(value, dict) and not {"driver", "kvstore"} <= set(value):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _joined(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns a kernel's shape with heads and head size on one axis, as T5X stores it and Flaxformer does not."""
    if len(shape) != 3:
        return shape
    if name.endswith(".out.kernel"):
        return (shape[0] * shape[1], shape[2])
    if name.endswith((".query.kernel", ".key.kernel", ".value.kernel")):
        return (shape[0], shape[1] * shape[2])
    return shape
