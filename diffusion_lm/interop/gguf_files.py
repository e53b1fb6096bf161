"""Reads GGUF files (llama.cpp's format) as the Hugging Face checkpoint that they were converted from.

Names and orders of rows are translated by `gguf_architectures`. Quantised tensors are dequantised to float32 by the
`gguf` package when they are read, one tensor (or one slice of rows) at a time.
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
    """One GGUF file; implements `tensor_files.TensorFile`.

    Attributes:
      config: the contents of an equivalent config.json.
      values: all metadata.

    Raises:
      ConfigError: the package `gguf` is missing, or the file is cut off, of an unknown architecture, or one part of a
        split checkpoint.
    """

    def __init__(self, path: Path):
        self._path = path
        reader = _open(path)
        self.values: dict[str, Any] = {
            name: _shortest(field.contents(), field.types[-1].name == "FLOAT32")
            for name, field in reader.fields.items()
        }
        require(
            self.values.get("split.count", 1) in (0, 1),
            f"{path.name} is one of {self.values.get('split.count')} parts of a checkpoint",
            where=str(path),
            fix="Merge them with `llama-gguf-split --merge` first.",
        )
        self._architecture = architecture_of(str(self.values.get(ARCHITECTURE)), str(path))
        stored = {tensor.name: tensor for tensor in reader.tensors}
        require(
            "token_embd.weight" in stored,
            "tensor 'token_embd.weight' is missing",
            where=str(path),
            fix="Use a file that holds a language model.",
        )
        factors = stored.pop(ROPE_FACTORS, None)
        embedding = stored["token_embd.weight"]
        data = Metadata(
            self.values, stored, int(embedding.shape[-1]), None if factors is None else factors.data, str(path)
        )
        self.config = self._architecture.config(data) | self._specials()
        data.check_all_read()
        to_hugging_face = {gguf_name: name for name, gguf_name in self._architecture.names.items()}
        self._tensors = {_renamed(name, to_hugging_face): tensor for name, tensor in stored.items()}

    def names(self) -> list[str]:
        """Returns the names of the tensors in the Hugging Face checkpoint; unknown tensors keep their names."""
        return list(self._tensors)

    def stored(self) -> dict[str, int]:
        """Returns the number of tensors of each storage type, such as {"Q8_0": 210}."""
        return dict(collections.Counter(self._kind(name) for name in self._tensors))

    def name_in_file(self, name: str) -> str:
        """Returns the name in the GGUF file, also of a tensor that it lacks; the layer may be `{i}`."""
        return _renamed(name, self._architecture.names)

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a tensor."""
        # ggml lists dimensions from the contiguous one, so its order is the reverse of numpy's.
        shape = tuple(int(size) for size in self._tensors[name].shape)
        return shape if self._is_transposed(name) else shape[::-1]

    def dtype(self, name: str) -> np.dtype | None:
        """Returns the dtype in which a tensor is read; None for integers and float64, which are not weights."""
        kind = self._kind(name)
        if kind.startswith(("I8", "I16", "I32", "I64", "F64")):
            return None
        return _PLAIN.get(kind, np.dtype(np.float32))

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """Returns rows of a tensor.

        Raises:
          ConfigError: the `gguf` package cannot dequantise it.
        """
        # Quantised data are bytes [rows, bytes per row]: blocks never cross rows, so rows can be read on their own.
        data = np.asarray(self._tensors[name].data)
        if self._is_transposed(name):
            return self._values_of(name, data).T[rows]
        heads = self._interleaved_heads(name)
        data = data[rows] if heads is None else data[_halves_order(len(data), heads)[rows]]
        values = self._values_of(name, data)
        if self._architecture.norms_from_zero and name.endswith("norm.weight"):
            return values.astype(np.float32) - 1.0  # the converter added 1, and Gemma's norm multiplies by 1 + weight
        return values

    def _values_of(self, name: str, data: np.ndarray) -> np.ndarray:
        """Returns stored data as numbers, dequantised to float32 where they are quantised."""
        import gguf

        kind = self._kind(name)
        if kind == "BF16":
            # The gguf package gives BF16 as raw bytes, because numpy has no such dtype.
            return np.ascontiguousarray(data).view(_PLAIN[kind])
        if kind in _PLAIN:
            return data
        try:
            return gguf.dequantize(np.ascontiguousarray(data), self._tensors[name].tensor_type)
        except NotImplementedError as error:
            raise ConfigError(
                f"tensor {self.name_in_file(name)!r} is quantised as {kind}, which the gguf package cannot dequantise",
                where=str(self._path),
                fix="Use a file of another quantisation, such as Q8_0, Q6_K or F16.",
            ) from error

    def _kind(self, name: str) -> str:
        return self._tensors[name].tensor_type.name

    def _is_transposed(self, name: str) -> bool:
        module, _, part = name.rpartition(".")
        return part == "weight" and module.endswith(self._architecture.transposed)

    def _interleaved_heads(self, name: str) -> int | None:
        """Returns the number of heads of a tensor whose rows are in rotated pairs; None for all others."""
        if not self._architecture.interleaved:
            return None
        for module, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
            if f".{module}." in name:
                count = self.config[heads]
                assert isinstance(count, int)
                return count
        return None

    def _specials(self) -> dict[str, Any]:
        found = {key: self.values.get(f"tokenizer.ggml.{role}_token_id") for role, key in _SPECIALS.items()}
        ends = [self.values.get(f"tokenizer.ggml.{name}_token_id") for name in _ENDS]
        ids = list(dict.fromkeys(token for token in ends if token is not None))
        found["eos_token_id"] = ids[0] if len(ids) == 1 else ids or None
        return found


