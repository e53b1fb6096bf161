"""Blocks: a window decoded from left to right in pieces, each with steps of its own, inside one compiled loop."""

import flax.struct
import jax
import jax.numpy as jnp

from diffusion_lm.nn.named_masks import NamedBlocks

FIRST_BLOCKS = ("target", "example")


@flax.struct.dataclass
class Blocks:
    """The blocks of each row's target window.

    Each row is in a block of its own and moves on by itself, so it does not depend on its neighbours. Counted from the
    target, a block is `size` target slots, fixed slots between them left out, so windows with holes have blocks too.
    Counted from the example, a block is `size` slots of the row: the first one may open with the end of the
    conditioning, whose tokens are known (SDAR, Fast-dLLM v2), and blocks without a target slot are none.

    Attributes:
      number: i32[R,T], the block of each target slot; -1 on conditioning.
      counts: i32[R], blocks of each row; 0 for a row that only fills up the batch.
      size: slots a block, the first and the last of a row may have fewer; static; 0 = the window is one block.
      total_steps: steps for the whole window; static; None = one per slot.
    """

    number: jax.Array
    counts: jax.Array
    size: int = flax.struct.field(pytree_node=False)
    total_steps: int | None = flax.struct.field(pytree_node=False)

    @classmethod
    def of(cls, target_mask: jax.Array, size: int, total_steps: int | None, first_block: str = "target") -> "Blocks":
        """Returns the blocks of bool[R,T] windows, counted from the "target" or the "example"."""
        before = jnp.cumsum(target_mask, axis=1, dtype=jnp.int32) - target_mask
        if not size:
            opens = target_mask & (before == 0)
        elif first_block == "target":
            opens = target_mask & (before % size == 0)
        else:
            block_start = jnp.arange(target_mask.shape[1]) // size * size
            opens = target_mask & (before == before[:, block_start])
        number = jnp.where(target_mask, jnp.cumsum(opens, axis=1, dtype=jnp.int32) - 1, -1)
        return cls(number, number.max(axis=1) + 1, size, total_steps)

    def active(self, block: jax.Array) -> jax.Array:
        """Returns bool[R,T], the slots of block i32[R] of each row; none for rows that are done."""
        return self.number == block[:, None]

    def opens(self) -> jax.Array:
        """Returns bool[R,T], the first slot of each block."""
        earlier = jax.lax.cummax(self.number, axis=1)[:, :-1]
        return self.number > jnp.pad(earlier, ((0, 0), (1, 0)), constant_values=-1)

    def steps_in(self, block: jax.Array) -> jax.Array:
        """Returns i32[R], the steps of block i32[R], at least 1.

        The total is spread as evenly as whole numbers allow, whether or not the blocks divide it (trap T39). A window
        with more blocks than steps gets one step a block.
        """
        if self.total_steps is None:
            return jnp.maximum(jnp.sum(self.active(block), axis=1, dtype=jnp.int32), 1)
        counts = jnp.maximum(self.counts, 1)
        return jnp.maximum(
            (block + 1) * self.total_steps // counts - block * self.total_steps // counts,
            1,
        )

    def most_steps(self) -> int:
        """Returns the steps of the longest possible window, a static number."""
        length = self.number.shape[1]
        if self.total_steps is None:
            return length
        return max(self.total_steps, -(-length // self.size) if self.size else 1)


def seed_slots(target_mask: jax.Array, blocks: Blocks, network: NamedBlocks | None) -> jax.Array:
    """Returns bool[R,T], the target slots with which a block of the network opens (`BlockDiffusion.block_start`).

    Where the network has none, they are those with which a block of the sampler opens.
    """
    if network is None:
        return blocks.opens()
    place = jnp.arange(target_mask.shape[1])[None] - network.starts(target_mask)[:, None]
    return target_mask & (place % network.size == 0)


def unfinished_slots(target_mask: jax.Array, active: jax.Array, blocks: NamedBlocks) -> jax.Array:
    """Returns bool[R,T], the slots from the network's block on that holds the first active slot of each row."""
    starts = blocks.starts(target_mask)
    first = jnp.argmax(active, axis=1).astype(jnp.int32)
    opening = starts + (first - starts) // blocks.size * blocks.size
    return jnp.arange(target_mask.shape[1])[None] >= opening[:, None]
