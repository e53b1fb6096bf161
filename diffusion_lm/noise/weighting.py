"""How much the loss of each token counts at its noise level."""

import dataclasses
from typing import Literal, Protocol

import jax
import jax.numpy as jnp

from diffusion_lm.noise.schedules import Schedule

BoundKind = Literal["exact", "nelbo", "pseudo"]


class Weighting(Protocol):
    """Weights the per-token loss; the weights multiply the batch's own `loss_weights` and enter no denominator."""

    @property
    def bound_kind(self) -> BoundKind:
        """What the weighted loss says about the likelihood."""
        ...

    def weigh(self, t_BT: jax.Array, replaced_BT: jax.Array, schedule: Schedule) -> jax.Array:
        """Returns f32[B,T] from the times, from which tokens were corrupted, and from the schedule."""
        ...


@dataclasses.dataclass(frozen=True)
class Flat:
    """Every target token counts one at every noise level, corrupted or not (AR2Diff).

    Scoring intact tokens too is what makes the model say which tokens are noise (trap T17). The result is no likelihood
    bound: uniform-noise models of the SUNDAE family have none.
    """

    @property
    def bound_kind(self) -> BoundKind:
        """Pseudo-likelihood."""
        return "pseudo"

    def weigh(self, t_BT: jax.Array, replaced_BT: jax.Array, schedule: Schedule) -> jax.Array:
        """Returns ones."""
        return jnp.ones_like(t_BT)
