"""Blocks of a row: which block each token lies in, how many maskable tokens a block has, and draws inside blocks."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from diffusion_lm.core.types import Batch

FIRST_BLOCKS = ("example", "target")


class BlockLayout(NamedTuple):
    """The blocks of a batch; all fields are [B,T].

    Attributes:
      ids: i32, the block's number inside its example; -1 for conditioning where blocks are counted from the target.
      is_start: bool, the first token of a block.
      runs: i32, numbers the blocks along the row, over packed examples.
    """

    ids: jax.Array
    is_start: jax.Array
    runs: jax.Array


def blocks_of(batch: Batch, size: int | jax.Array, first_block: str) -> BlockLayout:
    """Returns the blocks of `size` tokens.

    Args:
      batch: any batch, packed or not.
      size: tokens per block, i32[] where it changes during training; the last block of an example may be shorter.
      first_block: "example": block 0 opens with the example, so that conditioning fills the first blocks and may share
        one with the target (BD3-LM, SDAR, Fast-dLLM v2); "target": block 0 opens with the target, and conditioning is
        one block before it.
    """
    if first_block == "example":
        ids = batch.positions // size
    else:
        # Positions count up from 0 inside an example, so an example begins `position` slots to the left of a token.
        before = jnp.cumsum(batch.target_mask, axis=1) - batch.target_mask
        opening = jnp.arange(batch.tokens.shape[1]) - batch.positions
        # The rank of a target token inside its own example, in a row that may hold several.
        rank = before - jnp.take_along_axis(before, opening, axis=1)
        ids = jnp.where(batch.target_mask, rank // size, -1)

    def changes(values):
        first = jnp.ones_like(values[:, :1], bool)
        return jnp.concatenate([first, values[:, 1:] != values[:, :-1]], axis=1)

    # Two examples side by side may end and start with the same block number.
    is_start = changes(ids) | changes(batch.segment_ids)
    return BlockLayout(ids, is_start, jnp.cumsum(is_start, axis=1) - 1)


def sum_by_run(values_BT: jax.Array, runs_BT: jax.Array) -> jax.Array:
    """Returns, for each token, the sum of `values` over the run (block or example) it lies in."""

    def row(values, runs):
        return jax.ops.segment_sum(values, runs, num_segments=values.shape[0] + 1)[runs]

    return jax.vmap(row)(values_BT, runs_BT)


def smallest_in_block(
    uniform_BT: jax.Array, count_BT: jax.Array, maskable_BT: jax.Array, blocks: BlockLayout
) -> jax.Array:
    """Returns bool[B,T], True on the `count` maskable tokens of each block with the smallest uniforms.

    With independent uniforms every subset of that size is equally likely.
    """
    slots = jnp.broadcast_to(jnp.arange(uniform_BT.shape[1]), uniform_BT.shape)
    # 2 is above every uniform: tokens that cannot be masked sort last in their block.
    uniform_BT = jnp.where(maskable_BT, uniform_BT, 2.0)
    order = jnp.lexsort((uniform_BT, blocks.runs), axis=1)
    # Blocks lie side by side and keep their place in the order, so a rank is a distance to the block's first slot.
    start = jax.lax.cummax(jnp.where(blocks.is_start, slots, 0), axis=1)
    rank = jnp.argsort(order, axis=1) - start
    return (rank < count_BT) & maskable_BT


def later_rates(
    rate_BT: jax.Array, maskable_BT: jax.Array, blocks: BlockLayout, half_life: float | jax.Array, steps: int = 30
) -> jax.Array:
    """Returns f32[B,T] mask rates that grow along a block and whose mean over its maskable tokens is its rate.

    Efficient-DLM (arXiv 2512.14067) masks t n of a block's n tokens, picked with the weights w_i = exp(beta (1 - t) i)
    without replacement: later tokens first where little is masked, all alike where much is. Here tokens are masked
    independently with the rates r_i = 1 - exp(-c w_i), which are those of that draw stopped at a fixed time; c is such
    that the block's mean is t. So each token's rate, and with it its weight, is known.

    Args:
      rate_BT: f32[B,T] in [0, 1], the rate t of each token's block.
      maskable_BT: bool[B,T].
      blocks: the blocks.
      half_life: tokens over which the weight doubles as t goes to 0; beta = log 2 / half_life.
      steps: bisections of log c.
    """
    slots = jnp.arange(rate_BT.shape[1])
    place = slots - jax.lax.cummax(jnp.where(blocks.is_start, slots, 0), axis=1)
    # The expected number of masked tokens, which bisection matches.
    wanted = sum_by_run(jnp.where(maskable_BT, rate_BT, 0.0), blocks.runs)
    log_w = jnp.log(2.0) / half_life * (1.0 - rate_BT) * place

    def rates(log_c):
        # expm1 keeps small rates; beyond exp(5) the rate is 1 in float32 anyway.
        return -jnp.expm1(-jnp.exp(jnp.minimum(log_c + log_w, 5.0)))

    def halve(_, ends):
        low, high = ends
        middle = 0.5 * (low + high)
        below = sum_by_run(jnp.where(maskable_BT, rates(middle), 0.0), blocks.runs) < wanted
        return jnp.where(below, middle, low), jnp.where(below, high, middle)

    # The first token's weight is 1, so all rates are 1 at the upper end; at the lower one they are below any drawn.
    ends = (jnp.full(rate_BT.shape, -60.0), jnp.full(rate_BT.shape, 5.0))
    low, high = jax.lax.fori_loop(0, steps, halve, ends)
    return jnp.where(rate_BT >= 1.0, 1.0, rates(0.5 * (low + high)))
