"""The noise that samplers of ratios and of hybrid noise undo, with the id of MASK; forward processes: `process.py`.

Beside the marginal each process gives the rates at which tokens turn into noise, from which likelihood bounds in
continuous time are made: a token of any kind turns into token z at rate r_t(z), so that

    d/dt q_t(z | x) = r_t(z) - (-alpha'/alpha) q_t(z | x).
"""

import dataclasses
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from diffusion_lm.core.errors import require
from diffusion_lm.noise.schedules import Linear

SMALLEST = 2.0**-24
"""Floor under alpha and 1 - t, so that rates stay finite in float32; the bounds' integrands vanish there."""


class Level(NamedTuple):
    """A noise level, all fields f32 in the shape of the time.

    Attributes:
      signal: alpha, the share of intact tokens.
      mask: probability of MASK.
      uniform: probability of noise that is an ordinary token, over all kinds together.
      mask_rate: rate at which a token turns into MASK.
      uniform_rate: rate at which a token turns into ordinary noise, over all kinds together.
    """

    signal: jax.Array
    mask: jax.Array
    uniform: jax.Array
    mask_rate: jax.Array
    uniform_rate: jax.Array


class InterpolatingNoise(Protocol):
    """A frozen dataclass."""

    @property
    def mask_id(self) -> int | None:
        """The id of MASK, or None where noise is made of ordinary tokens only."""
        ...

    def level(self, t: jax.Array) -> Level:
        """Returns the level at times in [0, 1]."""
        ...

    def complete(self) -> "InterpolatingNoise":
        """Returns the process from no noise at all to no signal at all.

        Bounds do not depend on the schedule, and on the whole range they need no terms for its ends.
        """
        ...


def kinds(mask_id: int | None, vocab_size: int) -> int:
    """Returns how many tokens ordinary noise is drawn from: all, or all but MASK where there is one."""
    return vocab_size if mask_id is None else vocab_size - 1


def noise_at(tokens: jax.Array, mask_id: int | None, mask: jax.Array, uniform: jax.Array, vocab_size: int) -> jax.Array:
    """Returns the share of given tokens in noise whose MASK and ordinary tokens have the masses `mask`, `uniform`."""
    ordinary = uniform / kinds(mask_id, vocab_size)
    return ordinary if mask_id is None else jnp.where(tokens == mask_id, mask, ordinary)


@dataclasses.dataclass(frozen=True)
class UniformNoise:
    """alpha_t x + (1 - alpha_t) / V over the whole vocabulary (D3PM-uniform, UDLM, SEDD-uniform).

    Attributes:
      schedule: alpha.
    """

    schedule: Any = Linear()
    mask_id = None

    def level(self, t: jax.Array) -> Level:
        """Returns the level at times in [0, 1]."""
        alpha, rate = _alpha_and_rate(self.schedule, t)
        return Level(alpha, jnp.zeros_like(alpha), 1.0 - alpha, jnp.zeros_like(alpha), rate)

    def complete(self) -> "UniformNoise":
        """Returns the linear schedule."""
        return UniformNoise()


@dataclasses.dataclass(frozen=True)
class AbsorbingNoise:
    """alpha_t x + (1 - alpha_t) MASK (D3PM-absorbing, SEDD-absorb).

    Attributes:
      mask_id: id of MASK, which must not occur in the data.
      schedule: alpha.
    """

    mask_id: int
    schedule: Any = Linear()

    def level(self, t: jax.Array) -> Level:
        """Returns the level at times in [0, 1]."""
        alpha, rate = _alpha_and_rate(self.schedule, t)
        return Level(alpha, 1.0 - alpha, jnp.zeros_like(alpha), rate, jnp.zeros_like(alpha))

    def complete(self) -> "AbsorbingNoise":
        """Returns the linear schedule."""
        return AbsorbingNoise(self.mask_id)


@dataclasses.dataclass(frozen=True)
class HybridNoise:
    """((1 - t) x + t MASK + c_t uniform) / (1 + c_t), c_t = B (t (1 - t))^(gamma/2) (GIDD, arXiv 2503.04482).

    Noise begins and ends as MASK; in between a share of it, largest at t = 1/2, is ordinary tokens, by which the model
    learns to correct what it has written.

    Attributes:
      mask_id: id of MASK, which must not occur in the data.
      uniform_share: p_u, the share of ordinary noise at t = 1/2, which sets B = 2^gamma p_u / (1 - p_u).
      gamma: how fast it comes and goes.
    """

    mask_id: int
    uniform_share: float = 0.1
    gamma: float = 1.0

    def __post_init__(self):
        require(
            0.0 <= self.uniform_share < 1.0,
            f"uniform_share = {self.uniform_share} is no share below 1",
            where="HybridNoise.uniform_share",
            fix="The paper uses 0.0, 0.1 and 0.2.",
        )
        require(
            0.0 < self.gamma <= 2.0,
            f"gamma = {self.gamma} would need negative rates",
            where="HybridNoise.gamma",
            fix="The paper uses 1.0; it must lie in (0, 2].",
        )

    @property
    def scale(self) -> float:
        """B, the factor of c_t."""
        return 2.0**self.gamma * self.uniform_share / (1.0 - self.uniform_share)

    def level(self, t: jax.Array) -> Level:
        """Returns the level at times in [0, 1]."""
        rest = jnp.maximum(1.0 - t, SMALLEST)
        c = self.scale * (t * rest) ** (0.5 * self.gamma)
        total = 1.0 + c
        ordinary_rate = c / total * (0.5 * self.gamma / jnp.maximum(t, SMALLEST) + (1.0 - 0.5 * self.gamma) / rest)
        return Level(rest / total, t / total, c / total, 1.0 / (total * rest), ordinary_rate)

    def complete(self) -> "HybridNoise":
        """Returns itself: it covers the whole range."""
        return self


def _alpha_and_rate(schedule: Any, t: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns alpha, with a floor under it, and -alpha'/alpha."""
    alpha, fall = schedule.alpha(t), -schedule.alpha_derivative(t)
    return jnp.clip(alpha, SMALLEST, 1.0), fall / jnp.where(alpha > 0, alpha, SMALLEST)
