"""Target windows: which tokens follow a target, and whether they are noised and scored.

A filler that is noised and scored teaches the model where targets end, so it is the length model (`PadFilled`: arXiv
2401.17181). Comparison of the windows: docs/length.md.
"""

import dataclasses
from typing import ClassVar, Protocol

import numpy as np

from diffusion_lm.core.checks import check_non_negative
from diffusion_lm.core.errors import require
from diffusion_lm.core.special import SpecialTokens


class TargetWindow(Protocol):
    """Maps the tokens of a target to the slots that a model generates."""

    @property
    def filler(self) -> str | None:
        """The scored filler after a target, "pad" or "eos"; None if there is none."""
        ...

    @property
    def oracle(self) -> str | None:
        """What prompts reveal of the reference ("length"), or None. Results on such prompts are labelled with it."""
        ...

    def slots(self, lengths: np.ndarray, capacity: int) -> np.ndarray:
        """Returns i64[n], the slots of targets of `lengths` tokens (i64[n]) in a window of at most `capacity`."""
        ...

    def room(self, capacity: int) -> int:
        """Returns the length, in tokens, of the longest target that fits `capacity` slots."""
        ...

    def fill(self, targets: np.ndarray, specials: SpecialTokens, capacity: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns tokens i32[w] and loss weights f32[w]; a target that does not fit is truncated on the right."""
        ...

    def prompt_slots(self, capacity: int, length: int) -> int:
        """Returns the number of slots that a sampler fills; only an oracle uses `length`, that of the reference."""
        ...


@dataclasses.dataclass(frozen=True)
class ExactTokens:
    """Only the tokens of the target: for chunks of documents, which need not end with the row."""

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
    """The target, then EOS, all scored. The window of autoregressive models."""

    filler: ClassVar[str | None] = None
    oracle: ClassVar[str | None] = None

    def slots(self, lengths: np.ndarray, capacity: int) -> np.ndarray:
        """Returns the lengths including EOS, at most `capacity`."""
        return np.minimum(lengths + 1, capacity)

    def room(self, capacity: int) -> int:
        """Returns `capacity` minus one slot for EOS."""
        return capacity - 1

    def fill(self, targets: np.ndarray, specials: SpecialTokens, capacity: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the target and EOS, all scored; a truncated target gets no EOS, because it does not end there."""
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
      window: number of slots; None = the converter's `target_length`.
    """

    window: int | None = None
    filler: ClassVar[str | None] = "pad"
    oracle: ClassVar[str | None] = None

    def __post_init__(self):
        require(
            self.window is None or self.window > 0,
            f"window={self.window}: must be > 0",
            where=f"{type(self).__name__}.window",
            fix="Give the number of slots, or None for the converter's target_length.",
        )

    def slots(self, lengths: np.ndarray, capacity: int) -> np.ndarray:
        """Returns the size of the window for every target."""
        return np.full_like(lengths, self._size(capacity))

    def room(self, capacity: int) -> int:
        """Returns the size of the window minus one slot for EOS."""
        return self._size(capacity) - 1

    def fill(self, targets: np.ndarray, specials: SpecialTokens, capacity: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the tokens of the whole window, all scored, including the filler."""
        window = self._size(capacity)
        tokens = np.full(window, self._filler(specials), np.int32)
        kept = np.append(targets, np.int32(specials.eos_id))[:window]
        tokens[: len(kept)] = kept
        return tokens, np.ones(window, np.float32)

    def prompt_slots(self, capacity: int, length: int) -> int:
        """Returns the size of the window."""
        del length
        return self._size(capacity)

    def _size(self, capacity: int) -> int:
        return capacity if self.window is None else min(self.window, capacity)

    def _filler(self, specials: SpecialTokens) -> int:
        return specials.pad_id


@dataclasses.dataclass(frozen=True)
class EosFilled(PadFilled):
    """The target, EOS to the end of the window, all noised and scored: LLaDA (arXiv 2502.09992), Dream (2508.15487).

    The first EOS ends the text; later ones are filler, which metrics per real token exclude. Models trained this way
    tend to short outputs, because EOS is the most confident token of a window (trap T32). Decode in blocks, or with
    `MaskedSampler.end = "defer"`.
    """

    filler: ClassVar[str | None] = "eos"

    def _filler(self, specials: SpecialTokens) -> int:
        return specials.eos_id


@dataclasses.dataclass(frozen=True)
class OracleLength:
    """The length of the reference, in training and in prompts: an upper bound for length models.

    Rows are those of `ExactEos`, or of `ExactTokens` with `closing = False`. Prompts have as many slots as the
    reference, so they need one, and results are labelled "oracle length".

    Attributes:
      closing: whether EOS follows the target and has a slot in the window.
      extra: additional slots of prompts; DiffuLLaMA (arXiv 2410.17891) uses 10 for TriviaQA.
    """

    closing: bool = True
    extra: int = 0
    filler: ClassVar[str | None] = None
    oracle: ClassVar[str | None] = "length"

    def __post_init__(self):
        check_non_negative(self.extra, "OracleLength.extra")

    @property
    def _exact(self) -> TargetWindow:
        return ExactEos() if self.closing else ExactTokens()

    def slots(self, lengths: np.ndarray, capacity: int) -> np.ndarray:
        """Returns the lengths, including EOS if `closing`, at most `capacity`."""
        return self._exact.slots(lengths, capacity)

    def room(self, capacity: int) -> int:
        """Returns `capacity`, minus one slot for EOS if `closing`."""
        return self._exact.room(capacity)

    def fill(self, targets: np.ndarray, specials: SpecialTokens, capacity: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the target, with EOS if `closing`, all scored."""
        return self._exact.fill(targets, specials, capacity)

    def prompt_slots(self, capacity: int, length: int) -> int:
        """Returns the slots of a target of `length` tokens; raises `ConfigError` without a reference."""
        require(
            length > 0,
            "OracleLength needs the length of a reference, and the prompt has none",
            where="DataPipeline.converter",
            fix="Decode a split of a task, or use another target window (docs/length.md).",
        )
        return min(length + int(self.closing) + self.extra, capacity)
