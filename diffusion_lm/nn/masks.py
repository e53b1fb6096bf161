"""Attention visibility as an algebra: who may see whom is an argument of a forward pass, never part of a network.

A `Visibility` is a pytree expression that carries its own per-row arrays. `&` and `|` combine expressions; `dense`
evaluates one for the queries at hand, all slots of a row in training or the one slot that is decoded from a cache.
"""

from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from diffusion_lm.core.errors import ConfigError


class Sides(NamedTuple):
    """What is known of every slot, once for the queries and once for the keys; the two broadcast against each other.

    Attributes:
      queries: the values at the queries' slots.
      keys: the values at the keys' slots.
    """

    queries: Any
    keys: Any


class Visibility:
    """Base of all expressions. Slots are indices into the row, not position ids.

    An expression is evaluated for all pairs at once (`dense`) or tile by tile inside of a kernel (`nn/flash.py`). Both
    put a pair of `Sides` in the place of each of its arrays and ask `seen`, which only compares, element by element.
    """

    def seen(self, slots: Sides, num_keys: int) -> Any:
        """Says who sees whom, of an expression whose arrays are `Sides`.

        Args:
          slots: i32, numbers of the slots.
          num_keys: T, the number of key slots.

        Returns:
          bool, as the sides broadcast; or True, where everything is seen.
        """
        raise NotImplementedError

    def dense(self, q_slots: jax.Array | None, num_keys: int) -> jax.Array:
        """Evaluates the expression.

        Args:
          q_slots: i32[B,Q], the slots of the queries; None means all slots 0..num_keys-1.
          num_keys: T, the number of key slots.

        Returns:
          bool[B|1,Q,T], True where the query may attend to the key; the leading axis is 1 where rows do not differ.
        """
        every = jnp.arange(num_keys)[None]
        slots = Sides((every if q_slots is None else q_slots)[:, :, None], every[:, None, :])
        paired = jax.tree.map(lambda values: _sides(values, q_slots), self)
        seen = jnp.asarray(paired.seen(slots, num_keys))
        return jnp.broadcast_to(seen, jnp.broadcast_shapes(seen.shape, (1, slots.queries.shape[1], num_keys)))

    @property
    def copies(self) -> int:
        """How many copies of one row lie side by side: 2 for [noisy ; clean]. Their slots share their distances."""
        return 1

    def __and__(self, other: "Visibility") -> "Visibility":
        return And(self, other)

    def __or__(self, other: "Visibility") -> "Visibility":
        return Or(self, other)


@flax.struct.dataclass
class And(Visibility):
    """Seen when both sides allow it."""

    left: Visibility
    right: Visibility

    def seen(self, slots, num_keys):
        return self.left.seen(slots, num_keys) & self.right.seen(slots, num_keys)

    @property
    def copies(self):
        return max(self.left.copies, self.right.copies)


@flax.struct.dataclass
class Or(Visibility):
    """Seen when either side allows it."""

    left: Visibility
    right: Visibility

    def seen(self, slots, num_keys):
        return self.left.seen(slots, num_keys) | self.right.seen(slots, num_keys)

    @property
    def copies(self):
        return max(self.left.copies, self.right.copies)


@flax.struct.dataclass
class Causal(Visibility):
    """A query sees its own slot and the slots before it."""

    def seen(self, slots, num_keys):
        return slots.keys <= slots.queries


@flax.struct.dataclass
class Full(Visibility):
    """Every query sees every key."""

    def seen(self, slots, num_keys):
        return True


@flax.struct.dataclass
class Rows(Visibility):
    """Everything is seen in some rows, nothing in the others.

    Attributes:
      allowed: bool[B|1].
    """

    allowed: Any

    def seen(self, slots, num_keys):
        return self.allowed.keys


@flax.struct.dataclass
class Conditioning(Visibility):
    """Keys that are conditioning are seen by every query; prefix-LM is `Causal() | Conditioning(~target_mask)`.

    Attributes:
      is_conditioning: bool[B,T].
    """

    is_conditioning: Any

    def seen(self, slots, num_keys):
        return self.is_conditioning.keys


@flax.struct.dataclass
class Queries(Visibility):
    """Some queries see every key, the others none; a restriction of what stands on the other side of `&`.

    `Queries(s) & Conditioning(s)` are the slots s that see each other.

    Attributes:
      asked: bool[B,T].
    """

    asked: Any

    def seen(self, slots, num_keys):
        return self.asked.queries


@flax.struct.dataclass
class Given(Visibility):
    """Seen where a matrix says so, drawn ones for instance.

    Attributes:
      matrix: bool[B|1,T,T], queries first.
    """

    matrix: Any

    def seen(self, slots, num_keys):
        return self.matrix.keys


@flax.struct.dataclass
class BlindConditioning(Visibility):
    """Conditioning queries do not see target keys; target queries see everything.

    `Full() & BlindConditioning(c)` keeps the conditioning's states independent of the canvas, so they can be cached.

    Attributes:
      is_conditioning: bool[B,T].
    """

    is_conditioning: Any

    def seen(self, slots, num_keys):
        return ~self.is_conditioning.queries | self.is_conditioning.keys


