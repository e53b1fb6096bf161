"""The frequencies of rotary position embeddings (RoPE, arXiv 2104.09864), and their scaling in released models."""

import dataclasses
import math

import numpy as np

from diffusion_lm.core.errors import require


def base_frequencies(head_dim: int, theta: float) -> np.ndarray:
    """Returns f32[E/2], the angle of each pair of a head between adjacent positions."""
    half = head_dim // 2
    return (float(theta) ** (-np.arange(half, dtype=np.float64) / half)).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Base of all scalings of RoPE to longer streams.

    Attributes:
      factor: ratio of the new to the original length; >= 1.
    """

    factor: float

    def __post_init__(self):
        require(
            self.factor >= 1,
            f"factor={self.factor}: must be >= 1",
            where=f"{type(self).__name__}.factor",
            fix="Use the ratio of the new to the original length.",
        )

    def frequencies(self, head_dim: int, theta: float) -> np.ndarray:
        """Returns f32[E/2], the scaled frequencies."""
        raise NotImplementedError

    @property
    def magnitude(self) -> float:
        """The factor of queries and keys."""
        return 1.0


@dataclasses.dataclass(frozen=True)
class LinearRope(RopeScaling):
    """Positions are divided by `factor` (position interpolation, arXiv 2306.15595)."""

    def frequencies(self, head_dim, theta):
        """Returns f32[E/2]."""
        return base_frequencies(head_dim, theta) / np.float32(self.factor)


@dataclasses.dataclass(frozen=True)
class DynamicRope(RopeScaling):
    """Scaling that starts when a stream is longer than those of training ("dynamic NTK"); plain RoPE up to there.

    The frequencies of a longer stream would differ at all of its positions, including those in a KV cache. So a network
    with this scaling has `TransformerSpec.max_positions`, the longest stream of training, and only plain RoPE is used.
    """

    def frequencies(self, head_dim, theta):
        """Returns f32[E/2]."""
        return base_frequencies(head_dim, theta)


@dataclasses.dataclass(frozen=True)
class Llama3Rope(RopeScaling):
    """LLaMA 3.1 (arXiv 2407.21783): long wavelengths are scaled, short ones are not, those between are interpolated.

    Attributes:
      original_max_positions: longest stream before the scaling.
      low_freq_factor: wavelengths above original_max_positions / this are scaled by the full factor.
      high_freq_factor: wavelengths below original_max_positions / this are not scaled.
    """

    original_max_positions: int = 8192
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0

    def frequencies(self, head_dim, theta):
        """Returns f32[E/2]."""
        plain = base_frequencies(head_dim, theta).astype(np.float64)
        rotations = self.original_max_positions * plain / (2 * math.pi)
        # Weight of the plain frequency: 1 for pairs with many rotations over the original stream, 0 for few.
        weight = (rotations - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        weight = np.clip(weight, 0.0, 1.0)
        return (weight * plain + (1 - weight) * plain / self.factor).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class YarnRope(RopeScaling):
    """YaRN (arXiv 2309.00071, section 3): a linear ramp over the pairs of a head, and a factor of queries and keys.

    Attributes:
      original_max_positions: longest stream before the scaling.
      beta_fast: pairs with more rotations than this over the original stream are not scaled.
      beta_slow: pairs with fewer rotations than this are scaled by the full factor.
      attention_factor: factor of queries and keys; None = 0.1 ln(factor) + 1.
      truncate: whether the ends of the ramp are rounded to whole pairs.
    """

    original_max_positions: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True

    def frequencies(self, head_dim, theta):
        """Returns f32[E/2]."""

        def pair_with(rotations: float) -> float:
            return head_dim * math.log(self.original_max_positions / (rotations * 2 * math.pi)) / (2 * math.log(theta))

        low, high = pair_with(self.beta_fast), pair_with(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        # The bound of the upper end is the number of entries and not of pairs, as in the published code and all models.
        low, high = max(low, 0), min(high, head_dim - 1)
        # A ramp of length 0 would divide by 0.
        high = high + 0.001 if low == high else high
        plain = base_frequencies(head_dim, theta).astype(np.float64)
        weight = np.clip((np.arange(head_dim // 2) - low) / (high - low), 0.0, 1.0)
        return (weight * plain / self.factor + (1 - weight) * plain).astype(np.float32)

    @property
    def magnitude(self) -> float:
        """The factor of queries and keys."""
        return 0.1 * math.log(self.factor) + 1.0 if self.attention_factor is None else self.attention_factor
