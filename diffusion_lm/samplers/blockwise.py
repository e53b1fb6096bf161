"""Blocks: a window decoded from left to right in pieces, each with steps of its own, inside one compiled loop."""

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class Blocks:
    """The blocks of each row's target window.

    Each row is in a block of its own and moves on by itself, so it does not depend on its neighbours. Target slots are
    counted along the row, fixed slots between them left out, so windows with holes have blocks too.

    Attributes:
      number: i32[R,T], the block of each target slot; -1 on conditioning.
      windows: i32[R], target slots of each row.
      counts: i32[R], blocks of each row; 0 for a row that only fills up the batch.
      size: slots a block, the last of a row may be shorter; static; 0 = the window is one block.
      total_steps: steps for the whole window; static; None = one per slot.
    """

    number: jax.Array
    windows: jax.Array
    counts: jax.Array
    size: int = flax.struct.field(pytree_node=False)
    total_steps: int | None = flax.struct.field(pytree_node=False)

    @classmethod
    def of(cls, target_mask: jax.Array, size: int, total_steps: int | None) -> "Blocks":
        """Returns the blocks of bool[R,T] windows."""
        windows = jnp.sum(target_mask, axis=1, dtype=jnp.int32)
        rank = jnp.cumsum(target_mask, axis=1, dtype=jnp.int32) - 1
        number = jnp.where(target_mask, rank // size if size else 0, -1)
        return cls(number, windows, number.max(axis=1) + 1, size, total_steps)

    def active(self, block: jax.Array) -> jax.Array:
        """Returns bool[R,T], the slots of block i32[R] of each row; none for rows that are done."""
        return self.number == block[:, None]

    def steps_in(self, block: jax.Array) -> jax.Array:
        """Returns i32[R], the steps of block i32[R], at least 1.

        The total is spread as evenly as whole numbers allow, whether or not the blocks divide it (trap T39). A window
        with more blocks than steps gets one step a block.
        """
        if self.total_steps is None:
            if not self.size:
                return jnp.maximum(self.windows, 1)
            return jnp.clip(self.windows - block * self.size, 1, self.size)
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
