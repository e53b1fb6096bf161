"""Maps over the tokens of a batch in chunks, for arrays as wide as the vocabulary.

Chunks run along T, so that rows stay on the devices that hold them. Where the logits do not fit in one chunk, the
backward pass computes each chunk's again: at 256,000 tokens they are the largest array of a step by far.

Conditioning has no loss and is never drawn, so its states need not meet the vocabulary at all: with `where_BT`, the
wanted slots of each row move side by side, and the chunks behind the last of them are skipped at run time.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from diffusion_lm.nn.head import Head

MOST_PIECES = 8
"""Chunks of a row where only some slots are wanted and what is behind the last can be skipped. Few are better: each
reads the head, in training several times and its gradient too, and is compiled anew where the loop is unrolled."""

LEAST_TOKENS = 32
"""Tokens whose logits are worth a product of their own. In training half as many as the network is wide: below that, a
chunk's reading the head and adding to its gradient, twice 4 bytes a weight, is more than its logits are."""

UNROLLED_BYTES = 2**28
"""What the head's gradients from all chunks may take where the loop over chunks is unrolled: XLA need not add them up
one by one."""


PER_TOKEN = "per_token"
"""Name (`jax.ad_checkpoint.checkpoint_name`) of what a chunk need not compute again in its backward pass: a number a
token, made from all of its logits."""


def over_chunks(chunk: Callable, head: Head, inputs, chunk_tokens: int, where_BT: jax.Array | None, least: int = 0):
    """Maps `chunk(head, *inputs)` over slices of axis 1.

    Args:
      chunk: from the head and slices [b,t,...] of the inputs to a tree of arrays [b,t,...]; it must treat tokens one by
        one, as slots are reordered.
      head: the output projection.
      inputs: tree of arrays [B,T,...], the first of them the hidden states.
      chunk_tokens: most tokens of a chunk (at least one slot of each row); static.
      where_BT: bool[B,T], the slots that are wanted; zeros elsewhere. None = all.
      least: tokens below which a chunk is not cut where only some slots are wanted; static.

    Returns:
      What `chunk` returns, over [B,T].
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


def _map_chunks(chunk: Callable, head: Head, inputs, chunk_tokens: int, wanted: jax.Array | None, least: int):
    """Maps over chunks; those that begin at slot `wanted` or later are zeros and cost nothing."""
    B, T = inputs[0].shape[:2]
    slots = max(1, chunk_tokens // B)
    fits = slots >= T
    if wanted is not None:
        slots = min(slots, _grain(B, T, max(least, LEAST_TOKENS)))
    if slots >= T:
        return chunk(head, *inputs)
    chunks = -(-T // slots)
    if wanted is None:
        slots = -(-T // chunks)
    head = head.replace(weight_VD=head.weight_VD.astype(inputs[0].dtype))

    def split(x):
        filler = jnp.broadcast_to(x[:, :1], (B, chunks * slots - T, *x.shape[2:]))
        return jnp.moveaxis(jnp.concatenate([x, filler], axis=1).reshape(B, chunks, slots, *x.shape[2:]), 1, 0)

    def one(number, xs):
        if wanted is None:
            return chunk(head, *xs)
        nothing = jax.tree.map(lambda y: jnp.zeros(y.shape, y.dtype), jax.eval_shape(chunk, head, *xs))
        return jax.lax.cond(number * slots < wanted, lambda: chunk(head, *xs), lambda: nothing)

    unrolled = fits and chunks * head.weight_VD.size * 4 <= UNROLLED_BYTES
    if not unrolled:
        # Around the branch and not in it: a branch hands all that its backward pass reads to the loop, which would then
        # keep a copy of the head for every chunk.
        kept = jax.checkpoint_policies.save_only_these_names(PER_TOKEN)
        one = jax.checkpoint(one, policy=kept, prevent_cse=False)

    numbered = (jnp.arange(chunks), jax.tree.map(split, inputs))
    if unrolled:
        # A loop would copy the logits of all chunks into one array for its backward pass.
        pieces = [one(*jax.tree.map(lambda x, n=n: x[n], numbered)) for n in range(chunks)]
        out = jax.tree.map(lambda *ys: jnp.stack(ys), *pieces)
    else:
        _, out = jax.lax.scan(lambda _, xs: (None, one(*xs)), None, numbered)
    return jax.tree.map(lambda y: jnp.moveaxis(y, 0, 1).reshape(B, chunks * slots, *y.shape[3:])[:, :T], out)


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
