"""Reads the metadata of a GGUF file strictly: a key that was not read could change the network, so it is an error."""

import math
from collections.abc import Collection
from typing import Any

import numpy as np

from diffusion_lm.core.errors import ConfigError
from diffusion_lm.interop.name_maps.family import JsonObject, shown

ARCHITECTURE = "general.architecture"
# Keys of the architecture that change nothing.
_HARMLESS = {"vocab_size", "tensor_data_layout"}
_STRINGS = {"rope.scaling.type"}


def _is_number(value: object) -> bool:
    return value is None or isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value))


class Metadata:
    """The keys of one architecture, addressed without the prefix `ARCHITECTURE.`.

    Attributes:
      file: path of the file, for errors.
      vocab_size: number of rows of the token embedding.
      rope_factors: the tensor `rope_freqs.weight`, or None.

    Args:
      values: all keys of the file.
      tensors: names of its tensors in the file.
      vocab_size: as above.
      rope_factors: as above.
      file: as above.
    """

    def __init__(
        self,
        values: JsonObject,
        tensors: Collection[str],
        vocab_size: int,
        rope_factors: np.ndarray | None,
        file: str,
    ):
        self.file, self.vocab_size, self.rope_factors = file, vocab_size, rope_factors
        self._values, self._tensors, self._read = values, tensors, set[str]()
        self._prefix = f"{values[ARCHITECTURE]}."

    def get(self, name: str, default: object = None) -> Any:
        """Returns a value; `default` if the file does not have the key."""
        self._read.add(name)
        value = self._values.get(self._prefix + name, default)
        if name not in _STRINGS and not all(map(_is_number, value if isinstance(value, list) else [value])):
            raise self._unsupported(name, "it must be a number")
        return value

    def one(self, name: str, default: object = None) -> Any:
        """Returns a number that all layers share; `default` if the file does not have the key.

        Raises:
          ConfigError: the file lists different numbers per layer.
        """
        value = self.get(name, default)
        if isinstance(value, list) and len(set(value)) == 1:
            return value[0]
        if isinstance(value, list):
            raise self._unsupported(name, "supported: one number for all layers")
        return value

    def need(self, name: str) -> Any:
        """Returns a number above 0; raises `ConfigError` if the file does not have the key."""
        value = self.one(name)
        if value is None:
            raise ConfigError(
                f"the key {self._prefix + name!r} is missing from the metadata",
                where=self.file,
                fix="Convert the checkpoint again, or import its Hugging Face folder.",
            )
        if not value > 0:
            raise self._unsupported(name, "it must be above 0")
        return value

    def same(self, name: str, value: object) -> None:
        """Raises `ConfigError` if the file has another value."""
        if self.get(name, value) != value:
            raise self._unsupported(name, f"supported: {value!r}")

    def has_tensor(self, name: str) -> bool:
        """Returns whether the file has a tensor of this name."""
        return name in self._tensors

    def check_all_read(self) -> None:
        """Raises `ConfigError` about a key of the architecture that has not been read."""
        for key in self._values:
            name = key.removeprefix(self._prefix)
            if key.startswith(self._prefix) and name not in self._read | _HARMLESS:
                raise self._unsupported(name, "the key is unknown here")

    def _unsupported(self, name: str, reason: str) -> ConfigError:
        key = self._prefix + name
        return ConfigError(
            f"{key} = {shown(self._values[key])} is not supported ({reason})",
            where=self.file,
            fix="Use a checkpoint without it, or import the Hugging Face folder.",
        )
