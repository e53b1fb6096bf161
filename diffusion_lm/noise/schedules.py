"""Noise schedules alpha(t): the expected fraction of intact tokens at time t in [0, 1] (0 = clean, 1 = noise).

Each schedule gives `alpha` in the form of its paper, and its derivative, from which likelihood weights are computed.
Tests check that the two agree.
"""

import dataclasses
import math
from typing import Protocol

import jax
import jax.numpy as jnp

from diffusion_lm.core.checks import check_positive, check_probability
from diffusion_lm.core.errors import require


class Schedule(Protocol):
    """`alpha` falls from about 1 at t = 0 to about 0 at t = 1; a token is corrupted at rate `1 - alpha(t)`."""

    def alpha(self, t: jax.Array) -> jax.Array:
        """Returns the expected fraction of intact tokens, f32 in the shape of `t`."""
        ...

    def alpha_derivative(self, t: jax.Array) -> jax.Array:
        """Returns d alpha / d t <= 0, f32 in the shape of `t`."""
        ...


@dataclasses.dataclass(frozen=True)
class Linear:
    """alpha(t) = 1 - t: the corruption rate equals the time (AR2Diff, SUNDAE, LLaDA)."""

    def alpha(self, t: jax.Array) -> jax.Array:
        """Returns 1 - t."""
        return 1.0 - t

    def alpha_derivative(self, t: jax.Array) -> jax.Array:
        """Returns -1."""
        return -jnp.ones_like(t)


@dataclasses.dataclass(frozen=True)
class Cosine:
    """alpha(t) = 1 - cos(pi/2 (1 - t)): most of the time is spent at high noise (MD4, arXiv 2406.04329)."""

    def alpha(self, t: jax.Array) -> jax.Array:
        """Returns 1 - cos(pi/2 (1 - t)), computed as 2 sin^2 to keep precision for small values."""
        return 2.0 * jnp.square(jnp.sin(0.25 * math.pi * (1.0 - t)))

    def alpha_derivative(self, t: jax.Array) -> jax.Array:
        """Returns -pi/2 sin(pi/2 (1 - t))."""
        return -0.5 * math.pi * jnp.sin(0.5 * math.pi * (1.0 - t))


@dataclasses.dataclass(frozen=True)
class Polynomial:
    """alpha(t) = 1 - t^exponent (MD4, arXiv 2406.04329).

    Attributes:
      exponent: 1 is `Linear`; with a larger exponent, more of the time is spent at low noise.
    """

    exponent: float = 2.0

    def __post_init__(self):
        check_positive(self.exponent, "Polynomial.exponent")

    def alpha(self, t: jax.Array) -> jax.Array:
        """Returns 1 - t^exponent."""
        return 1.0 - t**self.exponent

    def alpha_derivative(self, t: jax.Array) -> jax.Array:
        """Returns -exponent t^(exponent - 1)."""
        return -self.exponent * t ** (self.exponent - 1.0)


@dataclasses.dataclass(frozen=True)
class LogLinear:
    """sigma(t) = -log(1 - (1 - eps) t), that is alpha(t) = 1 - (1 - eps) t (SEDD, arXiv 2310.16834; MDLM, 2406.07524).

    Attributes:
      eps: expected fraction of intact tokens at t = 1.
    """

    eps: float = 1e-3

    def __post_init__(self):
        check_probability(self.eps, "LogLinear.eps", "The papers use 1e-3; 0 is the schedule `Linear`.", below_one=True)

    def alpha(self, t: jax.Array) -> jax.Array:
        """Returns 1 - (1 - eps) t."""
        return 1.0 - (1.0 - self.eps) * t

    def alpha_derivative(self, t: jax.Array) -> jax.Array:
        """Returns -(1 - eps)."""
        return -(1.0 - self.eps) * jnp.ones_like(t)


@dataclasses.dataclass(frozen=True)
class Geometric:
    """sigma(t) = sigma_min^(1-t) sigma_max^t and alpha(t) = exp(-sigma(t)) (SEDD with uniform noise, arXiv 2310.16834).

    alpha(0) = exp(-sigma_min) and alpha(1) = exp(-sigma_max), neither exactly 1 nor 0.

    Attributes:
      sigma_min: total noise at t = 0.
      sigma_max: total noise at t = 1.
    """

    sigma_min: float = 1e-4
    sigma_max: float = 20.0

    def __post_init__(self):
        check_positive(self.sigma_min, "Geometric.sigma_min")
        require(
            self.sigma_max > self.sigma_min,
            f"sigma_max={self.sigma_max}: must be > sigma_min={self.sigma_min}",
            where="Geometric.sigma_max",
            fix="The paper uses 1e-4 and 20.",
        )

    def sigma(self, t: jax.Array) -> jax.Array:
        """Returns the total noise up to time t."""
        return self.sigma_min ** (1.0 - t) * self.sigma_max**t

    def alpha(self, t: jax.Array) -> jax.Array:
        """Returns exp(-sigma(t))."""
        return jnp.exp(-self.sigma(t))

    def alpha_derivative(self, t: jax.Array) -> jax.Array:
        """Returns -sigma'(t) exp(-sigma(t)), with sigma' = sigma log(sigma_max / sigma_min)."""
        sigma = self.sigma(t)
        return -math.log(self.sigma_max / self.sigma_min) * sigma * jnp.exp(-sigma)


@dataclasses.dataclass(frozen=True)
class PowerTotal:
    """alpha(t) = exp(-sigma_max t^power), for evaluation: total noise from 0 to `sigma_max`.

    For bounds of score models on a finite range of noise, such as SEDD with uniform noise.

    Attributes:
      sigma_max: total noise at t = 1.
      power: at least 1; with a larger power, more of the time is spent at low noise.
    """

    sigma_max: float = 20.0
    power: float = 2.0

    def __post_init__(self):
        require(
            self.sigma_max > 0 and self.power >= 1 and math.isfinite(self.sigma_max),
            f"sigma_max={self.sigma_max}, power={self.power}: sigma_max must be finite and > 0, power >= 1",
            where="PowerTotal",
            fix="The defaults are 20.0 and 2.0.",
        )

    def alpha(self, t: jax.Array) -> jax.Array:
        """Returns exp(-sigma_max t^power)."""
        return jnp.exp(-self.sigma_max * t**self.power)

    def alpha_derivative(self, t: jax.Array) -> jax.Array:
        """Returns -sigma_max power t^(power - 1) alpha(t)."""
        return -self.sigma_max * self.power * t ** (self.power - 1.0) * self.alpha(t)
