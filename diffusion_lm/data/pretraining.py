"""From a piece of text to (inputs, targets): prefix LM, span corruption and plain language modelling, in numpy.

A transform is keyed by (seed, epoch, example id): every epoch splits a text anew, and a resumed run splits it alike.
"""

import dataclasses
from typing import Protocol

import numpy as np

from diffusion_lm.core.errors import ConfigError, require
from diffusion_lm.data import counted
from diffusion_lm.data.target_window import ExactEos, ExactTokens, TargetWindow


class Pretraining(Protocol):
    """A transform of pretraining records, which have targets only.

    Attributes:
      needs_sentinels: whether it needs a vocabulary with sentinels.
      fixed_split: whether the lengths of inputs and targets follow from the length of the piece alone.
    """

    needs_sentinels: bool
    fixed_split: bool

    @property
    def target_window(self) -> TargetWindow:
        """What stands behind the targets; it replaces the converter's rule, because the piece itself fills the row."""
        ...

    def lengths(self, piece_lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the tokens of inputs and targets for pieces of i64[n] tokens; without `fixed_split`, their sum."""
        ...

    def split(
        self, piece: np.ndarray, key: np.ndarray, *, eos_id: int, sentinel_ids: tuple[int, ...]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns inputs and targets, i32[...] each, of a piece i32[n] under a key of `counted.key`."""
        ...


@dataclasses.dataclass(frozen=True)
class CausalLM:
    """Everything is target: language modelling from BOS on."""

    needs_sentinels = False
    fixed_split = True

    @property
    def target_window(self) -> TargetWindow:
        """Exactly the tokens of the piece."""
        return ExactTokens()

    def lengths(self, piece_lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns no inputs, and targets as long as the pieces."""
        return np.zeros_like(piece_lengths), piece_lengths

    def split(
        self, piece: np.ndarray, key: np.ndarray, *, eos_id: int, sentinel_ids: tuple[int, ...]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns empty inputs, and the piece as targets."""
        del key, eos_id, sentinel_ids
        return piece[:0], piece


@dataclasses.dataclass(frozen=True)
class PrefixSplit:
    """Prefix LM (T5, `random_prefix_noise_mask`): inputs up to a point uniform over 1..n-1, then targets."""

    needs_sentinels = False
    fixed_split = False

    @property
    def target_window(self) -> TargetWindow:
        """Exactly the tokens of the piece."""
        return ExactTokens()

    def lengths(self, piece_lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns lengths with the right sum; where the split falls differs from epoch to epoch."""
        return np.zeros_like(piece_lengths), piece_lengths

    def split(
        self, piece: np.ndarray, key: np.ndarray, *, eos_id: int, sentinel_ids: tuple[int, ...]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns the two parts of the piece; neither is empty when the piece has two tokens."""
        del eos_id, sentinel_ids
        point = 1 + int(counted.uniform(key, 1)[0] * (len(piece) - 1)) if len(piece) > 1 else 0
        return piece[:point], piece[point:]


@dataclasses.dataclass(frozen=True)
class SpanCorruption:
    """Span corruption as T5's code does it: spans of the text are replaced by sentinels and become the target.

    Counts are exact: round(density n) noise tokens in round(noise / mean) spans, both kinds of span by random
    segmentation, a text span first. Targets are sentinel, span, sentinel, span, ..., EOS, without a last sentinel
    (512 tokens of inputs with EOS come from pieces of 568 and make 114 target tokens with EOS).

    Attributes:
      noise_density: part of the tokens that is removed.
      mean_span_length: mean length of a removed span.
    """

    noise_density: float = 0.15
    mean_span_length: float = 3.0

    needs_sentinels = True
    fixed_split = True

    def __post_init__(self):
        require(
            0 < self.noise_density < 1,
            f"noise_density = {self.noise_density} is not between 0 and 1",
            where="SpanCorruption.noise_density",
            fix="T5 uses 0.15.",
        )
        require(
            self.mean_span_length >= 1,
            f"mean_span_length = {self.mean_span_length} is below 1",
            where="SpanCorruption.mean_span_length",
            fix="T5 uses 3.0.",
        )

    @property
    def target_window(self) -> TargetWindow:
        """The targets, then EOS."""
        return ExactEos()

    def counts(self, piece_lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the noise tokens and the noise spans of pieces of i64[n] tokens."""
        lengths = np.asarray(piece_lengths, np.int64)
        noise = np.clip(np.round(lengths * self.noise_density).astype(np.int64), 1, np.maximum(lengths - 1, 1))
        spans = np.maximum(np.round(noise / self.mean_span_length).astype(np.int64), 1)
        spans = np.minimum(spans, np.minimum(noise, lengths - noise))
        short = lengths < 2
        return np.where(short, 0, noise), np.where(short, 0, spans)

    def lengths(self, piece_lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the exact lengths, without EOS."""
        noise, spans = self.counts(piece_lengths)
        return piece_lengths - noise + spans, noise + spans

    def split(
        self, piece: np.ndarray, key: np.ndarray, *, eos_id: int, sentinel_ids: tuple[int, ...]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns the text with sentinels for spans, and the spans; an EOS at the end of the piece is left out."""
        if len(piece) and piece[-1] == eos_id:
            piece = piece[:-1]
        noise, spans = (int(count) for count in self.counts(np.asarray(len(piece))))
        if spans == 0:
            return piece, piece[:0]
        if spans > len(sentinel_ids):
            raise ConfigError(
                f"a piece of {len(piece)} tokens has {spans} noise spans, the vocabulary {len(sentinel_ids)} sentinels",
                where="SpanCorruption",
                fix="Materialise with a shorter chunk_length, or raise mean_span_length.",
            )
        draws = counted.uniform(key, len(piece))
        noise_lengths = _segments(noise, spans, draws[: noise - 1])
        text_lengths = _segments(len(piece) - noise, spans, draws[noise - 1 : len(piece) - 2])
        inputs: list[np.ndarray] = []
        targets: list[np.ndarray] = []
        cursor = 0
        for sentinel, text, removed in zip(sentinel_ids, text_lengths, noise_lengths, strict=False):
            mark = np.array([sentinel], np.int32)
            inputs += [piece[cursor : cursor + text], mark]
            targets += [mark, piece[cursor + text : cursor + text + removed]]
            cursor += text + removed
        return np.concatenate(inputs), np.concatenate(targets)


def _segments(items: int, segments: int, draws: np.ndarray) -> np.ndarray:
    """Returns i64[segments] positive lengths that sum to `items`, uniform over all ways; `draws` is f64[items - 1]."""
    cuts = np.sort(np.argsort(draws)[: segments - 1]) + 1
    return np.diff(np.concatenate([[0], cuts, [items]]))
