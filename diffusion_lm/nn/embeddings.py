"""Position encodings: RoPE and T5's relative position bias."""

import math

import jax
import jax.numpy as jnp

from diffusion_lm.nn.rope import RopeScaling


def rotary(x_BQHE: jax.Array, positions_BQ: jax.Array, theta: float, scaling: RopeScaling | None = None) -> jax.Array:
    """Rotates pairs of each head's halves by angles proportional to the position (RoPE, arXiv 2104.09864; half split).

    Args:
      x_BQHE: queries or keys; E even.
      positions_BQ: i32[B|1,Q].
      theta: base of the geometric series of wavelengths.
      scaling: how the frequencies are scaled; None = not scaled.

    Returns:
      The rotated array in the dtype of `x_BQHE`; angles and rotation are float32.
    """
    half = x_BQHE.shape[-1] // 2
    frequencies: jax.Array = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if scaling is not None:
        frequencies = jnp.asarray(scaling.frequencies(x_BQHE.shape[-1], theta))
    return rotate(x_BQHE, positions_BQ, frequencies, 1.0 if scaling is None else scaling.magnitude)


def rotate(
    x_BQHE: jax.Array, positions_BQ: jax.Array, frequencies: jax.Array, magnitude: float | jax.Array = 1.0
) -> jax.Array:
    """Rotates like `rotary`, with given frequencies.

    Args:
      x_BQHE: queries or keys.
      positions_BQ: i32[B|1,Q].
      frequencies: f32[E/2], the angle of each pair between adjacent positions.
      magnitude: factor of the result.
    """
    angles = positions_BQ[:, :, None, None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    if isinstance(magnitude, jax.Array) or magnitude != 1.0:
        cos, sin = cos * magnitude, sin * magnitude
    left, right = jnp.split(x_BQHE.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1).astype(x_BQHE.dtype)


def relative_buckets(distance: jax.Array, *, bidirectional: bool, buckets: int, max_distance: int) -> jax.Array:
    """Returns T5's bucket of each relative distance (arXiv 1910.10683, section 2.1).

    Half of the buckets hold one small distance each; the sizes of the other half grow logarithmically up to
    `max_distance`.

    Args:
      distance: i32[...], key position minus query position.
      bidirectional: past and future get half of the buckets each; otherwise every future key shares bucket 0 with the
        query itself.
      buckets: number of rows of the table.
      max_distance: distance from which all share the last bucket.

    Returns:
      i32[...] in [0, buckets).
    """
    if bidirectional:
        buckets //= 2
        offset: jax.Array | int = jnp.where(distance > 0, buckets, 0)
        distance = jnp.abs(distance)
    else:
        offset = 0
        distance = jnp.maximum(-distance, 0)
    exact = buckets // 2
    # `maximum`: log 0 would give NaN at distances that use the exact buckets.
    ratio = jnp.log(jnp.maximum(distance, 1).astype(jnp.float32) / exact) / math.log(max_distance / exact)
    logarithmic = jnp.minimum(exact + (ratio * (buckets - exact)).astype(jnp.int32), buckets - 1)
    return offset + jnp.where(distance < exact, distance, logarithmic)


def relative_bias(
    table: jax.Array, q_slots: jax.Array | None, num_keys: int, *, bidirectional: bool, max_distance: int
) -> jax.Array:
    """Returns the relative position bias of the attention scores.

    It depends on slots, not on position ids: inside a packed example the distances are equal, and tokens of different
    examples do not attend to each other.

    Args:
      table: [buckets,H].
      q_slots: i32[B,Q], the queries' slots; None means all slots 0..num_keys-1.
      num_keys: T.
      bidirectional: see `relative_buckets`.
      max_distance: see `relative_buckets`.

    Returns:
      f32[1,H,T,T] for all slots, f32[B,H,Q,T] otherwise.
    """
    # Queries at arbitrary slots (with a cache) need one lookup per pair; all slots together need only the diagonals.
    if q_slots is not None:
        distance_BQT = jnp.arange(num_keys) - q_slots[:, :, None]
        ids = relative_buckets(
            distance_BQT, bidirectional=bidirectional, buckets=table.shape[0], max_distance=max_distance
        )
        return jnp.moveaxis(table.astype(jnp.float32)[ids], 3, 1)
    diagonals = relative_diagonals(table, num_keys, bidirectional=bidirectional, max_distance=max_distance)
    return toeplitz(diagonals)[None]


def relative_diagonals(table: jax.Array, length: int, *, bidirectional: bool, max_distance: int) -> jax.Array:
    """Returns f32[H,2T], the diagonals of `relative_bias` for all T slots, which is a Toeplitz matrix.

    The order is distance key - query from 0 to T - 1, then from -T to -1. Arguments as in `relative_bias`.
    """
    distance = jnp.arange(2 * length)
    distance = jnp.where(distance < length, distance, distance - 2 * length)
    buckets = table.shape[0]
    ids = relative_buckets(distance, bidirectional=bidirectional, buckets=buckets, max_distance=max_distance)
    # A product instead of a gather: the transpose of a product is a product, that of a gather is a slow scatter.
    return (jax.nn.one_hot(ids, buckets, dtype=jnp.float32) @ table.astype(jnp.float32)).T


def toeplitz(diagonals: jax.Array) -> jax.Array:
    """Returns f32[H,T,T], queries first, from the diagonals of `relative_diagonals`.

    The diagonals are repeated T times and read in rows of 2T - 1 entries, which shifts each row by one. This avoids a
    gather of T*T entries, and a scatter of as many in the backward pass.
    """
    heads, period = diagonals.shape
    length = period // 2
    rows = jnp.broadcast_to(diagonals[:, None, :], (heads, length, period)).reshape(heads, length * period)
    return rows[:, : length * (period - 1)].reshape(heads, length, period - 1)[:, :, :length]
