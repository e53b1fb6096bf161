"""From hidden states to per-token losses, and from per-token losses to sums. No [B,T,V] array is ever formed."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from diffusion_lm.architectures.base import BoundModel, Hidden
from diffusion_lm.core.alignment import Alignment
from diffusion_lm.core.real_tokens import is_real
from diffusion_lm.core.types import Batch, LossTerms, WeightedMean


def weighted_sum(values: jax.Array, weights: jax.Array) -> jax.Array:
    """Returns f32[], the sum of values x weights; values with weight 0 do not contribute, even if they are NaN."""
    scored = weights != 0
    return jnp.sum(jnp.where(scored, values, 0.0) * jnp.where(scored, weights, 0.0), dtype=jnp.float32)


def weighted_mean(values: jax.Array, weights: jax.Array) -> WeightedMean:
    """Returns the mean of `values` under `weights` as its two sums."""
    return WeightedMean(total=weighted_sum(values, weights), weight=jnp.sum(weights, dtype=jnp.float32))


def cross_entropy(
    model: BoundModel,
    hidden: Hidden,
    batch: Batch,
    alignment: Alignment,
    scored_BT: jax.Array,
    *,
    forbidden: tuple[int, ...] = (),
    label_smoothing: float = 0.0,
) -> tuple[jax.Array, jax.Array]:
    """Returns -log p of the clean tokens and the training loss, f32[B,T] each; 0 where `scored_BT` is False.

    The two differ under label smoothing only, which spreads that much of the target's mass over the vocabulary.
    """
    targets, where = alignment.to_slots(jnp.asarray(batch.tokens)), alignment.to_slots(scored_BT)
    if not label_smoothing:
        nll = alignment.to_tokens(model.nll(hidden, targets, where=where, forbidden=forbidden))
        return nll, nll
    terms = model.nll_terms(hidden, targets, where=where, forbidden=forbidden)
    smooth = (1.0 - label_smoothing) * terms.nll + label_smoothing * terms.uniform_nll
    return alignment.to_tokens(terms.nll), alignment.to_tokens(smooth)


def mapped_losses(
    model: BoundModel,
    hidden: Hidden,
    alignment: Alignment,
    batch: Batch,
    fn: Callable[..., jax.Array],
    *values: jax.Array,
    forbidden: tuple[int, ...] = (),
) -> jax.Array:
    """Returns f32[B,T], `fn(logits, *values)` at every scored token.

    Args:
      model: the network.
      hidden: its hidden states.
      alignment: which state predicts which token.
      batch: says which tokens are scored.
      fn: `(logits [...,V], *values [...]) -> [...]`.
      *values: [B,T] at the tokens that they belong to.
      forbidden: ids that get no probability.
    """
    losses = model.map_logits(
        fn,
        hidden,
        tuple(alignment.to_slots(value) for value in values),
        where=alignment.to_slots(batch.loss_weights != 0),
        forbidden=forbidden,
    )
    return alignment.to_tokens(losses)


def per_token_terms(losses_BT: jax.Array, batch: Batch) -> LossTerms:
    """Returns the sums of per-token losses in which each scored token counts once."""
    return LossTerms(
        weighted_sum(losses_BT, batch.loss_weights),
        jnp.sum(batch.loss_weights, dtype=jnp.float32),
        {"nll_per_real_token": weighted_mean(losses_BT, is_real(batch))},
    )
