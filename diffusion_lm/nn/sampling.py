"""Categorical sampling whose tail is correct in float32.

The usual Gumbel-argmax is biased: a float32 uniform on a grid of 2^-23 cannot produce a Gumbel value above about 16, so
unlikely tokens of a large vocabulary are drawn too rarely, like a hidden top-p. Instead the cumulative distribution is
inverted on two levels: first a block of the vocabulary, then a token inside it. That needs two uniforms per token
instead of V, and it sums the small probabilities inside a block before adding them to large ones. The remaining
rounding error is absolute and small: each block's probability is off by at most about 2^-23, and so is each token's
relative to its block (a token below 2^-24 of its block may never be drawn).
"""

import math

import jax
import jax.numpy as jnp


def most_likely(logits: jax.Array) -> jax.Array:
    """Returns the argmax of f32[...,V] as i32[...], the first of equals.

    On XLA's CPU backend, a maximum followed by the smallest index that attains it is several times faster than argmax.
    """
    V = logits.shape[-1]
    is_largest = logits == logits.max(axis=-1, keepdims=True)
    return jnp.minimum(jnp.where(is_largest, jnp.arange(V, dtype=jnp.int32), V).min(axis=-1), V - 1)


def filter_logits(
    logits: jax.Array, temperature: float | jax.Array = 1.0, top_k: int = 0, top_p: float = 1.0
) -> jax.Array:
    """Returns the logits of the proposal: first temperature, then top-k, then top-p on the remaining tokens.

    Args:
      logits: f32[...,V].
      temperature: > 0; as it approaches 0, `draw` approaches the argmax (exact ties stay ties).
      top_k: keeps the k largest logits (and ties with the k-th); 0 keeps all.
      top_p: keeps the smallest set of most likely tokens whose mass reaches p, at least one; 1 keeps all.

    Returns:
      f32[...,V], -inf where a token was removed.
    """
    # Subtract the maximum first: a tiny temperature then sends the others to -inf and never the maximum to +inf.
    out = (logits - logits.max(axis=-1, keepdims=True)) / temperature
    if 0 < top_k < out.shape[-1]:
        smallest_kept = jax.lax.top_k(out, top_k)[0][..., -1:]
        out = jnp.where(out >= smallest_kept, out, -jnp.inf)
    if top_p < 1:
        descending = jnp.sort(out, axis=-1, descending=True)
        probabilities = jax.nn.softmax(descending, axis=-1)
        # Exclusive: the token that crosses p belongs to the set.
        mass_before = jnp.cumsum(probabilities, axis=-1) - probabilities
        count = jnp.maximum((mass_before < top_p).sum(axis=-1, keepdims=True), 1)
        smallest_kept = jnp.take_along_axis(descending, count - 1, axis=-1)
        out = jnp.where(out >= smallest_kept, out, -jnp.inf)
    return out


def draw(keys: jax.Array, logits: jax.Array) -> jax.Array:
    """Draws one token per distribution: a block of the vocabulary with one uniform, a token inside it with another.

    Args:
      keys: typed PRNG keys [...], one per distribution, so a draw does not depend on the rest of the batch.
      logits: f32[...,V], unnormalised; -inf is never drawn.

    Returns:
      i32[...].
    """
    V = logits.shape[-1]
    # About sqrt(V) blocks of about sqrt(V) tokens.
    size = 2 ** math.ceil(math.log2(max(V, 2)) / 2)
    blocks = -(-V // size)
    # Relative to the maximum, so that exp cannot overflow.
    weights = jnp.exp(logits - logits.max(axis=-1, keepdims=True))
    weights = jnp.pad(weights, [(0, 0)] * (logits.ndim - 1) + [(0, blocks * size - V)])
    weights = weights.reshape(*logits.shape[:-1], blocks, size)
    uniforms = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys.reshape(-1)).reshape(*keys.shape, 2)
    # First the block, then the token inside it: two uniforms reach tokens below the resolution of one in float32.
    block = _invert(uniforms[..., 0], weights.sum(axis=-1))
    inside = jnp.take_along_axis(weights, block[..., None, None], axis=-2)[..., 0, :]
    return (block * size + _invert(uniforms[..., 1], inside)).astype(jnp.int32)


def _invert(uniform: jax.Array, weights: jax.Array) -> jax.Array:
    """Returns the first index whose cumulative weight exceeds uniform * total; never one of weight 0."""
    cumulative = jnp.cumsum(weights, axis=-1)
    # A parallel cumulative sum is not monotonic to the last bit: a token of weight 0 could exceed the threshold that
    # its predecessor just missed. So require a positive weight too.
    candidates = (cumulative > uniform[..., None] * cumulative[..., -1:]) & (weights > 0)
    # Rounding may leave no candidate; the most likely token is then drawn.
    first = jnp.argmax(candidates, axis=-1)
    return jnp.where(candidates.any(axis=-1), first, jnp.argmax(weights, axis=-1))
