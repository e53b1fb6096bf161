"""Noise schedules: how much of the signal, `alpha`, is left at time t in [0, 1] (0 = clean, 1 = pure noise)."""

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp


class Schedule(Protocol):
    """`alpha` falls from 1 at t = 0 to 0 at t = 1; a token is corrupted at rate `1 - alpha(t)`."""

    def alpha(self, t: jax.Array) -> jax.Array:
        """Returns the expected fraction of intact tokens, f32 in the shape of `t`."""
        ...

    def alpha_derivative(self, t: jax.Array) -> jax.Array:
        """Returns d alpha / d t (never positive), f32 in the shape of `t`; likelihood weights are built from it."""
        ...


@dataclasses.dataclass(frozen=True)
class Linear:
    """alpha(t) = 1 - t: the corruption rate is the time itself (AR2Diff, SUNDAE, LLaDA)."""

    def alpha(self, t: jax.Array) -> jax.Array:
        """Returns 1 - t."""
        return 1.0 - t

    def alpha_derivative(self, t: jax.Array) -> jax.Array:
        """Returns -1."""
        return -jnp.ones_like(t)
