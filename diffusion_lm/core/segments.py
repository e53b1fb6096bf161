"""Reductions and ranks over the packed examples of a row, so that packing does not change results."""

import jax
import jax.numpy as jnp


def segment_sum(values_BT: jax.Array, segment_ids_BT: jax.Array) -> jax.Array:
    """Returns [B,T], at each slot the sum of `values` over the slots of its row with the same segment id.

    Segment ids are i32 in [0, T], as in `Batch`.
    """
    return _per_segment(jax.ops.segment_sum, values_BT, segment_ids_BT)


def segment_max(values_BT: jax.Array, segment_ids_BT: jax.Array) -> jax.Array:
    """Returns [B,T], at each slot the largest of `values` over the slots of its row with the same segment id."""
    return _per_segment(jax.ops.segment_max, values_BT, segment_ids_BT)


def segment_rank(values_BT: jax.Array, segment_ids_BT: jax.Array) -> jax.Array:
    """Returns i32[B,T], at each slot how many slots of the same segment come before it when sorted by `values`."""
    # Sort by segment, then by value; the rank is the place in this order minus that of the segment's first slot.
    order = jnp.lexsort((values_BT, segment_ids_BT), axis=-1)
    place = jnp.argsort(order, axis=-1)

    def first_place(segments_T):
        sizes = jnp.bincount(segments_T, length=segments_T.shape[0] + 1)
        return (jnp.cumsum(sizes) - sizes)[segments_T]

    return (place - jax.vmap(first_place)(segment_ids_BT)).astype(jnp.int32)


def _per_segment(reduce, values_BT: jax.Array, segment_ids_BT: jax.Array) -> jax.Array:
    def row(values_T, segments_T):
        return reduce(values_T, segments_T, num_segments=segments_T.shape[0] + 1)[segments_T]

    return jax.vmap(row)(values_BT, segment_ids_BT)
