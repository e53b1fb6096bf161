"""How a model learns where a target ends: what stands behind the target's tokens, and whether it is scored.

Whichever filler is noised and scored is the length model (papers: arXiv 2401.17181 for `PadFilled`).
"""

import dataclasses
from typing import ClassVar, Protocol

import numpy as np

from diffusion_lm.core.errors import require
from diffusion_lm.core.special import SpecialTokens


class TargetWindow(Protocol):
    """A rule that turns the tokens of a target into the slots that a model generates (`docs/length.md`)."""

    @property
    def filler(self) -> str | None:
        """What fills the window after a target and is scored, "pad" or "eos"; None where nothing is."""
        ...

    @property
    def oracle(self) -> str | None:
        """What prompts give away of the reference ("length"), or None; every result of such prompts says so."""
        ...

    def slots(self, lengths: np.ndarray, capacity: int) -> np.ndarray:
        """Returns how many slots targets of `lengths` (i64[n], tokens) take when at most `capacity` are there."""
        ...

    def room(self, capacity: int) -> int:
        """Returns the longest target, in tokens, that `capacity` slots hold whole."""
        ...

    def fill(self, targets: np.ndarray, specials: SpecialTokens, capacity: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns tokens i32[w] and loss weights f32[w]; targets that do not fit are cut at their end, EOS first."""
        ...

    def prompt_slots(self, capacity: int, length: int) -> int:
        """Returns how many slots a sampler fills; only an oracle looks at the reference's `length` in tokens."""
        ...


@dataclasses.dataclass(frozen=True)
class ExactTokens:
    """The target's own tokens and nothing else: pieces of documents, which do not end where the row does."""

    filler: ClassVar[str | None] = None
    oracle: ClassVar[str | None] = None

    def slots(self, lengths: np.ndarray, capacity: int) -> np.ndarray:
        """Returns the lengths, at most `capacity`."""
        return np.minimum(lengths, capacity)

    def room(self, capacity: int) -> int:
        """Returns `capacity`."""
        return capacity

    def fill(self, targets: np.ndarray, specials: SpecialTokens, capacity: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the first `capacity` target tokens, all scored."""
        del specials
        tokens = targets[:capacity]
        return tokens, np.ones(len(tokens), np.float32)

    def prompt_slots(self, capacity: int, length: int) -> int:
        """Returns `capacity`."""
        del length
        return capacity


@dataclasses.dataclass(frozen=True)
class ExactEos:
    """The target, then EOS, all scored; nothing behind it. The window of autoregressive models."""

    filler: ClassVar[str | None] = None
    oracle: ClassVar[str | None] = None

    def slots(self, lengths: np.ndarray, capacity: int) -> np.ndarray:
        """Returns the lengths with EOS, at most `capacity`."""
        return np.minimum(lengths + 1, capacity)

    def room(self, capacity: int) -> int:
        """Returns `capacity` less the slot of EOS."""
        return capacity - 1

    def fill(self, targets: np.ndarray, specials: SpecialTokens, capacity: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the target and EOS, all scored; a target that is cut loses its EOS, because it does not end there."""
        tokens = np.append(targets, np.int32(specials.eos_id))[:capacity]
        return tokens, np.ones(len(tokens), np.float32)

    def prompt_slots(self, capacity: int, length: int) -> int:
        """Returns `capacity`: the sampler stops at EOS."""
        del length
        return capacity


@dataclasses.dataclass(frozen=True)
class PadFilled:
    """The target, EOS, then PAD to the end of the window, all noised and scored: AR2Diff, arXiv 2401.17181.

    Attributes:
      window: slots of the window; None = the converter's `target_length`.
    """

    window: int | None = None
    filler: ClassVar[str | None] = "pad"
    oracle: ClassVar[str | None] = None

    def __post_init__(self):
        require(
            self.window is None or self.window > 0,
            f"window = {self.window} is not positive",
            where=f"{type(self).__name__}.window",
            fix="Give the number of slots, or None for the converter's target_length.",
        )

    def slots(self, lengths: np.ndarray, capacity: int) -> np.ndarray:
        """Returns the window's size for every target."""
        return np.full_like(lengths, self._size(capacity))

    def room(self, capacity: int) -> int:
        """Returns the window's size less the slot of EOS."""
        return self._size(capacity) - 1

    def fill(self, targets: np.ndarray, specials: SpecialTokens, capacity: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the window's tokens, all scored, the filler included."""
        window = self._size(capacity)
        tokens = np.full(window, self._filler(specials), np.int32)
        kept = np.append(targets, np.int32(specials.eos_id))[:window]
        tokens[: len(kept)] = kept
        return tokens, np.ones(window, np.float32)

    def prompt_slots(self, capacity: int, length: int) -> int:
        """Returns the window's size."""
        del length
        return self._size(capacity)

    def _size(self, capacity: int) -> int:
        return capacity if self.window is None else min(self.window, capacity)

    def _filler(self, specials: SpecialTokens) -> int:
        return specials.pad_id


@dataclasses.dataclass(frozen=True)
class EosFilled(PadFilled):
    """The target, EOS to the end of the window, all noised and scored: LLaDA (arXiv 2502.09992), Dream (2508.15487).

    The first EOS ends the text; those behind it are filler, which reports per real token leave out. A model that is
    trained so prefers short texts, since EOS is the surest token of a window (trap T32): decode in blocks, or with
    `MaskedSampler.end = "defer"`.
    """

    filler: ClassVar[str | None] = "eos"

    def _filler(self, specials: SpecialTokens) -> int:
        return specials.eos_id


@dataclasses.dataclass(frozen=True)
class OracleLength:
    """The target's own length, in training and for the sampler too: what a perfect length model would give.

    Rows are those of `ExactEos`, or of `ExactTokens` where nothing closes the target. Prompts have as many slots as
    their reference has, so they cannot be made without one, and results carry the words "oracle length".

    Attributes:
      closing: EOS stands behind the target, and the window has a slot for it.
      extra: slots of a prompt beyond those; DiffuLLaMA's (arXiv 2410.17891) TriviaQA gives ten.
    """

    closing: bool = True
    extra: int = 0
    filler: ClassVar[str | None] = None
    oracle: ClassVar[str | None] = "length"

    def __post_init__(self):
        require(self.extra >= 0, f"extra = {self.extra}", where="OracleLength.extra", fix="Use 0 or more.")

    @property
    def _exact(self) -> TargetWindow:
        return ExactEos() if self.closing else ExactTokens()

    def slots(self, lengths: np.ndarray, capacity: int) -> np.ndarray:
        """Returns the lengths with EOS, at most `capacity`."""
        return self._exact.slots(lengths, capacity)

    def room(self, capacity: int) -> int:
        """Returns `capacity` less the slot of EOS."""
        return self._exact.room(capacity)

    def fill(self, targets: np.ndarray, specials: SpecialTokens, capacity: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the target and EOS, all scored."""
        return self._exact.fill(targets, specials, capacity)

    def prompt_slots(self, capacity: int, length: int) -> int:
        """Returns the slots of a target of `length` tokens; raises `ConfigError` where there is no reference."""
        require(
            length > 0,
            "an oracle's window needs the reference, and a prompt has none",
            where="OracleLength",
            fix="Decode a split of a task, or another target window (docs/length.md).",
        )
        return min(length + int(self.closing) + self.extra, capacity)
