"""Reads T5X checkpoints: the msgpack file `checkpoint`, and next to it one zarr folder per array.

Arrays can also be in the msgpack file itself. Scanned layers are stored in one array, stacked on axis 1; they are
presented as one tensor per layer, under the names of a checkpoint without scan.
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
"""Name of the relative bias, after the name of a stack (one bias for all layers) or of a layer."""

SCAN_AXIS = 1
"""Axis of the layers in a scanned array (`param_scan_axis` of T5X)."""

# `layers` in t5x/examples/scalable_t5; a second `encoder` or `decoder` in Flaxformer.
_STACKED = re.compile(r"(encoder|decoder)\.(?:layers|\1)\.(.+)")
_OWN_BIAS = re.compile(r"(encoder|decoder)\.layers_(\d+)\.(?:relpos_bias|relative_posemb)\.rel_embedding")


class T5xFile:
    """The tensors of one T5X checkpoint; implements `tensor_files.TensorFile`.

    Names have no `target.` prefix. Attention kernels have heads and head size on one axis, as in T5X; Flaxformer has
    two.

    Args:
      path: the msgpack file.

    Raises:
      ConfigError: the file is not an index of a T5X checkpoint, or an array is missing.
    """

    def __init__(self, path: Path):
        self._path = path
        self._leaves = dict(_flat(_target(path)))
        self._opened: dict[str, Any] = {}
        # From the name of a tensor to (name of the stored array, layer in it or None).
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
        # Flaxformer's [H, E, D] is presented as [H * E, D], whose rows are not rows of the stored array: read it all.
        joined = len(self.shape(name)) < len(array.shape) - (layer is not None)
        part = slice(None) if joined else rows
        region: Any = (part,) if layer is None else (part, layer)
        read = array[region] if isinstance(array, np.ndarray) else array[region].read().result()
        read = np.asarray(read).reshape(_joined(name, read.shape))
        return read[rows] if joined else read

    def _array(self, name: str) -> Any:
        """Returns an array of the index, or the opened zarr folder that the index refers to."""
        if name in self._opened:
            return self._opened[name]
        leaf = self._leaves[name]
        if isinstance(leaf, dict):
            leaf = self._open(name, leaf)
        self._opened[name] = leaf
        return leaf

    def _open(self, name: str, spec: dict[str, Any]) -> Any:
        import tensorstore

        # The path is relative to the index. Older versions of TensorStore store it outside of `kvstore`.
        store = spec["kvstore"] if isinstance(spec["kvstore"], dict) else {}
        named = str(store.get("path") or spec.get("path") or "").rstrip("/")
        folder = self._path.parent / named
        # Only a folder next to the index is accepted: a hostile index could name any path of this machine.
        if not named or Path(named).name != named or not folder.is_dir():
            raise ConfigError(
                f"array {name!r} is missing: {self._path.name} refers to the folder {named!r}",
                where=str(self._path.parent),
                fix="Download the checkpoint with all of its folders.",
            )
        place = {"driver": "file", "path": str(folder)}
        try:
            return tensorstore.open({"driver": "zarr", "kvstore": place}, open=True, read=True).result()
        except (ValueError, OSError) as error:
            raise ConfigError(
                f"cannot read {named}: {error}", where=str(folder), fix="Download the folder again."
            ) from error

    def _join_biases(self) -> None:
        """Replaces the relative biases of the layers by one per stack where all layers of every stack have the same.

        A T5 that was converted to scanned layers has one copy per layer. In umT5, and in networks that were trained
        with scanned layers, the biases differ and stay.
        """
        found: dict[str, list[str]] = {}
        for name in list(self._places):
            own = _OWN_BIAS.fullmatch(name)
            if own:
                stack, layer = own.groups()
                renamed = f"{stack}.layers_{layer}.{BIAS}"
                self._places[renamed] = self._places.pop(name)
                found.setdefault(stack, []).append(renamed)
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
            f"{path.name} is not an index of a T5X checkpoint: {error}", where=str(path), fix="Download the file again."
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
    """Returns a kernel's shape with heads and head size joined on one axis."""
    if len(shape) != 3:
        return shape
    if name.endswith(".out.kernel"):
        return (shape[0] * shape[1], shape[2])
    if name.endswith((".query.kernel", ".key.kernel", ".value.kernel")):
        return (shape[0], shape[1] * shape[2])
    return shape
