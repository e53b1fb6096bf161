"""From a piece of text to (inputs, targets), in numpy: prefix LM, span corruption, UL2's mixture, language modelling.

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
        """Returns the tokens of inputs and targets for pieces of i64[n] tokens.

        Without `fixed_split` only their sum counts, and it is the largest one.
        """
        ...

    def widest(self, piece_lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the most tokens that inputs and that targets may get, each by itself."""
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

    def widest(self, piece_lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns all tokens but one for either side; a piece of one token is a target."""
        most = np.maximum(piece_lengths - 1, 0)
        return most, np.maximum(most, np.minimum(piece_lengths, 1))

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

    def widest(self, piece_lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns `lengths`."""
        return self.lengths(piece_lengths)

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


@dataclasses.dataclass(frozen=True)
class RandomLength:
    """Cuts a share of the pieces to a length uniform in 1..n, then does what `part` does (LLaDA, arXiv 2502.09992).

    LLaDA sets 1 % of its pretraining rows to a random length, so that the network meets short texts too. The released
    code cuts a whole batch at a time; here each piece has its own draw, new in every epoch. What is cut off is lost.

    Attributes:
      part: the transform of the piece that is left.
      share: probability with which a piece is cut.
    """

    part: Pretraining = CausalLM()
    share: float = 0.01

    fixed_split = False

    def __post_init__(self):
        require(
            0 <= self.share <= 1,
            f"share = {self.share} is not a probability",
            where="RandomLength.share",
            fix="LLaDA uses 0.01.",
        )

    @property
    def needs_sentinels(self) -> bool:
        """Whether `part` does."""
        return self.part.needs_sentinels

    @property
    def target_window(self) -> TargetWindow:
        """That of `part`."""
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
        """Returns what `part` makes of the piece or of its beginning."""
        # A key of its own: `part` draws from the given one, and its split must not depend on whether a piece is cut.
        chosen, length = counted.uniform(counted.key("random_length", int(key[0])), 2)
        if chosen < self.share:
            piece = piece[: 1 + int(length * len(piece))]
        return self.part.split(piece, key, eos_id=eos_id, sentinel_ids=sentinel_ids)


MODES = ("R", "S", "X")


@dataclasses.dataclass(frozen=True)
class DenoiserMixture:
    """UL2's mixture of denoisers (arXiv 2205.05131, section 3.1): each piece is split by one of the parts.

    Regular denoising ("R": short spans, 15 %), sequential ("S": prefix LM) and extreme ("X": long spans or half of the
    text). The inputs open with the token of the part's mode: the last sentinel of the vocabulary for "R", the last but
    one for "S", the one before that for "X"; the release writes the strings [NLU], [S2S] and [NLG] there. Every target
    ends with EOS.

    The defaults are the seven denoisers of the paper (Table 1), at 40 % R, 40 % X and 20 % S (section 4.5). S splits at
    a uniform point, as T5's prefix LM and published code do; the paper's table has a quarter of the text as target.

    Attributes:
      parts: the denoisers.
      shares: the probability of each, up to a common factor.
      modes: "R", "S" or "X" for each, whose token it gets.
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
            f"{len(self.parts)} parts, {len(self.shares)} shares and {len(self.modes)} modes do not make a mixture",
            where="DenoiserMixture.parts",
            fix="Give every part one share and one mode.",
        )
        require(
            all(share >= 0 for share in self.shares) and sum(self.shares) > 0,
            f"shares = {self.shares}: no part can be drawn, or one has a negative share",
            where="DenoiserMixture.shares",
            fix="Give shares >= 0 with a positive sum.",
        )
        for mode in self.modes:
            require(
                mode in MODES,
                f"there is no mode {mode!r}",
                where="DenoiserMixture.modes",
                fix=f"Choose one of {', '.join(MODES)}.",
            )

    @property
    def target_window(self) -> TargetWindow:
        """The targets, then EOS, whatever the part."""
        return ExactEos()

    def lengths(self, piece_lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns those of the part that needs most, mode token included."""
        inputs, targets = (np.stack(side) for side in zip(*self._of_parts("lengths", piece_lengths), strict=True))
        most = np.argmax(inputs + targets, axis=0)[None]
        inputs, targets = (np.take_along_axis(side, most, axis=0)[0] for side in (inputs, targets))
        return inputs + 1, targets

    def widest(self, piece_lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the most tokens of either side over the parts, mode token included."""
        inputs, targets = zip(*self._of_parts("widest", piece_lengths), strict=True)
        return np.max(inputs, axis=0) + 1, np.max(targets, axis=0)

    def split(
        self, piece: np.ndarray, key: np.ndarray, *, eos_id: int, sentinel_ids: tuple[int, ...]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns the mode's token and what the drawn part makes of the piece, without an EOS at its end."""
        require(
            len(sentinel_ids) > len(MODES),
            f"{len(sentinel_ids)} sentinels leave none for spans after {len(MODES)} mode tokens",
            where="DenoiserMixture",
            fix="Build the vocabulary with more extra ids.",
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
    """Returns i64[segments] positive lengths that sum to `items`, uniform over all ways; `draws` is f64[items - 1]."""
    cuts = np.sort(np.argsort(draws)[: segments - 1]) + 1
    return np.diff(np.concatenate([[0], cuts, [items]]))
