"""At which noise level t each example is trained, and the fixed levels at which it is evaluated."""

import dataclasses
import math
from typing import Protocol

import jax

from diffusion_lm.core.errors import require
from diffusion_lm.core.rng import StreamKeys

TIME_STREAM = "noise/time"


class TimeSampler(Protocol):
    """Draws one time per example."""

    def draw(self, keys: StreamKeys, example_ids: jax.Array) -> jax.Array:
        """Returns f32 times in the shape of `example_ids` (u32[B,T]); the tokens of one example share theirs."""
        ...


@dataclasses.dataclass(frozen=True)
class UniformTime:
    """t uniform in (low, high], one draw per example (AR2Diff).

    The interval is open below and closed above: pure noise, the state every sampler starts from, is in the support, and
    t = 0, at which likelihood weights diverge, is not.

    Attributes:
      low: lower end.
      high: upper end.
    """

    low: float = 0.0
    high: float = 1.0

    def __post_init__(self):
        require(
            0.0 <= self.low < self.high <= 1.0,
            f"times must satisfy 0 <= low < high <= 1, got low = {self.low}, high = {self.high}",
            where="UniformTime",
            fix="The full range is low = 0.0, high = 1.0.",
        )

    def draw(self, keys: StreamKeys, example_ids: jax.Array) -> jax.Array:
        """Returns f32 times in the shape of `example_ids`."""
        return self.high - (self.high - self.low) * keys.example_uniform(TIME_STREAM, example_ids)


@dataclasses.dataclass(frozen=True)
class FixedGrid:
    """The fixed times at which an objective is evaluated, so that validation curves carry no sampling noise of t.

    Attributes:
      times: noise levels in (0, 1]; every example is evaluated at each.
    """

    times: tuple[float, ...] = (0.125, 0.375, 0.625, 0.875)

    def __post_init__(self):
        object.__setattr__(self, "times", tuple(float(t) for t in self.times))
        require(
            len(self.times) > 0 and all(0.0 < t <= 1.0 and math.isfinite(t) for t in self.times),
            f"evaluation times must be one or more numbers in (0, 1], got {self.times}",
            where="FixedGrid.times",
            fix="The default is (0.125, 0.375, 0.625, 0.875).",
        )
