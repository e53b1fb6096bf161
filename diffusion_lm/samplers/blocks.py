"""Blocks: a window is decoded from left to right in blocks, each with its own steps, inside one compiled loop."""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp

from diffusion_lm.core.checks import check_count
from diffusion_lm.nn.named_masks import NamedBlocks, named_blocks
from diffusion_lm.samplers.caching import BlockCache


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Settings of block-by-block decoding with MASK.

    Blocks are counted from the first target token, or, if the sampler's visibility is "example_blocks:N", from the
    first token of the row. Then the end of the prompt is the known part of the first block. Where the network has
    blocks (`visibility`), smaller ones here are the sub-blocks of Fast-dLLM v2: an order inside the network's block.

    Attributes:
      size: tokens per block.
      seeds: the first token of a block of the network is sampled alone, in a step before the rest of the block, as
        `BlockDiffusion.block_start = "seed"` trains it. With as many steps as slots; where steps are fewer, a block of
        one step samples all its slots at once. With a cache and a visibility without blocks, the first token of each
        block of the sampler.
      causal_context: for networks trained with `BlockDiffusion.causal_clean`: finished blocks and conditioning are
        causal, and the block of the network that is being decoded attends to itself and to all before it.
      cache: `caching.PrefixCache` or `DualCache`: after a block's first step only a part of each row is run again, and
        the keys and values of the rest are reused (Fast-dLLM, arXiv 2505.22618). An approximation, unless the
        visibility hides the block from what is cached. Rows of a batch then enter each block together. None = no cache.
    """

    size: int = 32
    seeds: bool = False
    causal_context: bool = False
    cache: BlockCache | None = None

    def __post_init__(self):
        check_count(self.size, "Blocks.size", "blocks = None decodes the window as one block.")


@flax.struct.dataclass
class RowBlocks:
    """The blocks of each row's target window.

    Each row is in its own block and advances by itself, so it does not depend on the other rows. Counted from the
    target, a block is `size` target slots without the fixed slots between them, so windows with gaps have blocks too.
    Counted from the example, a block is `size` slots of the row: the first one may start with the end of the
    conditioning, whose tokens are known (SDAR, Fast-dLLM v2). Blocks without a target slot do not exist.

    Attributes:
      number: i32[R,T], the block of each target slot; -1 on conditioning.
      counts: i32[R], number of blocks of each row; 0 for a row that only fills up the batch.
      size: slots per block; the first and the last of a row may have fewer; static; 0 = the window is one block.
      total_steps: steps for the whole window; static; None = one per slot.
    """

    number: jax.Array
    counts: jax.Array
    size: int = flax.struct.field(pytree_node=False)
    total_steps: int | None = flax.struct.field(pytree_node=False)

    @classmethod
    def of(cls, target_mask: jax.Array, size: int, total_steps: int | None, visibility: str = "full") -> "RowBlocks":
        """Returns the blocks of bool[R,T] windows; `visibility` says where they are counted from."""
        network = named_blocks(visibility)
        before = jnp.cumsum(target_mask, axis=1, dtype=jnp.int32) - target_mask
        if not size:
            opens = target_mask & (before == 0)
        elif network is None or network.first_block == "target":
            opens = target_mask & (before % size == 0)
        else:
            block_start = jnp.arange(target_mask.shape[1]) // size * size
            # The first target slot of each block of the row: no target slot of the block is before it.
            opens = target_mask & (before == before[:, block_start])
        number = jnp.where(target_mask, jnp.cumsum(opens, axis=1, dtype=jnp.int32) - 1, -1)
        return cls(number, number.max(axis=1) + 1, size, total_steps)

    def active(self, block: jax.Array) -> jax.Array:
        """Returns bool[R,T], the slots of block i32[R] of each row; none in rows that are done."""
        return self.number == block[:, None]

    def first_slots(self) -> jax.Array:
        """Returns bool[R,T], the first slot of each block."""
        earlier = jax.lax.cummax(self.number, axis=1)[:, :-1]
        return self.number > jnp.pad(earlier, ((0, 0), (1, 0)), constant_values=-1)

    def steps_in(self, block: jax.Array) -> jax.Array:
        """Returns i32[R], the steps of block i32[R], at least 1.

        The total is spread as evenly as whole numbers allow, whether or not the blocks divide it (trap T39). A window
        with more blocks than steps gets one step per block.
        """
        if self.total_steps is None:
            return jnp.maximum(jnp.sum(self.active(block), axis=1, dtype=jnp.int32), 1)
        # Block b has floor((b + 1) T / n) - floor(b T / n) steps, which sum to T over the n blocks.
        counts = jnp.maximum(self.counts, 1)
        return jnp.maximum(
            (block + 1) * self.total_steps // counts - block * self.total_steps // counts,
            1,
        )

    def most_steps(self) -> int:
        """Returns the number of steps of the longest possible window, which is static."""
        length = self.number.shape[1]
        if self.total_steps is None:
            return length
        return max(self.total_steps, -(-length // self.size) if self.size else 1)


def seed_slots(target_mask: jax.Array, blocks: RowBlocks, network: NamedBlocks | None) -> jax.Array:
    """Returns bool[R,T], the target slots that are first in a block of the network (`BlockDiffusion.block_start`).

    If the network has no blocks, those that are first in a block of the sampler.
    """
    if network is None:
        return blocks.first_slots()
    place = jnp.arange(target_mask.shape[1])[None] - network.starts(target_mask)[:, None]
    return target_mask & (place % network.size == 0)


def unfinished_slots(target_mask: jax.Array, active: jax.Array, blocks: NamedBlocks) -> jax.Array:
    """Returns bool[R,T]: in each row, the network's block with the first active slot, and all later slots."""
    starts = blocks.starts(target_mask)
    first = jnp.argmax(active, axis=1).astype(jnp.int32)
    opening = starts + (first - starts) // blocks.size * blocks.size
    return jnp.arange(target_mask.shape[1])[None] >= opening[:, None]
