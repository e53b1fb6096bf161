"""GGUF files (llama.cpp's format) under the names and in the order of the Hugging Face checkpoint they were made from.

Quantised tensors are dequantised one at a time, by the `gguf` package itself, when they are read.
"""

import collections
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from diffusion_lm.core.errors import ConfigError, require
from diffusion_lm.interop.gguf_architectures import ROPE_FACTORS, architecture_of
from diffusion_lm.interop.gguf_metadata import ARCHITECTURE, Metadata

SUFFIX = ".gguf"
_SPECIALS = {"bos": "bos_token_id", "padding": "pad_token_id", "mask": "mask_token_id"}
_ENDS = ("eos", "eot")
_PLAIN = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}


class GgufFile:
    """One GGUF file as a file of tensors; see `tensor_files.TensorFile`.

    Attributes:
      config: the contents of the config.json that it amounts to.
      values: all metadata.

    Raises:
      ConfigError: the package `gguf` is missing, or the file is cut off, of an unknown architecture or one of several.
    """

    def __init__(self, path: Path):
        self._path = path
        reader = _open(path)
        self.values: dict[str, Any] = {
            name: _exact(field.contents(), field.types[-1].name == "FLOAT32") for name, field in reader.fields.items()
        }
        require(
            self.values.get("split.count", 1) in (0, 1),
            f"{path.name} is one of {self.values.get('split.count')} files",
            where=str(path),
            fix="Put them together with `llama-gguf-split --merge` first.",
        )
        self._architecture = architecture_of(str(self.values.get(ARCHITECTURE)), str(path))
        stored = {tensor.name: tensor for tensor in reader.tensors}
        require(
            "token_embd.weight" in stored,
            "tensor 'token_embd.weight' is missing",
            where=str(path),
            fix="Use the file of a language model.",
        )
        factors = stored.pop(ROPE_FACTORS, None)
        embedding = stored["token_embd.weight"]
        data = Metadata(
            self.values, stored, int(embedding.shape[-1]), None if factors is None else factors.data, str(path)
        )
        self.config = self._architecture.config(data) | self._specials()
        data.check_all_read()
        ours = {theirs: name for name, theirs in self._architecture.names.items()}
        self._tensors = {_renamed(name, ours): tensor for name, tensor in stored.items()}

    def names(self) -> list[str]:
        """Returns the names of the tensors, those of the Hugging Face checkpoint where it has them."""
        return list(self._tensors)

    def stored(self) -> dict[str, int]:
        """Returns how many tensors are stored in which way."""
        return dict(collections.Counter(self._kind(name) for name in self._tensors))

    def called(self, name: str) -> str:
        """Returns the name that the file has for a tensor, present or not; `{i}` may stand for the layer."""
        return _renamed(name, self._architecture.names)

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a tensor."""
        # ggml counts dimensions from the one that is contiguous.
        shape = tuple(int(size) for size in self._tensors[name].shape)
        return shape if self._is_transposed(name) else shape[::-1]

    def dtype(self, name: str) -> np.dtype | None:
        """Returns the dtype in which a tensor is read; None where it is no tensor of weights."""
        kind = self._kind(name)
        if kind.startswith(("I8", "I16", "I32", "I64", "F64")):
            return None
        return _PLAIN.get(kind, np.dtype(np.float32))

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """Returns rows of a tensor.

        Raises:
          ConfigError: the `gguf` package cannot dequantise it.
        """
        data = np.asarray(self._tensors[name].data)
        if self._is_transposed(name):
            return self._values_of(name, data).T[rows]
        heads = self._interleaved_heads(name)
        data = data[rows] if heads is None else data[_apart(len(data), heads)[rows]]
        values = self._values_of(name, data)
        if self._architecture.norms_from_zero and name.endswith("norm.weight"):
            return values.astype(np.float32) - 1.0
        return values

    def _values_of(self, name: str, data: np.ndarray) -> np.ndarray:
        import gguf

        kind = self._kind(name)
        if kind == "BF16":
            return np.ascontiguousarray(data).view(_PLAIN[kind])
        if kind in _PLAIN:
            return data
        try:
            return gguf.dequantize(np.ascontiguousarray(data), self._tensors[name].tensor_type)
        except NotImplementedError as error:
            raise ConfigError(
                f"tensor {self.called(name)!r} is quantised as {kind}, which the gguf package cannot dequantise",
                where=str(self._path),
                fix="Use a file of another quantisation, such as Q8_0, Q6_K or F16.",
            ) from error

    def _kind(self, name: str) -> str:
        return self._tensors[name].tensor_type.name

    def _is_transposed(self, name: str) -> bool:
        module, _, part = name.rpartition(".")
        return part == "weight" and module.endswith(self._architecture.transposed)

    def _interleaved_heads(self, name: str) -> int | None:
        if not self._architecture.interleaved:
            return None
        for module, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
            if f".{module}." in name:
                return self.config[heads]
        return None

    def _specials(self) -> dict[str, Any]:
        found = {ours: self.values.get(f"tokenizer.ggml.{theirs}_token_id") for theirs, ours in _SPECIALS.items()}
        ends = [self.values.get(f"tokenizer.ggml.{name}_token_id") for name in _ENDS]
        ids = list(dict.fromkeys(token for token in ends if token is not None))
        found["eos_token_id"] = ids[0] if len(ids) == 1 else ids or None
        return found


def _open(path: Path) -> Any:
    try:
        import gguf
    except ImportError as error:
        raise ConfigError(
            f"{path.name} is a GGUF file, and the package that reads them is not installed",
            where=str(path),
            fix="Run `pip install 'diffusion-lm[gguf]'`.",
        ) from error
    try:
        return gguf.GGUFReader(path)
    # What a file that ends early raises depends on where it ends.
    except (ValueError, IndexError, KeyError, OSError, TypeError) as error:
        raise ConfigError(
            f"{path.name} is cut off or damaged: {_first_cut(path) or error}",
            where=str(path),
            fix="Download the file again.",
        ) from error


def _first_cut(path: Path) -> str | None:
    """Returns which tensor the file ends in; None where it ends before the tensors or something else is wrong."""
    import gguf

    found: list[str] = []

    class Ends(gguf.GGUFReader):
        def _build_tensors(self, start_offs, fields):
            for field in fields:
                name, sizes, kind, offset = (field.parts[part] for part in (1, 3, 4, 5))
                block, stored = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind[0])]
                end = int(start_offs) + int(offset[0]) + int(np.prod(sizes)) // block * stored
                if end > len(self.data):
                    found.append(f"tensor {bytes(name).decode()!r} ends at byte {end:,} of {len(self.data):,}")

    try:
        Ends(path)
    except Exception:  # damaged before its tensors
        return None
    return next(iter(found), None)


def _exact(value: Any, single: bool) -> Any:
    """Returns metadata as numbers are meant: 1e-5 as a float32 is 1e-5, not 9.999999747e-06."""
    if isinstance(value, list):
        return [_exact(one, single) for one in value]
    return float(str(np.float32(value))) if single and isinstance(value, float) else value


def _renamed(name: str, modules: Mapping[str, str]) -> str:
    """Returns a tensor's name with its module renamed; the name itself where the module is in no table."""
    module, _, part = name.rpartition(".")
    number = re.search(r"(?<=\.)(\d+|\{i\})(?=\.)", module)
    known = module if number is None else module[: number.start()] + "{i}" + module[number.end() :]
    if known not in modules:
        return name
    return f"{modules[known]}.{part}".replace("{i}", "{i}" if number is None else number[0])


def _apart(rows: int, heads: int) -> np.ndarray:
    """Returns the order in which rows that stand in rotated pairs become the halves of each head."""
    return np.arange(rows).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)
