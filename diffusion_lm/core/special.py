"""The tokens with a meaning of their own."""

import dataclasses

from diffusion_lm.core.errors import require


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
