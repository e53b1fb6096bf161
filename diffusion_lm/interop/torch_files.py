"""Reads `pytorch_model.bin` without torch and without executing code from the file.

Such a file is a zip archive of a pickle and the bytes of each storage. A pickle is a program that may import and call
any function. This reader accepts only the names that a dict of tensors needs, and raises an error for any other name.
"""

import collections
import pickle
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import ml_dtypes
import numpy as np

from diffusion_lm.core.errors import ConfigError

_DTYPES = {
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "DoubleStorage": np.dtype(np.float64),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}
_LOCAL_HEADER = 30  # bytes of a zip entry's header before its name


class _Storage(NamedTuple):
    dtype: np.dtype
    key: str
    size: int


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class TorchFile:
    """The tensors of one file; implements `tensor_files.TensorFile`.

    Args:
      path: the file.

    Raises:
      ConfigError: the file is cut off or not a zip archive, or its pickle holds something other than a dict of tensors.
    """

    def __init__(self, path: Path):
        self._path = path
        try:
            self._zip = zipfile.ZipFile(path)
            names = self._zip.namelist()
            pickles = [name for name in names if name.endswith("/data.pkl") or name == "data.pkl"]
            if len(pickles) != 1:
                raise self._refused("it holds no data.pkl")
            self._root = pickles[0].removesuffix("data.pkl")
            if self._root + "byteorder" in names and self._zip.read(self._root + "byteorder") != b"little":
                raise self._refused("its numbers are big-endian")
            with self._zip.open(pickles[0]) as stream:
                found = _Unpickler(stream, path).load()
        except (zipfile.BadZipFile, EOFError) as error:
            raise self._refused("it is cut off, or was written by a version of torch before 1.6") from error
        except (pickle.UnpicklingError, AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            if isinstance(error, ConfigError):
                raise
            raise self._refused(f"its pickle is damaged: {error}") from error
        if not isinstance(found, dict):
            raise self._refused(f"it holds a {type(found).__name__} instead of a dict of tensors")
        for name, value in found.items():
            if not isinstance(value, _Tensor):
                raise self._refused(f"its entry {name!r} is a {type(value).__name__} instead of a tensor")
        self._tensors: dict[str, _Tensor] = {str(name): value for name, value in found.items()}

    def names(self) -> list[str]:
        """Returns the names of the tensors."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a tensor."""
        return self._tensors[name].shape

    def dtype(self, name: str) -> np.dtype:
        """Returns the dtype of a tensor."""
        return self._tensors[name].storage.dtype

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """Returns rows of a tensor, memory-mapped where the archive stores it uncompressed."""
        storage, offset, shape, strides = self._tensors[name]
        # `as_strided` checks no bounds, so sizes from a hostile file would read other memory of this process.
        last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        if any(size < 0 for size in shape) or any(stride < 0 for stride in strides) or offset < 0:
            raise self._refused(f"tensor {name!r} has a negative size")
        if 0 not in shape and last >= storage.size:
            raise self._refused(f"tensor {name!r} extends past the end of its storage")
        flat = self._storage(storage)
        steps = tuple(stride * storage.dtype.itemsize for stride in strides)
        return np.lib.stride_tricks.as_strided(flat[offset:], shape, steps, writeable=False)[rows]

    def _storage(self, storage: _Storage) -> np.ndarray:
        name = f"{self._root}data/{storage.key}"
        try:
            entry = self._zip.getinfo(name)
            if entry.compress_type != zipfile.ZIP_STORED:
                return np.frombuffer(self._zip.read(name), storage.dtype, count=storage.size)
            with open(self._path, "rb") as stream:
                stream.seek(entry.header_offset)
                header = stream.read(_LOCAL_HEADER)
            # The header's own lengths of name and extra field: torch pads the latter to align the data.
            start = entry.header_offset + _LOCAL_HEADER
            start += int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
            if storage.size * storage.dtype.itemsize > entry.file_size:
                raise self._refused(f"storage {storage.key} is shorter than its tensors")
            return np.memmap(self._path, storage.dtype, "r", start, (storage.size,))
        except (KeyError, ValueError, zipfile.BadZipFile) as error:
            if isinstance(error, ConfigError):
                raise
            raise self._refused(f"storage {storage.key} is missing or cut off") from error

    def _refused(self, reason: str) -> ConfigError:
        return ConfigError(
            f"cannot read {self._path.name}: {reason}",
            where=str(self._path),
            fix="Use the .safetensors files of the checkpoint, or save it again with transformers.",
        )


class _Unpickler(pickle.Unpickler):
    """Builds descriptions of tensors; names in the file are looked up in a fixed list and never imported."""

    def __init__(self, stream: IO[bytes], path: Path):
        super().__init__(stream)
        self._file = path

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild_tensor
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return _rebuild_parameter
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        raise ConfigError(
            f"{self._file.name} refers to {module}.{name}, which a file of weights does not need; the file is not read",
            where=str(self._file),
            fix="Use the .safetensors files of the checkpoint. Loading this file with torch may execute code.",
        )

    def persistent_load(self, pid: object) -> _Storage:
        if not isinstance(pid, tuple) or len(pid) != 5:
            raise pickle.UnpicklingError("unknown reference")
        kind, dtype, key, _, count = pid
        if kind != "storage" or not isinstance(dtype, np.dtype) or not isinstance(count, int):
            raise pickle.UnpicklingError(f"unknown reference {kind!r}")
        return _Storage(dtype, str(key), count)


def _rebuild_tensor(
    storage: _Storage, offset: int, shape: Sequence[int], strides: Sequence[int], *unused: object
) -> _Tensor:
    if not isinstance(storage, _Storage):
        raise pickle.UnpicklingError("a tensor without a storage")
    return _Tensor(storage, int(offset), tuple(map(int, shape)), tuple(map(int, strides)))


def _rebuild_parameter(tensor: _Tensor, *unused: object) -> _Tensor:
    return tensor
