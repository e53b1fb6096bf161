"""The tensors of a checkpoint folder under one roof, whatever files they lie in; read one at a time."""

import json
import struct
from collections.abc import Mapping
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


class Checkpoint:
    """All tensors of a folder, or of one GGUF file.

    Attributes:
      files: the file of each tensor, by the tensor's name.
      gguf: the GGUF file, or None.

    Args:
      folder: the folder or the file.

    Raises:
      ConfigError: there are no weights, a shard is missing or cut off, or the index disagrees with the shards.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self.files: dict[str, Path] = {}
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
            places: Mapping[str, str] = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
            shards = sorted({str(place) for place in places.values()})
        except (ValueError, KeyError, TypeError) as error:
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
            self._add(self._folder / shard)
        for name, shard in places.items():
            if self.files.get(name) != self._folder / shard:
                raise ConfigError(
                    f"tensor {name!r} is not in {shard}, where {index.name} says it is",
                    where=str(index),
                    fix="Download the checkpoint again: its files are of different versions.",
                )

    def _add(self, path: Path) -> None:
        file: TensorFile
        if path.name == INDEX:
            file = T5xFile(path)
        else:
            file = SafeTensorFile(path) if path.suffix == ".safetensors" else TorchFile(path)
        self._open[path] = file
        for name in file.names():
            if name in self.files:
                raise ConfigError(
                    f"tensor {name!r} is both in {self.files[name].name} and in {path.name}",
                    where=str(path),
                    fix="Remove the files that are not part of the checkpoint.",
                )
            self.files[name] = path

    def called(self, name: str) -> str:
        """Returns what the file calls a tensor, present or not: a GGUF file has names of its own."""
        return name if self.gguf is None else self.gguf.called(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a tensor."""
        return self._open[self.files[name]].shape(name)

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
        """Returns rows of a tensor as it is stored.

        Raises:
          ConfigError: the file cannot be read.
        """
        try:
            return self._open[self.files[name]].read(name, rows)
        except (OSError, ValueError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(
                f"cannot read tensor {self.called(name)!r}: {error}",
                where=str(self.files[name]),
                fix="Download the file again.",
            ) from error
