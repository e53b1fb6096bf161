"""Splits chunks of text into (inputs, targets), in NumPy: causal LM, prefix LM, span corruption, UL2's mixture.

Random splits are keyed by (seed, epoch, example id). Every epoch splits a chunk differently, and a resumed run repeats
the same splits.
"""

import dataclasses
from typing import Protocol

import numpy as np

from diffusion_lm.core.checks import check_choice, check_probability
from diffusion_lm.core.errors import ConfigError, require
from diffusion_lm.data import counted
from diffusion_lm.data.target_window import ExactEos, ExactTokens, TargetWindow


class Pretraining(Protocol):
    """A transform of pretraining records, which have only targets. A `piece` is one such record (a chunk of text).

    Attributes:
      needs_sentinels: whether the vocabulary must have sentinels.
      fixed_split: whether the lengths of inputs and targets are a function of the length of the piece.
    """

    needs_sentinels: bool
    fixed_split: bool

    @property
    def target_window(self) -> TargetWindow:
        """The window of the targets; it replaces the converter's, because a piece fills the row."""
        ...

    def lengths(self, piece_lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the lengths of inputs and targets, i64[n] each, for pieces of i64[n] tokens.

        Without `fixed_split`, only their sum is meaningful; it is the maximum over all splits.
        """
        ...

    def widest(self, piece_lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the maximum length of inputs and that of targets, i64[n] each, over all splits."""
        ...

    def split(
        self, piece: np.ndarray, key: np.ndarray, *, eos_id: int, sentinel_ids: tuple[int, ...]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns inputs and targets of a piece i32[n], for a key from `counted.key`."""
        ...


@dataclasses.dataclass(frozen=True)
class CausalLM:
    """Language modelling: the whole piece is the target, conditioned on BOS."""

    needs_sentinels = False
    fixed_split = True

    @property
    def target_window(self) -> TargetWindow:
        """Exactly the tokens of the piece."""
        return ExactTokens()

    def lengths(self, piece_lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns zeros and the lengths of the pieces."""
        return np.zeros_like(piece_lengths), piece_lengths

    def widest(self, piece_lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns `lengths`."""
        return self.lengths(piece_lengths)

    def split(
        self, piece: np.ndarray, key: np.ndarray, *, eos_id: int, sentinel_ids: tuple[int, ...]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns empty inputs, and the piece as targets."""
        del key, eos_id, sentinel_ids
        return piece[:0], piece


@dataclasses.dataclass(frozen=True)
class PrefixSplit:
    """Prefix LM (T5, `random_prefix_noise_mask`): the split point is uniform over 1..n-1."""

    needs_sentinels = False
    fixed_split = False

    @property
    def target_window(self) -> TargetWindow:
        """Exactly the tokens of the piece."""
        return ExactTokens()

    def lengths(self, piece_lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns lengths with the right sum; the split point differs between epochs."""
        return np.zeros_like(piece_lengths), piece_lengths

    def widest(self, piece_lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns all tokens but one for each side; a piece of one token is all target."""
        most = np.maximum(piece_lengths - 1, 0)
        return most, np.maximum(most, np.minimum(piece_lengths, 1))

    def split(
        self, piece: np.ndarray, key: np.ndarray, *, eos_id: int, sentinel_ids: tuple[int, ...]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns the two parts of the piece; neither is empty if the piece has at least two tokens."""
        del eos_id, sentinel_ids
        point = 1 + int(counted.uniform(key, 1)[0] * (len(piece) - 1)) if len(piece) > 1 else 0
        return piece[:point], piece[point:]


@dataclasses.dataclass(frozen=True)
class SpanCorruption:
    """Span corruption as in T5's code: spans of the text are replaced by sentinels and become the target.

    Counts are exact: round(density n) noise tokens in round(noise / mean) spans. Noise spans and text spans alternate,
    a text span first; the lengths of both are random segmentations. Targets are sentinel, span, sentinel, span, ...,
    EOS, without a final sentinel. For example, a piece of 568 tokens gives 512 input tokens and 114 target tokens, EOS
    included in both.

    Attributes:
      noise_density: fraction of tokens to remove.
      mean_span_length: mean length of a removed span, in tokens.
    """

    noise_density: float = 0.15
    mean_span_length: float = 3.0

    needs_sentinels = True
    fixed_split = True

    def __post_init__(self):
        require(
            0 < self.noise_density < 1,
            f"noise_density={self.noise_density}: must be in (0, 1)",
            where="SpanCorruption.noise_density",
            fix="T5 uses 0.15.",
        )
        require(
            self.mean_span_length >= 1,
            f"mean_span_length={self.mean_span_length}: must be >= 1",
            where="SpanCorruption.mean_span_length",
            fix="T5 uses 3.0.",
        )

    @property
    def target_window(self) -> TargetWindow:
        """The targets, then EOS."""
        return ExactEos()

    def counts(self, piece_lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the number of noise tokens and of noise spans, i64[n] each, for pieces of i64[n] tokens."""
        lengths = np.asarray(piece_lengths, np.int64)
        noise = np.clip(np.round(lengths * self.noise_density).astype(np.int64), 1, np.maximum(lengths - 1, 1))
        spans = np.maximum(np.round(noise / self.mean_span_length).astype(np.int64), 1)
        # Every noise span and every text span has at least one token.
        spans = np.minimum(spans, np.minimum(noise, lengths - noise))
        short = lengths < 2
        return np.where(short, 0, noise), np.where(short, 0, spans)

    def lengths(self, piece_lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the exact lengths, not counting EOS."""
        noise, spans = self.counts(piece_lengths)
        return piece_lengths - noise + spans, noise + spans

    def widest(self, piece_lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns `lengths`."""
        return self.lengths(piece_lengths)

    def split(
        self, piece: np.ndarray, key: np.ndarray, *, eos_id: int, sentinel_ids: tuple[int, ...]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns the text with sentinels in place of spans, and the spans; a final EOS of the piece is dropped."""
        if len(piece) and piece[-1] == eos_id:
            piece = piece[:-1]
        noise, spans = (int(count) for count in self.counts(np.asarray(len(piece))))
        if spans == 0:
            return piece, piece[:0]
        if spans > len(sentinel_ids):
            raise ConfigError(
                f"a chunk of {len(piece)} tokens has {spans} noise spans, but there are {len(sentinel_ids)} sentinels",
                where="SpanCorruption.mean_span_length",
                fix="Increase it, or materialise with a smaller chunk_length.",
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


@dataclasses.dataclass(frozen=True)
class RandomLength:
    """Truncates a share of the pieces to a length uniform in 1..n, then applies `part` (LLaDA, arXiv 2502.09992).

    LLaDA sets 1 % of its pretraining rows to a random length, so that the network also sees short texts. The released
    code truncates a whole batch at a time; here each piece is drawn separately in every epoch. The rest of a truncated
    piece is dropped.

    Attributes:
      part: transform of the remaining piece.
      share: probability of truncating a piece.
    """

    part: Pretraining = CausalLM()
    share: float = 0.01

    fixed_split = False

    def __post_init__(self):
        check_probability(self.share, "RandomLength.share", fix="LLaDA uses 0.01.")

    @property
    def needs_sentinels(self) -> bool:
        """Whether `part` needs sentinels."""
        return self.part.needs_sentinels

    @property
    def target_window(self) -> TargetWindow:
        """The window of `part`."""
        return self.part.target_window

    def lengths(self, piece_lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns those of pieces that are not cut."""
        return self.part.lengths(piece_lengths)

    def widest(self, piece_lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns those of pieces that are not cut."""
        return self.part.widest(piece_lengths)

    def split(
        self, piece: np.ndarray, key: np.ndarray, *, eos_id: int, sentinel_ids: tuple[int, ...]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns the split of the piece, or of its beginning, by `part`."""
        # Uses a key different from that of `part`, so that the split is independent of the truncation.
        chosen, length = counted.uniform(counted.key("random_length", int(key[0])), 2)
        if chosen < self.share:
            piece = piece[: 1 + int(length * len(piece))]
        return self.part.split(piece, key, eos_id=eos_id, sentinel_ids=sentinel_ids)


MODES = ("R", "S", "X")


@dataclasses.dataclass(frozen=True)
class DenoiserMixture:
    """UL2's mixture of denoisers (arXiv 2205.05131, section 3.1): each piece is split by one randomly chosen part.

    Regular denoising ("R": short spans, 15 %), sequential ("S": prefix LM) and extreme ("X": long spans or half of the
    text). The inputs begin with a mode token: the last sentinel of the vocabulary for "R", the second to last for "S",
    the third to last for "X". The released models use the strings [NLU], [S2S] and [NLG] instead. Every target ends
    with EOS.

    The defaults are the seven denoisers of the paper (Table 1), at 40 % R, 40 % X and 20 % S (section 4.5). S splits at
    a uniform point, as T5's prefix LM and published code do; in the paper's table a quarter of the text is the target.

    Attributes:
      parts: the denoisers.
      shares: probability of each, up to a common factor.
      modes: mode token of each: "R", "S" or "X".
    """

    parts: tuple[Pretraining, ...] = (
        SpanCorruption(0.15, 3.0),
        SpanCorruption(0.15, 8.0),
        PrefixSplit(),
        SpanCorruption(0.5, 3.0),
        SpanCorruption(0.5, 8.0),
        SpanCorruption(0.15, 64.0),
        SpanCorruption(0.5, 64.0),
    )
    shares: tuple[float, ...] = (0.2, 0.2, 0.2, 0.1, 0.1, 0.1, 0.1)
    modes: tuple[str, ...] = ("R", "R", "S", "X", "X", "X", "X")

    needs_sentinels = True
    fixed_split = False

    def __post_init__(self):
        for field in ("parts", "shares", "modes"):
            object.__setattr__(self, field, tuple(getattr(self, field)))
        require(
            len(self.parts) == len(self.shares) == len(self.modes),
            f"{len(self.parts)} parts, {len(self.shares)} shares, {len(self.modes)} modes: must be equally many",
            where="DenoiserMixture.parts",
            fix="Give one share and one mode per part.",
        )
        require(
            all(share >= 0 for share in self.shares) and sum(self.shares) > 0,
            f"shares={self.shares}: must be >= 0 with a positive sum",
            where="DenoiserMixture.shares",
            fix="Give one probability per part, up to a common factor.",
        )
        for mode in self.modes:
            check_choice(mode, MODES, "DenoiserMixture.modes")

    @property
    def target_window(self) -> TargetWindow:
        """The targets, then EOS, for every part."""
        return ExactEos()

    def lengths(self, piece_lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the lengths of the part with the largest sum, including the mode token."""
        inputs, targets = (np.stack(side) for side in zip(*self._of_parts("lengths", piece_lengths), strict=True))
        most = np.argmax(inputs + targets, axis=0)[None]
        inputs, targets = (np.take_along_axis(side, most, axis=0)[0] for side in (inputs, targets))
        return inputs + 1, targets

    def widest(self, piece_lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the maximum length of each side over the parts, including the mode token."""
        inputs, targets = zip(*self._of_parts("widest", piece_lengths), strict=True)
        return np.max(inputs, axis=0) + 1, np.max(targets, axis=0)

    def split(
        self, piece: np.ndarray, key: np.ndarray, *, eos_id: int, sentinel_ids: tuple[int, ...]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns [mode token, inputs] and targets of a randomly chosen part; a final EOS of the piece is dropped."""
        require(
            len(sentinel_ids) > len(MODES),
            f"{len(sentinel_ids)} sentinels in the vocabulary: need more than {len(MODES)}, one for each mode",
            where="DenoiserMixture",
            fix="Use a vocabulary with more extra ids.",
        )
        if len(piece) and piece[-1] == eos_id:
            piece = piece[:-1]
        draw = counted.uniform(counted.key("denoiser", int(key[0])), 1)[0]
        number = int(np.searchsorted(np.cumsum(self.shares), draw * sum(self.shares), side="right"))
        mode = sentinel_ids[-1 - MODES.index(self.modes[number])]
        spans = sentinel_ids[: -len(MODES)]
        inputs, targets = self.parts[number].split(piece, key, eos_id=eos_id, sentinel_ids=spans)
        return np.concatenate([np.array([mode], np.int32), inputs]), targets

    def _of_parts(self, method: str, piece_lengths: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        lengths = np.asarray(piece_lengths)
        return [getattr(part, method)(lengths) for part in self.parts]


def _segments(items: int, segments: int, draws: np.ndarray) -> np.ndarray:
    """Returns i64[segments], positive and with sum `items`, uniform over all such; `draws` is f64[items - 1]."""
    cuts = np.sort(np.argsort(draws)[: segments - 1]) + 1
    return np.diff(np.concatenate([[0], cuts, [items]]))
