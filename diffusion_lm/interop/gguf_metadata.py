"""What a GGUF file says about its network, read strictly: a key that nobody asked for may change the network."""

import math
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from diffusion_lm.core.errors import ConfigError
from diffusion_lm.interop.name_maps.family import shown

ARCHITECTURE = "general.architecture"
_HARMLESS = {"vocab_size", "tensor_data_layout"}
_TEXTS = {"rope.scaling.type"}


def _is_number(value: Any) -> bool:
    return value is None or isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value))


class Metadata:
    """The keys of one architecture, asked for without its name in front.

    Attributes:
      file: path of the file, for errors.
      vocab_size: rows of the token embedding.
      rope_factors: the tensor `rope_freqs.weight`, or None.

    Args:
      values: all keys of the file.
      tensors: names of its tensors, as the file has them.
      vocab_size: as above.
      rope_factors: as above.
      file: as above.
    """

    def __init__(
        self,
        values: Mapping[str, Any],
        tensors: Collection[str],
        vocab_size: int,
        rope_factors: np.ndarray | None,
        file: str,
    ):
        self.file, self.vocab_size, self.rope_factors = file, vocab_size, rope_factors
        self._values, self._tensors, self._asked = values, tensors, set[str]()
        self._prefix = f"{values[ARCHITECTURE]}."

    def get(self, name: str, default: Any = None) -> Any:
        """Returns a value; `default` where the file does not say it."""
        self._asked.add(name)
        value = self._values.get(self._prefix + name, default)
        if name not in _TEXTS and not all(map(_is_number, value if isinstance(value, list) else [value])):
            raise self._unsupported(name, "numbers belong here")
        return value

    def one(self, name: str, default: Any = None) -> Any:
        """Returns one number, `default` where the file says none; `ConfigError` where it says one for each layer."""
        value = self.get(name, default)
        if isinstance(value, list) and len(set(value)) == 1:
            return value[0]
        if isinstance(value, list):
            raise self._unsupported(name, "one number for all layers")
        return value

    def need(self, name: str) -> Any:
        """Returns one number; `ConfigError` where the file does not say it."""
        value = self.one(name)
        if value is None:
            raise ConfigError(
                f"the metadata of the file do not say {self._prefix + name!r}",
                where=self.file,
                fix="Convert the checkpoint again, or import its Hugging Face folder.",
            )
        if not value > 0:
            raise self._unsupported(name, "a number above 0 belongs here")
        return value

    def same(self, name: str, value: Any) -> None:
        """Raises `ConfigError` where the file says another value."""
        if self.get(name, value) != value:
            raise self._unsupported(name, f"supported: {value!r}")

    def has_tensor(self, name: str) -> bool:
        """Returns whether the file has a tensor of this name."""
        return name in self._tensors

    def check_all_read(self) -> None:
        """Raises `ConfigError` about a key of the architecture that has not been asked for."""
        for key in self._values:
            name = key.removeprefix(self._prefix)
            if key.startswith(self._prefix) and name not in self._asked | _HARMLESS:
                raise self._unsupported(name, "the key has no meaning here")

    def _unsupported(self, name: str, why: str) -> ConfigError:
        key = self._prefix + name
        return ConfigError(
            f"the file says {key} = {shown(self._values[key])}, which this network cannot do ({why})",
            where=self.file,
            fix="Use a checkpoint without it, or import the Hugging Face folder.",
        )
