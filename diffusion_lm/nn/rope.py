"""The frequencies of rotary positions (RoPE, arXiv 2104.09864) and how released models stretched them."""

import dataclasses
import math

import numpy as np

from diffusion_lm.core.errors import require


def base_frequencies(head_dim: int, theta: float) -> np.ndarray:
    """Returns f32[E/2]: the angle that each pair of a head turns by from one position to the next."""
    half = head_dim // 2
    return (float(theta) ** (-np.arange(half, dtype=np.float64) / half)).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Base of all scalings.

    Attributes:
      factor: how many times longer the streams became; from 1 up.
    """

    factor: float

    def __post_init__(self):
        require(
            self.factor >= 1,
            f"factor = {self.factor} would shorten the streams",
            where=f"{type(self).__name__}.factor",
            fix="Give a number from 1 up.",
        )

    def frequencies(self, head_dim: int, theta: float) -> np.ndarray:
        """Returns f32[E/2], the stretched frequencies."""
        raise NotImplementedError

    @property
    def magnitude(self) -> float:
        """What queries and keys are multiplied by."""
        return 1.0


@dataclasses.dataclass(frozen=True)
class LinearRope(RopeScaling):
    """Positions are divided by `factor` (position interpolation, arXiv 2306.15595)."""

    def frequencies(self, head_dim, theta):
        """Returns f32[E/2]."""
        return base_frequencies(head_dim, theta) / np.float32(self.factor)


@dataclasses.dataclass(frozen=True)
class DynamicRope(RopeScaling):
    """Stretched as far as a stream is longer than those of training, not at all before ("dynamic NTK").

    A longer stream would turn all of its positions otherwise than a shorter one, also those that are in a cache; so a
    network with it has `TransformerSpec.max_positions`, the longest stream of training, and is plain RoPE up to there.
    """

    def frequencies(self, head_dim, theta):
        """Returns f32[E/2]."""
        return base_frequencies(head_dim, theta)


@dataclasses.dataclass(frozen=True)
class Llama3Rope(RopeScaling):
    """LLaMA 3.1 (arXiv 2407.21783): long wavelengths are stretched, short ones are not, those between are mixed.

    Attributes:
      original_max_positions: longest stream before the stretching.
      low_freq_factor: wavelengths above original_max_positions / this are stretched whole.
      high_freq_factor: wavelengths below original_max_positions / this are left alone.
    """

    original_max_positions: int = 8192
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0

    def frequencies(self, head_dim, theta):
        """Returns f32[E/2]."""
        plain = base_frequencies(head_dim, theta).astype(np.float64)
        turns = self.original_max_positions * plain / (2 * math.pi)
        kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        kept = np.clip(kept, 0.0, 1.0)
        return (kept * plain + (1 - kept) * plain / self.factor).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class YarnRope(RopeScaling):
    """YaRN (arXiv 2309.00071, section 3): the ramp runs over the pairs of a head, and the scores get sharper.

    Attributes:
      original_max_positions: longest stream before the stretching.
      beta_fast: pairs that turn more often than this over the original stream are left alone.
      beta_slow: pairs that turn less often than this are stretched whole.
      attention_factor: what queries and keys are multiplied by; None = 0.1 ln(factor) + 1.
      truncate: whether the ends of the ramp are whole pairs.
    """

    original_max_positions: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True

    def frequencies(self, head_dim, theta):
        """Returns f32[E/2]."""

        def pair_with(turns: float) -> float:
            return head_dim * math.log(self.original_max_positions / (turns * 2 * math.pi)) / (2 * math.log(theta))

        low, high = pair_with(self.beta_fast), pair_with(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        # The upper end is bounded by the number of entries, not of pairs, in the published code and in all models.
        low, high = max(low, 0), min(high, head_dim - 1)
        high = high + 0.001 if low == high else high
        plain = base_frequencies(head_dim, theta).astype(np.float64)
        stretched = np.clip((np.arange(head_dim // 2) - low) / (high - low), 0.0, 1.0)
        return (stretched * plain / self.factor + (1 - stretched) * plain).astype(np.float32)

    @property
    def magnitude(self) -> float:
        """What queries and keys are multiplied by."""
        return 0.1 * math.log(self.factor) + 1.0 if self.attention_factor is None else self.attention_factor
