"""Special tokens by role: PAD, EOS, BOS and MASK of the vocabulary of a run.

Every `Batch` carries the special tokens of its data, so objectives, samplers and estimators ask for a role
(`batch.special.mask`) and no configuration has to name an id.
"""

import dataclasses
from collections.abc import Iterator, Mapping

import jax

from diffusion_lm.core.errors import ConfigError, require


@dataclasses.dataclass(frozen=True)
class SpecialTokens:
    """The ids of the special tokens of one vocabulary.

    Attributes:
      vocab_size: number of tokens; ids from here on are padding rows of the embedding and are never emitted.
      pad_id: fills unused slots. In a scored target window it is also how diffusion models learn the length of a target
        (AR2Diff, arXiv 2401.17181).
      eos_id: ends a target; the one that the data writes.
      bos_id: the conditioning token at the start of every stream, from which the first target token is predicted.
        T5 vocabularies have none and start the decoder with `pad_id`.
      mask_id: the absorbing token of masked diffusion; None if the vocabulary has none.
      other_eos_ids: further ids that end a target when a model generates them, such as a chat template's end of turn.
    """

    vocab_size: int
    pad_id: int = 0
    eos_id: int = 1
    bos_id: int = 0
    mask_id: int | None = None
    other_eos_ids: tuple[int, ...] = ()

    def __post_init__(self):
        object.__setattr__(self, "other_eos_ids", tuple(self.other_eos_ids))
        named = [(name, getattr(self, name)) for name in ("pad_id", "eos_id", "bos_id", "mask_id")]
        for name, token in (*named, *(("other_eos_ids", token) for token in self.other_eos_ids)):
            require(
                token is None or 0 <= token < self.vocab_size,
                f"{name}={token}: not an id of a vocabulary of {self.vocab_size} tokens",
                where=f"SpecialTokens.{name}",
                fix=f"Use an id from 0 to {self.vocab_size - 1}.",
            )

    @property
    def mask(self) -> int:
        """The id of MASK.

        Raises:
          ConfigError: the vocabulary has no MASK token.
        """
        if self.mask_id is None:
            raise ConfigError(
                "the vocabulary of the data has no MASK token, which masked noise needs",
                where="SpecialTokens.mask_id",
                fix="Materialise the data with a vocabulary that has one, or use uniform noise.",
            )
        return self.mask_id

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The ids that end a generated target: every EOS, and PAD."""
        return tuple(dict.fromkeys((self.eos_id, *self.other_eos_ids, self.pad_id)))

    def is_eos(self, tokens: jax.Array) -> jax.Array:
        """Returns a bool array in the shape of `tokens`, True at every EOS."""
        found = tokens == self.eos_id
        for token in self.other_eos_ids:
            found |= tokens == token
        return found

    def is_end(self, tokens: jax.Array) -> jax.Array:
        """Returns a bool array in the shape of `tokens`, True at every EOS and PAD."""
        return self.is_eos(tokens) | (tokens == self.pad_id)

    def check(self, part: object) -> None:
        """Checks that the ids configured in an objective or sampler, and in its nested dataclasses, are these tokens.

        It compares the fields `pad_id`, `eos_id` and `mask_id`; None is not compared.

        Raises:
          ConfigError: an id differs, so the object would treat a special token as text, or text as a special token.
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
                f"{wrong[0][0]}={wrong[0][1]}: the vocabulary of the data has {wrong[0][2]}",
                where=type(part).__name__,
                fix=f"Bind {', '.join(f'{name} = {token}' for name, _, token in wrong)}.",
            )


def _dataclasses(value: object) -> Iterator[object]:
    """Yields every dataclass instance in `value`, including itself."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield value
        value = [getattr(value, field.name) for field in dataclasses.fields(value)]
    for item in value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ():
        yield from _dataclasses(item)
