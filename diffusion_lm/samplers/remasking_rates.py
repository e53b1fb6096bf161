"""The remasking rates of ReMDM (arXiv 2503.00307), and the schedule of ReMDM-loop."""

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp

from diffusion_lm.core.checks import check_probability
from diffusion_lm.core.errors import require
from diffusion_lm.samplers.view import View

NEVER_REMASKS = "0.0 never remasks."


class RemaskingRate(Protocol):
    """sigma, the probability that an unmasked token is remasked. Implementations are frozen dataclasses."""

    def rate(self, view: View, t: jax.Array, limit: jax.Array) -> jax.Array:
        """Returns sigma, f32[R,1] or f32[R,T].

        Args:
          view: the step.
          t: f32[R,1], the time at which the step begins.
          limit: f32[R,1], min(1, (1 - alpha_s) / alpha_t), the largest rate for which a process exists.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Capped:
    """sigma = min(eta, limit), while the time is in (end, start] (ReMDM-cap; ReMDM-loop with `Plateau`).

    Attributes:
      eta: highest rate.
      start: the rate is 0 above this time.
      end: the rate is 0 at this time and below.
    """

    eta: float = 0.008
    start: float = 1.0
    end: float = 0.0

    def __post_init__(self):
        check_probability(self.eta, "Capped.eta", NEVER_REMASKS)

    def rate(self, view: View, t: jax.Array, limit: jax.Array) -> jax.Array:
        """Returns f32[R,1]."""
        # A slack of 0.0005 steps, so that a boundary on the grid is met in float32 too.
        slack = 5e-4 / view.steps[:, None]
        return jnp.where((t <= self.start + slack) & (t > self.end + slack), jnp.minimum(self.eta, limit), 0.0)


@dataclasses.dataclass(frozen=True)
class Rescaled:
    """sigma = eta * limit (ReMDM-rescale).

    Attributes:
      eta: fraction of the highest possible rate.
    """

    eta: float = 0.015

    def __post_init__(self):
        check_probability(self.eta, "Rescaled.eta", NEVER_REMASKS)

    def rate(self, view: View, t: jax.Array, limit: jax.Array) -> jax.Array:
        """Returns f32[R,1]."""
        del view, t
        return self.eta * limit


@dataclasses.dataclass(frozen=True)
class LeastConfident:
    """sigma_i = eta * limit * softmax_i(-p_i) over the unmasked slots of a block (ReMDM-conf).

    p_i is the probability that the token had when it was sampled. The rates sum to eta * limit over the block. They are
    0 at MASK, which is then revealed with the probability of plain ancestral sampling.

    Attributes:
      eta: fraction of the highest possible rate.
    """

    eta: float = 1.0

    def __post_init__(self):
        check_probability(self.eta, "LeastConfident.eta", NEVER_REMASKS)

    def rate(self, view: View, t: jax.Array, limit: jax.Array) -> jax.Array:
        """Returns f32[R,T]."""
        del t
        unmasked = view.active & ~view.open
        weights = jnp.where(unmasked, jnp.exp(-jnp.exp(view.log_prob)), 0.0)
        return self.eta * limit * weights / jnp.maximum(jnp.sum(weights, axis=1, keepdims=True), 1e-30)


@dataclasses.dataclass(frozen=True)
class Plateau:
    """A schedule with a plateau: alpha rises from 0 to `level` at time `start`, stays there until `end`, rises to 1.

    ReMDM-loop holds the noise level while tokens are remasked and sampled again (arXiv 2503.00307).

    Attributes:
      level: alpha of the plateau.
      start: time at which it is reached (times fall from 1 to 0).
      end: time at which it ends.
    """

    level: float = 0.9
    start: float = 0.55
    end: float = 0.05

    def __post_init__(self):
        require(
            0 < self.level < 1 and 0 < self.end < self.start < 1,
            f"level={self.level}, start={self.start}, end={self.end}: must satisfy 0 < level < 1, 0 < end < start < 1",
            where="Plateau",
            fix="ReMDM-loop uses level = 0.9, start = 0.55, end = 0.05; times fall from 1 to 0.",
        )

    def alpha(self, t: jax.Array) -> jax.Array:
        """Returns f32 in the shape of `t`."""
        rising = self.level * (1.0 - t) / (1.0 - self.start)
        finishing = 1.0 - (1.0 - self.level) * t / self.end
        return jnp.where(t < self.end, finishing, jnp.minimum(rising, self.level))

    def alpha_derivative(self, t: jax.Array) -> jax.Array:
        """Returns d alpha / d t."""
        return jnp.where(
            t < self.end,
            -(1.0 - self.level) / self.end,
            jnp.where(t > self.start, -self.level / (1.0 - self.start), 0.0),
        )