def _open(path: Path) -> Any:
    """Returns a `gguf.GGUFReader`; the package is optional."""
    try:
        import gguf
    except ImportError as error:
        raise ConfigError(
            f"{path.name} is a GGUF file, and the package `gguf` is not installed",
            where=str(path),
            fix="Run `pip install 'diffusion-lm[gguf]'`.",
        ) from error
    try:
        return gguf.GGUFReader(path)
    # The type of the exception depends on where a truncated file ends.
    except (ValueError, IndexError, KeyError, OSError, TypeError) as error:
        raise ConfigError(
            f"{path.name} is cut off or damaged: {_first_cut(path) or error}",
            where=str(path),
            fix="Download the file again.",
        ) from error


def _first_cut(path: Path) -> str | None:
    """Returns which tensor a truncated file ends in; None if it ends before the tensors or is damaged otherwise.

    `GGUFReader` fails with a message about array shapes, so the list of tensors is read again without their data.
    """
    import gguf

    found: list[str] = []

    class TensorEnds(gguf.GGUFReader):
        def _build_tensors(self, start_offs, fields):
            for field in fields:
                name, sizes, kind, offset = (field.parts[part] for part in (1, 3, 4, 5))
                block, stored = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind[0])]
                end = int(start_offs) + int(offset[0]) + int(np.prod(sizes)) // block * stored
                if end > len(self.data):
                    found.append(f"tensor {bytes(name).decode()!r} ends at byte {end:,} of {len(self.data):,}")

    try:
        TensorEnds(path)
    except Exception:  # the file is damaged before its tensors
        return None
    return next(iter(found), None)


def _shortest(value: object, single: bool) -> object:
    """Returns floats as the shortest decimal that rounds to the same float32.

    An epsilon of 1e-5 is stored as a float32. As a Python float that is 9.999999747e-06; config.json has 1e-5.

    Args:
      value: a value of the metadata.
      single: whether it was stored as float32.
    """
    if isinstance(value, list):
        return [_shortest(item, single) for item in value]
    return float(str(np.float32(value))) if single and isinstance(value, float) else value


def _renamed(name: str, modules: Mapping[str, str]) -> str:
    """Returns the name of a tensor with its module renamed; the name itself where the module is not in `modules`."""
    module, _, part = name.rpartition(".")
    number = re.search(r"(?<=\.)(\d+|\{i\})(?=\.)", module)
    known = module if number is None else module[: number.start()] + "{i}" + module[number.end() :]
    if known not in modules:
        return name
    return f"{modules[known]}.{part}".replace("{i}", "{i}" if number is None else number[0])


def _halves_order(rows: int, heads: int) -> np.ndarray:
    """Returns the rows of the file in the order of the Hugging Face checkpoint, i64[rows].

    Within each head the file has pairs, (x0, y0, x1, y1, ...), where RoPE rotates x_j with y_j. Hugging Face has the
    two halves, (x0, x1, ..., y0, y1, ...). For four rows of one head the order is 0, 2, 1, 3.
    """
    return np.arange(rows).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)
