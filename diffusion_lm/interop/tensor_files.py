"""The tensors of a checkpoint under one interface, whatever the file format; they are read one at a time."""

import json
import struct
from collections.abc import Collection
from pathlib import Path
from typing import Protocol

import ml_dtypes
import numpy as np

from diffusion_lm.core.errors import ConfigError
from diffusion_lm.interop.gguf_files import SUFFIX, GgufFile
from diffusion_lm.interop.t5x_files import INDEX, T5xFile
from diffusion_lm.interop.torch_files import TorchFile

LAYOUTS = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
"""(single file, index of shards) of each format, the preferred one first."""

_FLOATS = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F64": np.dtype(np.float64),
}

# Suffixes of files that may hold tensors.
_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".npz")


class TensorFile(Protocol):
    """A file of named tensors."""

    def names(self) -> list[str]:
        """Returns the names of the tensors."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a tensor."""

    def dtype(self, name: str) -> np.dtype | None:
        """Returns the dtype of a tensor; None if it is not a floating-point dtype of 16 bits or more."""

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """Returns rows of a tensor."""


class Edits(Protocol):
    """Changes some tensors as they are read; `adapters.Adapter` is one.

    Attributes:
      changed: names of the tensors that it changes.
    """

    changed: frozenset[str]

    def shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape of a changed tensor, given the shape of the base tensor."""

    def replaces(self, name: str) -> bool:
        """Returns whether the base tensor is replaced and need not be read."""

    def read(self, name: str, rows: slice, base: np.ndarray | None) -> np.ndarray:
        """Returns rows of a changed tensor, given the rows of the base tensor (None if it is replaced)."""


class SafeTensorFile:
    """One safetensors file.

    Raises:
      ConfigError: the file is cut off or damaged.
    """

    def __init__(self, path: Path):
        import safetensors

        try:
            self._file = safetensors.safe_open(path, framework="numpy")
            self._names = list(self._file.keys())
        except (safetensors.SafetensorError, OSError, struct.error) as error:
            raise ConfigError(
                f"{path.name} is cut off or damaged: {error}", where=str(path), fix="Download the file again."
            ) from error

    def names(self) -> list[str]:
        """Returns the names of the tensors."""
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a tensor."""
        return tuple(self._file.get_slice(name).get_shape())

    def dtype(self, name: str) -> np.dtype | None:
        """Returns the dtype of a tensor; None if it is not a floating-point dtype of 16 bits or more."""
        return _FLOATS.get(self._file.get_slice(name).get_dtype())

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """Returns rows of a tensor."""
        if rows == slice(None):
            return self._file.get_tensor(name)
        return self._file.get_slice(name)[rows]


def has_weights(folder: Path) -> bool:
    """Returns whether a folder has the weights of a Hugging Face checkpoint, in one file or in shards."""
    return any((folder / name).is_file() for names in LAYOUTS for name in names)


def open_tensors(path: Path) -> TensorFile:
    """Opens a file by its name: safetensors, `pytorch_model.bin`, or the index of a T5X checkpoint.

    Raises:
      ConfigError: the file is cut off or damaged.
    """
    if path.name == INDEX:
        return T5xFile(path)
    return SafeTensorFile(path) if path.suffix == ".safetensors" else TorchFile(path)


