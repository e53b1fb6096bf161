"""Maps over the tokens of a batch in chunks, for arrays of the width of the vocabulary.

Chunks run along T, so that rows stay on the devices that hold them. Where the logits do not fit in one chunk, the
backward pass computes those of each chunk again: with a vocabulary of 256,000 tokens, logits are by far the largest
array of a step. The gradients of the head are summed in float32.

Conditioning has no loss and is never sampled, so its hidden states need no logits. With `where_BT`, the selected slots
of each row are moved to its front, and the chunks after the last of them are skipped at run time.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from diffusion_lm.nn.head import Head

Chunk = Callable[..., tuple[Any, Any]]
"""The function that is mapped, `chunk(head, *inputs, saved=None)` on slices [b,t,...] of the inputs. It returns its
result, and values that the backward pass passes back as `saved` so that they are not computed again; both are trees of
arrays [b,t,...]. It must treat tokens independently, because slots are reordered."""

MAX_PIECES = 8
"""Most chunks per row where only some slots are selected and the rest can be skipped. More chunks skip more, but each
reads the head, in training several times and its gradient too, and is compiled separately if the loop is unrolled."""

MIN_TOKENS = 32
"""Smallest number of tokens per chunk. In training the minimum is half the network's width, and in a loop twice the
width. A chunk in a loop reads the head three times and adds to its gradient, 14 bytes per weight in bfloat16, and moves
14 bytes per logit. If only some slots are selected, half a chunk is unused on average. So n tokens in chunks of c cost
(n / c + 1 / 2) (D + c), which is least at c = sqrt(2 n D); twice the width is close, with half of its memory."""

UNROLLED_BYTES = 2**28
"""Largest memory of the head's gradients from all chunks for which the loop over chunks is unrolled: XLA may hold all
of them before it adds them up."""


def over_chunks(chunk: Chunk, head: Head, inputs, chunk_tokens: int, where_BT: jax.Array | None, min_tokens: int = 0):
    """Maps `chunk(head, *inputs)` over slices of axis 1.

    Args:
      chunk: the function that is mapped. It must not close over arrays that need gradients.
      head: the output projection.
      inputs: tree of arrays [B,T,...]; the first is the hidden states.
      chunk_tokens: most tokens per chunk (at least one slot per row); static.
      where_BT: bool[B,T], the selected slots; the result is 0 elsewhere. None = all.
      min_tokens: chunks are not made smaller than this many tokens if only some slots are selected; static.

    Returns:
      The first result of `chunk`, over [B,T].
    """
    if where_BT is None:
        return _map_chunks(chunk, head, inputs, chunk_tokens, None, min_tokens)
    # Selected slots first, in their order; `back` is the inverse permutation.
    order = jnp.argsort(~where_BT, axis=1, stable=True)
    back = jnp.argsort(order, axis=1)
    moved = jax.tree.map(lambda x: _permute(x, order, back), inputs)
    # All rows share one loop, so the row with the most selected slots decides how many chunks run.
    out = _map_chunks(chunk, head, moved, chunk_tokens, jnp.max(jnp.sum(where_BT, axis=1)), min_tokens)

    def to_slots(y):
        selected = where_BT.reshape(*where_BT.shape, *[1] * (y.ndim - 2))
        return jnp.where(selected, _permute(y, back, order), jnp.zeros((), y.dtype))

    return jax.tree.map(to_slots, out)


def _map_chunks(chunk: Chunk, head: Head, inputs, chunk_tokens: int, selected: jax.Array | None, min_tokens: int):
    """Maps over chunks. Chunks that begin at slot i32[] `selected` or later are skipped and give zeros."""
    B, T = inputs[0].shape[:2]
    most = max(1, chunk_tokens // B)

    def slots_of(min_tokens: int) -> int:
        return most if selected is None else min(most, _min_slots(B, T, max(min_tokens, MIN_TOKENS)))

    slots = slots_of(min_tokens)
    # Unrolled only if all logits would fit into one chunk anyway, and the gradients of the head are small.
    unrolled = most >= T and -(-T // slots) * head.weight_VD.size * 4 <= UNROLLED_BYTES
    if not unrolled:
        slots = slots_of(4 * min_tokens)
    if slots >= T:
        return chunk(head, *inputs)[0]
    chunks = -(-T // slots)
    # Chunks of equal size; where some are skipped, a multiple of 8 (see `_min_slots`).
    slots = -(-T // chunks) if selected is None else min(slots, 8 * math.ceil(T / chunks / 8))

    def split(x):
        # The last chunk is filled up with copies of slot 0, whose results are cut off again.
        filler = jnp.broadcast_to(x[:, :1], (B, chunks * slots - T, *x.shape[2:]))
        return jnp.moveaxis(jnp.concatenate([x, filler], axis=1).reshape(B, chunks, slots, *x.shape[2:]), 1, 0)

    pieces = jax.tree.map(split, inputs)
    if unrolled:
        out = _unrolled(chunk, _rounded(head, inputs[0]), pieces, None if selected is None else -(-selected // slots))
    else:
        # `custom_vjp` needs arrays with gradients and arrays without (tokens, keys) as separate arguments.
        leaves, tree = jax.tree.flatten(pieces)
        floats = {n: x for n, x in enumerate(leaves) if jnp.issubdtype(x.dtype, jnp.floating)}
        others = {n: x for n, x in enumerate(leaves) if n not in floats}
        count = jnp.int32(chunks if selected is None else -(-selected // slots))
        out = _looped(chunk, tree, head, floats, others, count)
    return jax.tree.map(lambda y: jnp.moveaxis(y, 0, 1).reshape(B, chunks * slots, *y.shape[3:])[:, :T], out)


def _unrolled(chunk: Chunk, head: Head, pieces, count: jax.Array | None):
    """Maps over the first axis without a loop, which would copy the logits of all chunks for its backward pass."""

    def one(number):
        xs = jax.tree.map(lambda x: x[number], pieces)
        if count is None:
            return chunk(head, *xs)[0]
        nothing = jax.tree.map(lambda y: jnp.zeros(y.shape, y.dtype), jax.eval_shape(chunk, head, *xs)[0])
        return jax.lax.cond(number < count, lambda: chunk(head, *xs)[0], lambda: nothing)

    return jax.tree.map(lambda *ys: jnp.stack(ys), *[one(n) for n in range(pieces[0].shape[0])])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _looped(chunk: Chunk, tree, head: Head, floats, others, count: jax.Array):
    """Maps over the first `count` chunks of the first axis; the results of the others are zeros.

    The backward pass is a second loop, which adds to one gradient of the head. The one that JAX derives would have a
    branch for the skipped chunks, and a branch copies the head's gradient in every iteration.

    Args:
      chunk: the function that is mapped; static.
      tree: structure of the inputs, whose leaves are `floats` and `others` by number; static.
      head: the output projection.
      floats: arrays [chunks,b,t,...] with gradients.
      others: arrays [chunks,b,t,...] without gradients.
      count: i32[], at most the number of chunks.
    """
    return _looped_forward(chunk, tree, head, floats, others, count)[0]


def _looped_forward(chunk, tree, head, floats, others, count):
    rounded = _rounded(head, floats[0])

    def turn(xs):
        return chunk(rounded, *_joined(tree, *xs))

    chunks = floats[0].shape[0]
    shapes = jax.eval_shape(turn, _at((floats, others), 0))
    empty = jax.tree.map(lambda y: jnp.zeros((chunks, *y.shape), y.dtype), shapes)
    out, saved = _loop(count, chunks, lambda n, made: _put(made, n, turn(_at((floats, others), n))), empty)
    return out, (head, floats, others, count, saved)


def _looped_backward(chunk, tree, residuals, g):
    head, floats, others, count, saved = residuals
    rounded = _rounded(head, floats[0])

    def turn(n, sums):
        d_head, d_floats = sums

        def one(head, floats):
            return chunk(head, *_joined(tree, floats, _at(others, n)), saved=_at(saved, n))[0]

        _, back = jax.vjp(one, rounded, _at(floats, n))
        more_head, more_floats = back(_at(g, n))
        d_head = jax.tree.map(lambda total, more: total + more.astype(total.dtype), d_head, more_head)
        return d_head, _put(d_floats, n, more_floats)

    empty = jax.tree.map(jnp.zeros_like, (head, floats))
    d_head, d_floats = _loop(count, floats[0].shape[0], turn, empty)
    return d_head, d_floats, None, None


_looped.defvjp(_looped_forward, _looped_backward)


MAX_TRIPS_SCOPE = "at_most_"
"""Named scope of a loop whose trip count is a run-time value, followed by its maximum; `planning.hlo` reads it."""


def _loop(count: jax.Array, most: int, body: Callable, init):
    """Loops over 0..count-1. The named scope gives the maximum `most` to tools that read the compiled program."""
    with jax.named_scope(f"{MAX_TRIPS_SCOPE}{most}"):
        return jax.lax.fori_loop(0, count, body, init)


def _joined(tree, floats, others):
    return jax.tree.unflatten(tree, [x for _, x in sorted((floats | others).items())])


def _at(tree, number):
    return jax.tree.map(lambda x: x[number], tree)


def _put(tree, number, values):
    return jax.tree.map(lambda all, one: all.at[number].set(one), tree, values)


def _rounded(head: Head, like: jax.Array) -> Head:
    """Returns the head with its matrix in the compute dtype: converted once, not in every chunk."""
    return head.replace(weight_VD=head.weight_VD.astype(like.dtype))


def _min_slots(B: int, T: int, min_tokens: int) -> int:
    """Returns the slots per chunk if chunks may be skipped: a multiple of 8, the rows of a TPU tile."""
    return 8 * math.ceil(max(T / MAX_PIECES, min_tokens / B) / 8)


def _permute(x: jax.Array, order_BT: jax.Array, back_BT: jax.Array) -> jax.Array:
    """Returns x[b, order[b, t]]. With `back`, the inverse of `order`, the gradient is a gather instead of a scatter."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        # Batches in a closure may be NumPy arrays, which cannot be indexed by a tracer.
        x = x if isinstance(x, jax.Array) else jnp.asarray(x)
        return x[jnp.arange(x.shape[0])[:, None], order_BT]
    return _permute_floats(x, order_BT, back_BT)


@jax.custom_vjp
def _permute_floats(x, order_BT, back_BT):
    return jnp.take_along_axis(x, order_BT.reshape(*order_BT.shape, *[1] * (x.ndim - 2)), axis=1)


def _permute_forward(x, order_BT, back_BT):
    return _permute_floats(x, order_BT, back_BT), (order_BT, back_BT)


def _permute_backward(residuals, g):
    order_BT, back_BT = residuals
    return _permute_floats(g, back_BT, order_BT), None, None


_permute_floats.defvjp(_permute_forward, _permute_backward)
