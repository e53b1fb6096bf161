"""Reads `pytorch_model.bin` without torch and without running what is in it.

Such a file is a zip archive of a pickle and the bytes of each storage. A pickle is a program; this reader knows the
four words that a dict of tensors is written with, and refuses every other by its name.
"""

import collections
import pickle
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

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
_LOCAL_HEADER = 30


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
    """The tensors of one file, read one at a time.

    Args:
      path: the file.

    Raises:
      ConfigError: the file is cut off, is no zip archive, or its pickle holds more than a dict of tensors.
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
            raise self._refused("it is cut off, or was written by a torch before 1.6") from error
        except (pickle.UnpicklingError, AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            if isinstance(error, ConfigError):
                raise
            raise self._refused(f"its pickle is damaged: {error}") from error
        if not isinstance(found, dict):
            raise self._refused(f"it holds a {type(found).__name__} and no dict of tensors")
        for name, value in found.items():
            if not isinstance(value, _Tensor):
                raise self._refused(f"its entry {name!r} is a {type(value).__name__} and no tensor")
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
        """Returns rows of a tensor, mapped from the file where its bytes lie there uncompressed."""
        storage, offset, shape, strides = self._tensors[name]
        last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        if any(size < 0 for size in shape) or any(stride < 0 for stride in strides) or offset < 0:
            raise self._refused(f"tensor {name!r} has a negative size")
        if 0 not in shape and last >= storage.size:
            raise self._refused(f"tensor {name!r} reaches behind the end of its storage")
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
            start = entry.header_offset + _LOCAL_HEADER
            start += int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
            if storage.size * storage.dtype.itemsize > entry.file_size:
                raise self._refused(f"storage {storage.key} is shorter than its tensors")
            return np.memmap(self._path, storage.dtype, "r", start, (storage.size,))
        except (KeyError, ValueError, zipfile.BadZipFile) as error:
            if isinstance(error, ConfigError):
                raise
            raise self._refused(f"storage {storage.key} is missing or cut off") from error

    def _refused(self, why: str) -> ConfigError:
        return ConfigError(
            f"cannot read {self._path.name}: {why}",
            where=str(self._path),
            fix="Use the .safetensors files of the checkpoint, or save it anew with transformers.",
        )


class _Unpickler(pickle.Unpickler):
    """Builds descriptions of tensors; nothing that the file names is imported."""

    def __init__(self, stream: Any, path: Path):
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
            f"{self._file.name} asks for {module}.{name}, which a file of weights has no use for, so it is not read",
            where=str(self._file),
            fix="Use the .safetensors files of the checkpoint; such a file may run code when torch loads it.",
        )

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _, count = pid
        if kind != "storage" or not isinstance(dtype, np.dtype) or not isinstance(count, int):
            raise pickle.UnpicklingError(f"unknown reference {kind!r}")
        return _Storage(dtype, str(key), count)


def _rebuild_tensor(storage: _Storage, offset: int, shape: Any, strides: Any, *unused: Any) -> _Tensor:
    if not isinstance(storage, _Storage):
        raise pickle.UnpicklingError("a tensor without a storage")
    return _Tensor(storage, int(offset), tuple(map(int, shape)), tuple(map(int, strides)))


def _rebuild_parameter(tensor: _Tensor, *unused: Any) -> _Tensor:
    return tensor