class Checkpoint:
    """All tensors of a folder, or of one GGUF file.

    Attributes:
      files: the file of each tensor, by the name of the tensor.
      gguf: the GGUF file, or None.
      edits: changes some tensors as they are read; None = no changes.
      unindexed: (tensor, file) of tensors in a shard that the index does not assign to this shard; they are not read.

    Args:
      folder: the folder or the GGUF file.

    Raises:
      ConfigError: there are no weights, a shard is missing or cut off, or the index disagrees with the shards.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self.files: dict[str, Path] = {}
        self.edits: Edits | None = None
        self.unindexed: list[tuple[str, str]] = []
        self._open: dict[Path, TensorFile] = {}
        self.gguf: GgufFile | None = None
        if folder.suffix == SUFFIX:
            self.gguf = GgufFile(folder)
            self._open[folder] = self.gguf
            self.files = dict.fromkeys(self.gguf.names(), folder)
            return
        for single, index in LAYOUTS:
            if (folder / index).is_file():
                self._add_shards(folder / index)
                return
            if (folder / single).is_file():
                self._add(folder / single)
                return
        if (folder / INDEX).is_file():
            self._add(folder / INDEX)
            return
        raise ConfigError(
            f"there are no weights in {folder}",
            where=str(folder),
            fix=f"Add {' or '.join(single for single, _ in LAYOUTS)}, or shards with their index.",
        )

    def _add_shards(self, index: Path) -> None:
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            places = {str(name): str(place) for name, place in dict(weight_map).items()}
            shards = sorted(set(places.values()))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ConfigError(
                f"{index.name} is not an index of shards", where=str(index), fix="Download the file again."
            ) from error
        for shard in shards:
            if Path(shard).name != shard:
                # A hostile index could name any file of this machine.
                raise ConfigError(
                    f"{index.name} names {shard!r}, which is outside of the folder",
                    where=str(index),
                    fix="Use the index that belongs to these shards.",
                )
            if not (self._folder / shard).is_file():
                first = next(name for name, place in places.items() if place == shard)
                raise ConfigError(
                    f"the shard {shard} is missing; according to {index.name} it holds {first!r}",
                    where=str(self._folder),
                    fix="Download the missing file.",
                )
            # Only tensors that the index assigns to the shard: another shard may hold an older copy.
            self._add(self._folder / shard, {name for name, place in places.items() if place == shard})
        for name, shard in places.items():
            if self.files.get(name) != self._folder / shard:
                raise ConfigError(
                    f"tensor {name!r} is not in {shard}, to which {index.name} assigns it",
                    where=str(index),
                    fix="Download the checkpoint again: its files belong to different versions.",
                )

    def _add(self, path: Path, named: Collection[str] | None = None) -> None:
        """Adds the tensors of a file; with `named`, only these."""
        file = self._open[path] = open_tensors(path)
        for name in file.names():
            if named is not None and name not in named:
                self.unindexed.append((name, path.name))
                continue
            self.files[name] = path

    def unread_files(self) -> list[str]:
        """Returns the names of files in the folder that look like tensors and were not opened, in order."""
        if self.gguf is not None:
            return []
        files = (file for file in self._folder.iterdir() if file.suffix in _SUFFIXES and file.is_file())
        return sorted(file.name for file in files if file not in self._open)

    def name_in_file(self, name: str) -> str:
        """Returns the name of a tensor in the file, for messages: GGUF files have other names than Hugging Face."""
        return name if self.gguf is None else self.gguf.name_in_file(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a tensor after `edits`."""
        shape = self._open[self.files[name]].shape(name)
        return shape if self.edits is None or name not in self.edits.changed else self.edits.shape(name, shape)

    def check_dtype(self, name: str) -> None:
        """Raises `ConfigError` if a tensor does not hold floats of 16 bits or more, such as a quantised one."""
        dtype = self._open[self.files[name]].dtype(name)
        # None needs a check of its own: numpy says np.dtype("float64") == None.
        if dtype is None or dtype not in _FLOATS.values():
            raise ConfigError(
                f"tensor {self.name_in_file(name)!r} does not hold floats of 16 bits or more",
                where=str(self.files[name]),
                fix="Use a checkpoint that is not quantised.",
            )

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """Returns rows of a tensor after `edits`.

        Raises:
          ConfigError: the file cannot be read.
        """
        try:
            file = self._open[self.files[name]]
            if self.edits is None or name not in self.edits.changed:
                return file.read(name, rows)
            return self.edits.read(name, rows, None if self.edits.replaces(name) else file.read(name, rows))
        except (OSError, ValueError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(
                f"cannot read tensor {self.name_in_file(name)!r}: {error}",
                where=str(self.files[name]),
                fix="Download the file again.",
            ) from error
