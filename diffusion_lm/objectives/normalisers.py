"""What a sum of weighted token losses is divided by."""

from typing import Literal

import jax
import jax.numpy as jnp

from diffusion_lm.core.segments import segment_sum
from diffusion_lm.core.types import Batch

Normaliser = Literal["scored", "replaced", "example"]
NORMALISERS: tuple[Normaliser, ...] = ("scored", "replaced", "example")


def normalised(
    normaliser: Normaliser, weights_BT: jax.Array, replaced_BT: jax.Array, batch: Batch
) -> tuple[jax.Array, jax.Array]:
    """Returns the weights of the token losses, f32[B,T], and the divisor of their weighted sum, f32[].

    Args:
      normaliser: "scored" divides by the number of scored target tokens; unbiased weights stay unbiased. "replaced"
        divides by those of them that are noise (DiffuLLaMA's code, Dream): a ratio of two random sums, hence biased
        (trap T06). "example" averages over each example's scored tokens and then over examples (LLaDA SFT, RDM); a
        packed example counts by itself, not with its row (trap T09).
      weights_BT: f32[B,T], the weights before normalising.
      replaced_BT: bool[B,T], the tokens chosen for replacement.
      batch: its `loss_weights` are what is counted.
    """
    counts = batch.loss_weights
    if normaliser == "replaced":
        counts = jnp.where(replaced_BT, counts, 0.0)
    elif normaliser == "example":
        tokens = segment_sum((counts != 0).astype(jnp.float32), batch.segment_ids)
        share = 1.0 / jnp.maximum(tokens, 1.0)
        weights_BT, counts = weights_BT * share, counts * share
    return weights_BT, jnp.sum(counts, dtype=jnp.float32)
