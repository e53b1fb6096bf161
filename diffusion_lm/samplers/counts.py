"""How many slots are sampled in a denoising step: the step schedules of rules that rank slots."""

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp

from diffusion_lm.core.checks import check_count, check_probability
from diffusion_lm.core.errors import require
from diffusion_lm.noise.schedules import Linear, Schedule
from diffusion_lm.samplers.view import View

ROUNDING = 1e-4
"""Added before a product such as N t / T is rounded down, so that 10 * (1 - 1/10) is 9 in float32 too."""


class Count(Protocol):
    """A step schedule. In a masked sampler the last step of a block unmasks what is left, whatever the count says."""

    def slots(self, view: View) -> jax.Array:
        """Returns i32[R,1], the number of slots of each row that are sampled in this step; never negative."""
        ...


@dataclasses.dataclass(frozen=True)
class Even:
    """The same number in each step, the first `N mod steps` steps one more (LLaDA, arXiv 2502.09992)."""

    def slots(self, view: View) -> jax.Array:
        """Returns i32[R,1]."""
        window = view.active_count
        base, extra = window // view.steps[:, None], window % view.steps[:, None]
        done = view.step[:, None] + 1
        # Slots that are still masked after this step, if every step so far has had its share.
        left = window - base * done - jnp.minimum(extra, done)
        return jnp.maximum(view.open_count - left, 0)


@dataclasses.dataclass(frozen=True)
class Scheduled:
    """Leaves floor(N (1 - alpha_s)) slots masked after a step from time t to s.

    `Linear` is DiffuLLaMA's top-k sampler (N t / T; arXiv 2410.17891), `Cosine` RDM's rate (arXiv 2302.05737).

    Attributes:
      schedule: a noise schedule, read on the even grid t = 1 - i / steps.
    """

    schedule: Schedule = Linear()

    def slots(self, view: View) -> jax.Array:
        """Returns i32[R,1]."""
        return jnp.maximum(view.open_count - self.left_masked(view), 0)

    def left_masked(self, view: View) -> jax.Array:
        """Returns i32[R,1], the number of slots that are masked after this step."""
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
        check_probability(self.last_time, "Proportional.last_time", "Dream uses 1e-3.", below_one=True)

    def slots(self, view: View) -> jax.Array:
        """Returns i32[R,1]; it may be 0, as in the published sampler."""
        t, s = view.times(self.last_time)
        return jnp.floor(view.open_count * (1.0 - s / t) + ROUNDING).astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class Fixed:
    """A fixed number in each step; 1 with `rank = "random"` is the order of events of first-hitting sampling.

    Attributes:
      number: slots per step.
    """

    number: int = 1

    def __post_init__(self):
        check_count(self.number, "Fixed.number", "1 unmasks one token per step.")

    def slots(self, view: View) -> jax.Array:
        """Returns i32[R,1]."""
        return jnp.full_like(view.open_count, self.number)


@dataclasses.dataclass(frozen=True)
class Fraction:
    """A fraction of the block in each step, rounded up (SUNDAE's partial updates, arXiv 2112.06749).

    Attributes:
      share: in (0, 1]; 1 updates everything.
    """

    share: float = 0.3

    def __post_init__(self):
        require(
            0 < self.share <= 1,
            f"share={self.share}: must be in (0, 1]",
            where="Fraction.share",
            fix="An open SUNDAE implementation for text8 uses 0.3.",
        )

    def slots(self, view: View) -> jax.Array:
        """Returns i32[R,1]."""
        return jnp.ceil(view.active_count * self.share - ROUNDING).astype(jnp.int32)
