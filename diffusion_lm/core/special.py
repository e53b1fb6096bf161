"""The tokens with a meaning of their own."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from diffusion_lm.core.errors import ConfigError, require


@dataclasses.dataclass(frozen=True)
class SpecialTokens:
    """Ids of the special tokens of one vocabulary.

    Attributes:
      vocab_size: number of real tokens; ids from here on are padding rows of the embedding and are never emitted.
      pad_id: fills what no example uses. In a scored target window it is also how diffusion models learn length
        (AR2Diff, arXiv 2401.17181).
      eos_id: ends a target.
      bos_id: opens every stream as a conditioning token, so that the first target token is predicted from something.
        T5 vocabularies have none and open the decoder with `pad_id`.
      mask_id: the absorbing token of masked diffusion; None where the vocabulary has none.
    """

    vocab_size: int
    pad_id: int = 0
    eos_id: int = 1
    bos_id: int = 0
    mask_id: int | None = None

    def __post_init__(self):
        for name in ("pad_id", "eos_id", "bos_id", "mask_id"):
            token = getattr(self, name)
            require(
                token is None or 0 <= token < self.vocab_size,
                f"{name} = {token} lies outside a vocabulary of {self.vocab_size} tokens",
                where=f"SpecialTokens.{name}",
                fix="Give an id of the vocabulary.",
            )

    def check(self, part: Any) -> None:
        """Checks that an objective or sampler, and all that it is made of, means these tokens by its ids.

        Its fields `pad_id`, `eos_id` and `mask_id` are looked at; None means none.

        Raises:
          ConfigError: one of them is another token here: the part would take it for text, or text for it.
        """
        wrong = []
        for holder in _dataclasses(part):
            for name in ("pad_id", "eos_id", "mask_id"):
                value, token = getattr(holder, name, None), getattr(self, name)
                if value is not None and token is not None and value != token:
                    wrong.append((f"{type(holder).__name__}.{name}", value, token))
        if wrong:
            wrong = list(dict.fromkeys(wrong))
            raise ConfigError(
                f"{wrong[0][0]} is {wrong[0][1]}, and the vocabulary of the data has {wrong[0][2]}",
                where=type(part).__name__,
                fix=f"Bind {', '.join(f'{name} = {token}' for name, _, token in wrong)}.",
            )


def _dataclasses(value: Any) -> Iterator[Any]:
    """Yields every dataclass instance in `value`, itself included."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield value
        value = [getattr(value, field.name) for field in dataclasses.fields(value)]
    for item in value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ():
        yield from _dataclasses(item)