@flax.struct.dataclass
class Block(Visibility):
    """Block-causal: a query sees the keys of its own block and of earlier blocks.

    Attributes:
      size: tokens per block; static.
      starts: i32[B], the slot where block 0 begins (the first target slot); everything before it is one block that
        all later blocks see. None means slot 0.
    """

    size: int = flax.struct.field(pytree_node=False)
    starts: Any = None

    def seen(self, slots, num_keys):
        starts = Sides(0, 0) if self.starts is None else self.starts

        def block_of(slots, starts):
            # TPUs divide no integers inside a kernel; half a slot above them, float32 is exact to four million slots.
            return jnp.maximum(jnp.floor(((slots - starts).astype(jnp.float32) + 0.5) / self.size), -1.0)

        return block_of(slots.keys, starts.keys) <= block_of(slots.queries, starts.queries)


@flax.struct.dataclass
class Window(Visibility):
    """Keys nearer than `size` slots, on either side (the sliding window of Mistral, arXiv 2310.06825, once causal).

    Attributes:
      size: number of tokens seen on one side, the query's own included; static.
      count: copies of the row that lie side by side and share their distances; static.
    """

    size: int = flax.struct.field(pytree_node=False)
    count: int = flax.struct.field(pytree_node=False, default=1)

    def seen(self, slots, num_keys):
        length = num_keys // self.count

        def inside(slots):
            return slots - sum(jnp.where(slots >= copy * length, length, 0) for copy in range(1, self.count))

        return jnp.abs(inside(slots.queries) - inside(slots.keys)) < self.size

    @property
    def copies(self):
        return self.count


@flax.struct.dataclass
class Between(Visibility):
    """Queries of one copy of the row see keys of one copy, where a row holds several copies side by side.

    Attributes:
      queries: number of the copy that looks; static.
      keys: number of the copy that is seen; static.
      count: copies in the row; static.
    """

    queries: int = flax.struct.field(pytree_node=False)
    keys: int = flax.struct.field(pytree_node=False)
    count: int = flax.struct.field(pytree_node=False, default=2)

    def seen(self, slots, num_keys):
        length = num_keys // self.count

        def within(slots, copy):
            return (slots >= copy * length) & (slots < (copy + 1) * length)

        return within(slots.queries, self.queries) & within(slots.keys, self.keys)

    @property
    def copies(self):
        return self.count


@flax.struct.dataclass
class Groups(Visibility):
    """Seen by the order of group numbers, whatever the slots are.

    Attributes:
      group_ids: i32[B,T].
      order: "same" (the key's group is the query's), "earlier" or "not_later"; static.
    """

    group_ids: Any
    order: str = flax.struct.field(pytree_node=False, default="same")

    def seen(self, slots, num_keys):
        of_query, of_key = self.group_ids
        match self.order:
            case "same":
                return of_key == of_query
            case "earlier":
                return of_key < of_query
            case "not_later":
                return of_key <= of_query
        raise ConfigError(f"There is no order {self.order!r}", where="Groups.order", fix="same, earlier or not_later.")


def two_streams(block_ids: jax.Array, *, causal_noisy: bool = False, causal_clean: bool = False) -> Visibility:
    """Returns who sees whom in a row [noisy ; clean] of block diffusion (BD3-LM, arXiv 2503.09573, section 3).

    M_BD | M_OBC | M_BC: a noisy token sees the noisy tokens of its block and the clean tokens of earlier blocks; a
    clean token sees the clean tokens of its block and of earlier ones. So nothing noisy reaches another block, and no
    clean token reaches the noisy copy of its own block.

    Args:
      block_ids: i32[B,T], the block of each token of one copy, counting up inside each packed example.
      causal_noisy: inside a block, noisy tokens see only those before them (I-DLM, arXiv 2604.11035).
      causal_clean: the clean copy is a causal language model (Nemotron-Labs-Diffusion).
    """
    blocks = jnp.concatenate([block_ids, block_ids], axis=1)
    within_block = Between(0, 0) & Groups(blocks, "same")
    if causal_noisy:
        within_block = within_block & Causal()
    clean_past = Between(0, 1) & Groups(blocks, "earlier")
    clean = Between(1, 1) & (Causal() if causal_clean else Groups(blocks, "not_later"))
    return within_block | clean_past | clean


@flax.struct.dataclass
class Segments(Visibility):
    """Only tokens of the same packed example see each other; segment 0 (padding) neither sees nor is seen.

    Attributes:
      segment_ids: i32[B,T].
    """

    segment_ids: Any

    def seen(self, slots, num_keys):
        of_query, of_key = self.segment_ids
        return (of_key == of_query) & (of_query > 0)


def same_segment(q_segments: jax.Array, k_segments: jax.Array) -> jax.Array:
    """Returns bool[B,Q,T] from i32[B,Q] and i32[B,T]: equal and not padding. Cross-attention uses it directly."""
    return (q_segments[:, :, None] == k_segments[:, None, :]) & (q_segments[:, :, None] > 0)


def _sides(values: jax.Array, q_slots: jax.Array | None) -> Sides:
    """Returns the sides of an array of an expression, [B] of rows, [B,T] of slots or [B,Q,T] of pairs."""
    if values.ndim == 1:
        return Sides(values[:, None, None], values[:, None, None])
    if values.ndim == 2:
        return Sides(_at_queries(values, q_slots)[:, :, None], values[:, None, :])
    if q_slots is not None:
        values = jnp.broadcast_to(values, (q_slots.shape[0], *values.shape[1:]))
        values = jnp.take_along_axis(values, q_slots[:, :, None], axis=1, mode="clip")
    return Sides(values, values)


def _at_queries(values_BT: jax.Array, q_slots: jax.Array | None) -> jax.Array:
    """Picks per-slot values at the query slots; slots past the end read the last one."""
    if q_slots is None:
        return values_BT
    return jnp.take_along_axis(values_BT, q_slots, axis=1, mode="clip")
