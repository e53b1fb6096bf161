"""The settings of a draw, shared by all samplers."""

import dataclasses
from typing import Literal

from diffusion_lm.core.checks import check_non_negative
from diffusion_lm.core.errors import ConfigError, require
from diffusion_lm.core.special import SpecialTokens

Role = Literal["eos", "pad"]
ROLES: tuple[Role, ...] = ("eos", "pad")


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How a token is drawn from the network's logits: temperature, then top-k, then top-p (`nn.sampling`).

    MASK is never drawn where the vocabulary has it: clean text does not contain MASK (SUBS, arXiv 2406.07524).

    Attributes:
      temperature: 0 takes the most likely token.
      top_k: draws among the k most likely tokens; 0 = all.
      top_p: draws from the smallest set of most likely tokens whose probabilities sum to at least p.
      forbidden: further tokens that are never drawn: the roles "eos" (every EOS of the vocabulary) and "pad", or ids.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    forbidden: tuple[Role | int, ...] = ()

    def __post_init__(self):
        object.__setattr__(self, "forbidden", tuple(self.forbidden))
        check_non_negative(self.temperature, "Decoding.temperature", "0.0 takes the most likely token.")
        require(
            self.top_k >= 0 and int(self.top_k) == self.top_k,
            f"top_k={self.top_k}: must be an integer >= 0",
            where="Decoding.top_k",
            fix="0 keeps all tokens.",
        )
        require(
            0 < self.top_p <= 1,
            f"top_p={self.top_p}: must be in (0, 1]",
            where="Decoding.top_p",
            fix="1.0 keeps all tokens.",
        )
        for token in self.forbidden:
            require(
                token in ROLES or (type(token) is int and token >= 0),
                f"forbidden={self.forbidden!r}: {token!r} is neither a role nor an id",
                where="Decoding.forbidden",
                fix="Use 'eos', 'pad', or ids of the vocabulary.",
            )

    @property
    def is_plain(self) -> bool:
        """Whether tokens are drawn from the network's own distribution."""
        return self.temperature == 1 and self.top_k == 0 and self.top_p == 1

    def without_ends(self) -> "Decoding":
        """Returns the settings that never draw EOS or PAD, so that a window is always filled."""
        return dataclasses.replace(self, forbidden=tuple(dict.fromkeys((*self.forbidden, *ROLES))))

    def never_drawn(self, special: SpecialTokens) -> tuple[int, ...]:
        """Returns the ids with probability 0 in this vocabulary: MASK and `forbidden` (traps T35, T47).

        Raises:
          ConfigError: an id of `forbidden` is not in the vocabulary.
        """
        ids: list[int] = []
        for token in self.forbidden:
            if token == "eos":
                ids += [special.eos_id, *special.other_eos_ids]
            elif token == "pad":
                ids.append(special.pad_id)
            elif token < special.vocab_size:
                ids.append(token)
            else:
                raise ConfigError(
                    f"forbidden={self.forbidden!r}: the vocabulary of the data has {special.vocab_size} tokens",
                    where="Decoding.forbidden",
                    fix=f"Use ids below {special.vocab_size}.",
                )
        mask = () if special.mask_id is None else (special.mask_id,)
        return tuple(dict.fromkeys((*ids, *mask)))
