"""How many slots a denoising step commits: the step schedules of the samplers that rank their slots."""

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from diffusion_lm.core.errors import require
from diffusion_lm.noise.schedules import Linear
from diffusion_lm.samplers.view import View

ROUNDING = 1e-4
"""Added before a product such as N t / T is rounded down, so that 10 * (1 - 1/10) is 9 in float32 too."""


class Count(Protocol):
    """A step schedule. The last step of a block always takes what is left, whatever the count says."""

    def commits(self, view: View) -> jax.Array:
        """Returns i32[R,1], the slots that each row commits in this step; never negative."""
        ...


@dataclasses.dataclass(frozen=True)
class Even:
    """The same number in each step, the first `N mod steps` steps one more (LLaDA, arXiv 2502.09992)."""

    def commits(self, view: View) -> jax.Array:
        """Returns i32[R,1]."""
        window = view.active_count
        base, extra = window // view.steps[:, None], window % view.steps[:, None]
        later = view.clock[:, None] + 1
        return jnp.maximum(view.open_count - (window - base * later - jnp.minimum(extra, later)), 0)


@dataclasses.dataclass(frozen=True)
class Scheduled:
    """Leaves floor(N (1 - alpha)) slots open after a step, alpha being the schedule's at the step's end.

    `Linear` is DiffuLLaMA's top-k sampler (N t / T; arXiv 2410.17891), `Cosine` RDM's rate (arXiv 2302.05737).

    Attributes:
      schedule: a noise schedule, read on the even grid t = 1 - i / steps.
    """

    schedule: Any = Linear()

    def commits(self, view: View) -> jax.Array:
        """Returns i32[R,1]."""
        return jnp.maximum(view.open_count - self.left_open(view), 0)

    def left_open(self, view: View) -> jax.Array:
        """Returns i32[R,1], the slots that stay noise after this step."""
        share = 1.0 - self.schedule.alpha(view.times()[1])
        return jnp.floor(view.active_count * share + ROUNDING).astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class Proportional:
    """floor(n (1 - s/t)) of n open slots, as t falls to s on a grid from 1 to `last_time` (Dream, arXiv 2508.15487).

    Attributes:
      last_time: end of the grid.
    """

    last_time: float = 1e-3

    def __post_init__(self):
        require(
            0 <= self.last_time < 1,
            f"last_time = {self.last_time} is no time below 1",
            where="Proportional.last_time",
            fix="Dream uses 1e-3.",
        )

    def commits(self, view: View) -> jax.Array:
        """Returns i32[R,1]; it may be 0, as in the published sampler."""
        t, s = view.times(self.last_time)
        return jnp.floor(view.open_count * (1.0 - s / t) + ROUNDING).astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class Fixed:
    """A fixed number in each step; 1 with `rank = "random"` is the order of events of first-hitting sampling.

    Attributes:
      number: slots a step.
    """

    number: int = 1

    def __post_init__(self):
        require(
            isinstance(self.number, int) and self.number >= 1,
            f"number = {self.number} must be a whole number of at least 1",
            where="Fixed.number",
            fix="1 commits one token a step.",
        )

    def commits(self, view: View) -> jax.Array:
        """Returns i32[R,1]."""
        return jnp.full_like(view.open_count, self.number)


@dataclasses.dataclass(frozen=True)
class Fraction:
    """A share of the block in each step, rounded up (SUNDAE's partial updates, arXiv 2112.06749).

    Attributes:
      share: in (0, 1]; 1 updates everything.
    """

    share: float = 0.3

    def __post_init__(self):
        require(
            0 < self.share <= 1,
            f"share = {self.share} lies outside (0, 1]",
            where="Fraction.share",
            fix="An open SUNDAE implementation for text8 uses 0.3.",
        )

    def commits(self, view: View) -> jax.Array:
        """Returns i32[R,1]."""
        return jnp.ceil(view.active_count * self.share - ROUNDING).astype(jnp.int32)
