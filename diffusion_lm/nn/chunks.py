"""Maps over the tokens of a batch in chunks, for arrays as wide as the vocabulary.

Chunks run along T, so that rows stay on the devices that hold them. Where the logits do not fit in one chunk, the
backward pass computes each chunk's again: at 256,000 tokens they are the largest array of a step by far. The gradients
of the head are summed in float32.

Conditioning has no loss and is never drawn, so its states need not meet the vocabulary at all: with `where_BT`, the
wanted slots of each row move side by side, and the chunks behind the last of them are skipped at run time.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from diffusion_lm.nn.head import Head

Chunk = Callable[..., tuple[Any, Any]]
"""What is mapped, `chunk(head, *inputs, kept=None)` on slices [b,t,...] of the inputs: what is wanted, and what the
backward pass hands back as `kept` because it need not be computed again; both trees of arrays [b,t,...]. Tokens are
treated one by one, as slots are reordered."""

MOST_PIECES = 8
"""Chunks of a row where only some slots are wanted and what is behind the last can be skipped. Few are better: each
reads the head, in training several times and its gradient too, and is compiled anew where the loop is unrolled."""

LEAST_TOKENS = 32
"""Tokens whose logits are worth a product of their own. In training half as many as the network is wide, and in a loop
twice the width: there a chunk reads the head three times and adds to its gradient, 14 bytes a weight in bfloat16, and
moves 14 bytes a logit, half a chunk of them in vain where some slots are wanted. So n tokens in chunks of c cost
(n / c + 1 / 2) (D + c), least at sqrt(2 n D); twice the width is near it, and half of its memory."""

UNROLLED_BYTES = 2**28
"""What the head's gradients from all chunks may take where the loop over chunks is unrolled: XLA need not add them up
one by one."""


def over_chunks(chunk: Chunk, head: Head, inputs, chunk_tokens: int, where_BT: jax.Array | None, least: int = 0):
    """Maps `chunk(head, *inputs)` over slices of axis 1.

    Args:
      chunk: what is mapped. It must not close over what gradients are wanted of.
      head: the output projection.
      inputs: tree of arrays [B,T,...], the first of them the hidden states.
      chunk_tokens: most tokens of a chunk (at least one slot of each row); static.
      where_BT: bool[B,T], the slots that are wanted; zeros elsewhere. None = all.
      least: tokens below which a chunk is not cut where only some slots are wanted; static.

    Returns:
      What `chunk` returns first, over [B,T].
    """
    if where_BT is None:
        return _map_chunks(chunk, head, inputs, chunk_tokens, None, least)
    order = jnp.argsort(~where_BT, axis=1, stable=True)
    back = jnp.argsort(order, axis=1)
    moved = jax.tree.map(lambda x: _permute(x, order, back), inputs)
    out = _map_chunks(chunk, head, moved, chunk_tokens, jnp.max(jnp.sum(where_BT, axis=1)), least)

    def to_slots(y):
        wanted = where_BT.reshape(*where_BT.shape, *[1] * (y.ndim - 2))
        return jnp.where(wanted, _permute(y, back, order), jnp.zeros((), y.dtype))

    return jax.tree.map(to_slots, out)


def _map_chunks(chunk: Chunk, head: Head, inputs, chunk_tokens: int, wanted: jax.Array | None, least: int):
    """Maps over chunks; those that begin at slot `wanted` or later are zeros and cost nothing."""
    B, T = inputs[0].shape[:2]
    most = max(1, chunk_tokens // B)

    def slots_of(least: int) -> int:
        return most if wanted is None else min(most, _grain(B, T, max(least, LEAST_TOKENS)))

    slots = slots_of(least)
    unrolled = most >= T and -(-T // slots) * head.weight_VD.size * 4 <= UNROLLED_BYTES
    if not unrolled:
        slots = slots_of(4 * least)
    if slots >= T:
        return chunk(head, *inputs)[0]
    chunks = -(-T // slots)
    slots = -(-T // chunks) if wanted is None else min(slots, 8 * math.ceil(T / chunks / 8))

    def split(x):
        filler = jnp.broadcast_to(x[:, :1], (B, chunks * slots - T, *x.shape[2:]))
        return jnp.moveaxis(jnp.concatenate([x, filler], axis=1).reshape(B, chunks, slots, *x.shape[2:]), 1, 0)

    pieces = jax.tree.map(split, inputs)
    if unrolled:
        out = _unrolled(chunk, _rounded(head, inputs[0]), pieces, None if wanted is None else -(-wanted // slots))
    else:
        # What has a gradient apart from what has none.
        leaves, tree = jax.tree.flatten(pieces)
        floats = {n: x for n, x in enumerate(leaves) if jnp.issubdtype(x.dtype, jnp.floating)}
        others = {n: x for n, x in enumerate(leaves) if n not in floats}
        turns = jnp.int32(chunks if wanted is None else -(-wanted // slots))
        out = _looped(chunk, tree, head, floats, others, turns)
    return jax.tree.map(lambda y: jnp.moveaxis(y, 0, 1).reshape(B, chunks * slots, *y.shape[3:])[:, :T], out)


def _unrolled(chunk: Chunk, head: Head, pieces, turns: jax.Array | None):
    """Maps over the first axis, without a loop: it would copy the logits of all chunks for its backward pass."""

    def one(number):
        xs = jax.tree.map(lambda x: x[number], pieces)
        if turns is None:
            return chunk(head, *xs)[0]
        nothing = jax.tree.map(lambda y: jnp.zeros(y.shape, y.dtype), jax.eval_shape(chunk, head, *xs)[0])
        return jax.lax.cond(number < turns, lambda: chunk(head, *xs)[0], lambda: nothing)

    return jax.tree.map(lambda *ys: jnp.stack(ys), *[one(n) for n in range(pieces[0].shape[0])])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _looped(chunk: Chunk, tree, head: Head, floats, others, turns: jax.Array):
    """Maps over the first `turns` of the first axis; zeros behind them.

    Its own backward pass is a second loop that adds to one gradient of the head. What JAX derives keeps a branch for
    the chunks that are skipped, and a branch copies the head's gradient in every turn.

    Args:
      chunk: what is mapped; static.
      tree: structure of the inputs, whose leaves are `floats` and `others` by number; static.
      head: the output projection.
      floats: arrays [chunks,b,t,...] with gradients.
      others: arrays [chunks,b,t,...] without.
      turns: i32[], at most the number of chunks.
    """
    return _looped_forward(chunk, tree, head, floats, others, turns)[0]


def _looped_forward(chunk, tree, head, floats, others, turns):
    rounded = _rounded(head, floats[0])

    def turn(xs):
        return chunk(rounded, *_joined(tree, *xs))

    chunks = floats[0].shape[0]
    shapes = jax.eval_shape(turn, _at((floats, others), 0))
    empty = jax.tree.map(lambda y: jnp.zeros((chunks, *y.shape), y.dtype), shapes)
    out, kept = _first(turns, chunks, lambda n, made: _put(made, n, turn(_at((floats, others), n))), empty)
    return out, (head, floats, others, turns, kept)


def _looped_backward(chunk, tree, residuals, g):
    head, floats, others, turns, kept = residuals
    rounded = _rounded(head, floats[0])

    def turn(n, sums):
        d_head, d_floats = sums

        def one(head, floats):
            return chunk(head, *_joined(tree, floats, _at(others, n)), kept=_at(kept, n))[0]

        _, back = jax.vjp(one, rounded, _at(floats, n))
        more_head, more_floats = back(_at(g, n))
        d_head = jax.tree.map(lambda total, more: total + more.astype(total.dtype), d_head, more_head)
        return d_head, _put(d_floats, n, more_floats)

    empty = jax.tree.map(jnp.zeros_like, (head, floats))
    d_head, d_floats = _first(turns, floats[0].shape[0], turn, empty)
    return d_head, d_floats, None, None


_looped.defvjp(_looped_forward, _looped_backward)


MAX_TRIPS_SCOPE = "at_most_"
"""Named scope of a loop whose trip count is a run-time value, followed by its maximum; `planning.hlo` reads it."""


def _first(turns: jax.Array, most: int, body: Callable, init):
    """Loops over 0..turns-1. The named scope gives the maximum `most` to tools that read the compiled program."""
    with jax.named_scope(f"{MAX_TRIPS_SCOPE}{most}"):
        return jax.lax.fori_loop(0, turns, body, init)


def _joined(tree, floats, others):
    return jax.tree.unflatten(tree, [x for _, x in sorted((floats | others).items())])


def _at(tree, number):
    return jax.tree.map(lambda x: x[number], tree)


def _put(tree, number, values):
    return jax.tree.map(lambda all, one: all.at[number].set(one), tree, values)


def _rounded(head: Head, like: jax.Array) -> Head:
    """Returns the head with its matrix in the compute dtype: once, and not in every chunk."""
    return head.replace(weight_VD=head.weight_VD.astype(like.dtype))


def _grain(B: int, T: int, least_tokens: int) -> int:
    """Returns the slots of a chunk where some may be skipped: a multiple of 8, the rows of a TPU's tile."""
    return 8 * math.ceil(max(T / MOST_PIECES, least_tokens / B) / 8)


def _permute(x: jax.Array, order_BT: jax.Array, back_BT: jax.Array) -> jax.Array:
    """Returns x[b, order[b, t]]; `back` is the inverse of `order`, by which the gradient is a gather and no scatter."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        # Batches that are closed over may be numpy's, which cannot be indexed by a tracer.
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
