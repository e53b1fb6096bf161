"""The tensors of a checkpoint folder, whatever files they are in; read one at a time."""

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
"""The file of a checkpoint in one piece, and the index of one in several; earlier ones are preferred."""

_FLOATS = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F64": np.dtype(np.float64),
}


_TENSORS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".npz")


class TensorFile(Protocol):
    """One file of tensors."""

    def names(self) -> list[str]:
        """Returns the names of the tensors."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a tensor."""

    def dtype(self, name: str) -> np.dtype | None:
        """Returns the dtype of a tensor; None where it is no dtype of weights."""

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """Returns rows of a tensor."""


class Edits(Protocol):
    """Changes of some tensors that are made as they are read; `adapters.Adapter` is one."""

    changed: frozenset[str]

    def shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape of a changed tensor, given that of the base."""

    def replaces(self, name: str) -> bool:
        """Returns whether nothing is read of the base's tensor."""

    def read(self, name: str, rows: slice, base: np.ndarray | None) -> np.ndarray:
        """Returns rows of a changed tensor, given those of the base (None where they are replaced)."""


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
        """Returns the dtype of a tensor; None where it is no dtype of weights."""
        return _FLOATS.get(self._file.get_slice(name).get_dtype())

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """Returns rows of a tensor."""
        if rows == slice(None):
            return self._file.get_tensor(name)
        return self._file.get_slice(name)[rows]


def has_weights(folder: Path) -> bool:
    """Returns whether a folder has the weights of a checkpoint of Hugging Face, in one file or in shards."""
    return any((folder / name).is_file() for names in LAYOUTS for name in names)


def open_tensors(path: Path) -> TensorFile:
    """Returns one file of tensors by its name: safetensors, torch's, or the index of a T5X checkpoint.

    Raises:
      ConfigError: the file is cut off or damaged.
    """
    if path.name == INDEX:
        return T5xFile(path)
    return SafeTensorFile(path) if path.suffix == ".safetensors" else TorchFile(path)


class Checkpoint:
    """All tensors of a folder, or of one GGUF file.

    Attributes:
      files: the file of each tensor, by the tensor's name.
      gguf: the GGUF file, or None.
      edits: changes of some tensors, or None.
      unindexed: (tensor, file) that are in a shard and that the index does not assign to it; they are not read.

    Args:
      folder: the folder or the file.

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
            fix=f"It needs {' or '.join(single for single, _ in LAYOUTS)}, or shards with their index.",
        )

    def _add_shards(self, index: Path) -> None:
        try:
            told = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            places = {str(name): str(place) for name, place in dict(told).items()}
            shards = sorted(set(places.values()))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ConfigError(
                f"{index.name} is no index of shards", where=str(index), fix="Download the file again."
            ) from error
        for shard in shards:
            if Path(shard).name != shard:
                raise ConfigError(f"{index.name} names {shard!r} outside of the folder", where=str(index))
            if not (self._folder / shard).is_file():
                first = next(name for name, place in places.items() if place == shard)
                raise ConfigError(
                    f"the shard {shard} is missing; {index.name} says that it holds {first!r}",
                    where=str(self._folder),
                    fix="Download the missing file.",
                )
            # The index is the list of what is read: another shard may hold an older copy.
            self._add(self._folder / shard, {name for name, place in places.items() if place == shard})
        for name, shard in places.items():
            if self.files.get(name) != self._folder / shard:
                raise ConfigError(
                    f"tensor {name!r} is not in {shard}, where {index.name} says it is",
                    where=str(index),
                    fix="Download the checkpoint again: its files are of different versions.",
                )

    def _add(self, path: Path, named: Collection[str] | None = None) -> None:
        """Adds the tensors of a file; with `named`, these alone."""
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
        files = (file for file in self._folder.iterdir() if file.suffix in _TENSORS and file.is_file())
        return sorted(file.name for file in files if file not in self._open)

    def called(self, name: str) -> str:
        """Returns what the file calls a tensor, present or not: a GGUF file has names of its own."""
        return name if self.gguf is None else self.gguf.called(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a tensor, as it is read."""
        shape = self._open[self.files[name]].shape(name)
        return shape if self.edits is None or name not in self.edits.changed else self.edits.shape(name, shape)

    def check_dtype(self, name: str) -> None:
        """Raises `ConfigError` where a tensor is quantised or no weight at all."""
        dtype = self._open[self.files[name]].dtype(name)
        # numpy takes None for float64.
        if dtype is None or dtype not in _FLOATS.values():
            raise ConfigError(
                f"tensor {self.called(name)!r} holds no floats of 16 bits or more",
                where=str(self.files[name]),
                fix="Use a checkpoint that is not quantised.",
            )

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """Returns rows of a tensor as it is stored, or as `edits` change it.

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
                f"cannot read tensor {self.called(name)!r}: {error}",
                where=str(self.files[name]),
                fix="Download the file again.",
            ) from error
