"""Which target tokens take the network's fresh draw in a denoising step."""

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp

from diffusion_lm.core.types import TokenStats


class Proposal(Protocol):
    """One step's update of the canvas."""

    def propose(self, canvas: jax.Array, stats: TokenStats, target_mask: jax.Array) -> jax.Array:
        """Returns the next i32[B,T] canvas; `stats` stands at the tokens it speaks about. Conditioning stays."""
        ...


@dataclasses.dataclass(frozen=True)
class ResampleAll:
    """Every target token takes its draw in every step, sure or not (AR2Diff)."""

    def propose(self, canvas: jax.Array, stats: TokenStats, target_mask: jax.Array) -> jax.Array:
        """Returns the canvas with all target tokens replaced."""
        return jnp.where(target_mask, stats.sample, canvas)
