"""Attention visibility as an algebra: which tokens attend to which is an argument of a forward pass, not of a network.

A `Visibility` is a pytree expression that carries its own per-row arrays. `&` and `|` combine expressions. `dense`
evaluates one for given queries: all slots of a row in training, or the slots that are decoded with a cache.
"""

from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from diffusion_lm.core.errors import ConfigError


class QueryKey(NamedTuple):
    """One value per slot, once at the query's slot and once at the key's; the two broadcast against each other.

    Attributes:
      q: the values at the queries' slots.
      kv: the values at the keys' slots.
    """

    q: jax.Array | int
    kv: jax.Array | int


class Visibility:
    """Base of all expressions. Slots are indices into the row, not position ids.

    An expression is evaluated for all pairs at once (`dense`) or tile by tile inside a kernel (`nn/flash.py`). Both
    replace each array of the expression by a `QueryKey` and call `mask_mod`, which is elementwise.
    """

    def mask_mod(self, q_idx: jax.Array, kv_idx: jax.Array, num_keys: int) -> jax.Array | bool:
        """Returns whether each query attends to each key, for an expression whose arrays are `QueryKey`s.

        Args:
          q_idx: i32, slots of the queries.
          kv_idx: i32, slots of the keys; broadcasts against `q_idx`.
          num_keys: T, the number of key slots.

        Returns:
          bool in the broadcast shape; or True if every query attends to every key.
        """
        raise NotImplementedError

    def dense(self, q_idx: jax.Array | None, num_keys: int) -> jax.Array:
        """Evaluates the expression.

        Args:
          q_idx: i32[B,Q], the slots of the queries; None means all slots 0..num_keys-1.
          num_keys: T, the number of key slots.

        Returns:
          bool[B|1,Q,T], True if the query attends to the key; the leading axis is 1 if all rows are equal.
        """
        slots = jnp.arange(num_keys)[None]
        q_slots = (slots if q_idx is None else q_idx)[:, :, None]
        paired = jax.tree.map(lambda values: _paired(values, q_idx), self)
        allowed = jnp.asarray(paired.mask_mod(q_slots, slots[:, None, :], num_keys))
        # An expression may depend on the keys alone (`Conditioning`) or on nothing (`Full`): fill in the other axes.
        return jnp.broadcast_to(allowed, jnp.broadcast_shapes(allowed.shape, (1, q_slots.shape[1], num_keys)))

    @property
    def copies(self) -> int:
        """Number of copies of one row that lie next to each other, e.g. 2 for [noisy ; clean]; they share distances."""
        return 1

    def __and__(self, other: "Visibility") -> "Visibility":
        return And(self, other)

    def __or__(self, other: "Visibility") -> "Visibility":
        return Or(self, other)


@flax.struct.dataclass
class And(Visibility):
    """Pairs that both expressions allow."""

    left: Visibility
    right: Visibility

    def mask_mod(self, q_idx, kv_idx, num_keys):
        return self.left.mask_mod(q_idx, kv_idx, num_keys) & self.right.mask_mod(q_idx, kv_idx, num_keys)

    @property
    def copies(self):
        return max(self.left.copies, self.right.copies)


@flax.struct.dataclass
class Or(Visibility):
    """Pairs that at least one expression allows."""

    left: Visibility
    right: Visibility

    def mask_mod(self, q_idx, kv_idx, num_keys):
        return self.left.mask_mod(q_idx, kv_idx, num_keys) | self.right.mask_mod(q_idx, kv_idx, num_keys)

    @property
    def copies(self):
        return max(self.left.copies, self.right.copies)


@flax.struct.dataclass
class Causal(Visibility):
    """A query attends to its own slot and to the slots before it."""

    def mask_mod(self, q_idx, kv_idx, num_keys):
        return kv_idx <= q_idx


@flax.struct.dataclass
class Full(Visibility):
    """Every query attends to every key."""

    def mask_mod(self, q_idx, kv_idx, num_keys):
        return True


@flax.struct.dataclass
class Rows(Visibility):
    """All pairs in some rows of the batch, none in the others.

    Attributes:
      allowed: bool[B|1].
    """

    allowed: jax.Array

    def mask_mod(self, q_idx, kv_idx, num_keys):
        return _pair(self.allowed).kv


@flax.struct.dataclass
class Conditioning(Visibility):
    """Every query attends to the keys that are conditioning; prefix-LM is `Causal() | Conditioning(~target_mask)`.

    Attributes:
      is_conditioning: bool[B,T].
    """

    is_conditioning: jax.Array

    def mask_mod(self, q_idx, kv_idx, num_keys):
        return _pair(self.is_conditioning).kv


@flax.struct.dataclass
class Queries(Visibility):
    """The selected queries attend to every key, the others to none; restricts the other operand of `&`.

    `Queries(s) & Conditioning(s)` lets the slots in s attend to each other.

    Attributes:
      selected: bool[B,T].
    """

    selected: jax.Array

    def mask_mod(self, q_idx, kv_idx, num_keys):
        return _pair(self.selected).q


@flax.struct.dataclass
class ExplicitMask(Visibility):
    """The pairs of a boolean matrix, for example of one that was sampled.

    Attributes:
      allowed: bool[B|1,T,T], queries first.
    """

    allowed: jax.Array

    def mask_mod(self, q_idx, kv_idx, num_keys):
        return _pair(self.allowed).kv


@flax.struct.dataclass
class BlindConditioning(Visibility):
    """Conditioning queries do not attend to target keys; target queries attend to everything.

    `Full() & BlindConditioning(c)` keeps the hidden states of the conditioning independent of the canvas, so their keys
    and values can be cached.

    Attributes:
      is_conditioning: bool[B,T].
    """

    is_conditioning: jax.Array

    def mask_mod(self, q_idx, kv_idx, num_keys):
        # A query of the conditioning needs a key of the conditioning; all other queries attend to every key.
        return ~_pair(self.is_conditioning).q | _pair(self.is_conditioning).kv


@flax.struct.dataclass
class Block(Visibility):
    """Block-causal: a query attends to the keys of its own block and of earlier blocks.

    Attributes:
      size: tokens per block; static.
      starts: i32[B], the slot where block 0 begins (the first target slot); the slots before it are one block that all
        later blocks attend to. None means slot 0.
    """

    size: int = flax.struct.field(pytree_node=False)
    starts: jax.Array | None = None

    def mask_mod(self, q_idx, kv_idx, num_keys):
        starts = QueryKey(0, 0) if self.starts is None else _pair(self.starts)

        def block_of(slots, starts):
            # TPU kernels have no integer division. With half a slot added, float32 is exact up to 4 million slots.
            # -1 is the one block of all slots before `starts`.
            return jnp.maximum(jnp.floor(((slots - starts).astype(jnp.float32) + 0.5) / self.size), -1.0)

        return block_of(kv_idx, starts.kv) <= block_of(q_idx, starts.q)


@flax.struct.dataclass
class SlidingWindow(Visibility):
    """Keys closer than `size` slots on either side (with `Causal`, the sliding window of Mistral, arXiv 2310.06825).

    Attributes:
      size: number of keys on one side, the query's own included; static.
      count: copies of the row that lie next to each other and share their distances; static.
    """

    size: int = flax.struct.field(pytree_node=False)
    count: int = flax.struct.field(pytree_node=False, default=1)

    def mask_mod(self, q_idx, kv_idx, num_keys):
        length = num_keys // self.count

        def within_copy(slots):
            # slots % length, without integer division (see `Block`).
            return slots - sum(jnp.where(slots >= copy * length, length, 0) for copy in range(1, self.count))

        # Copies share their distances: the noisy copy of a slot is as near as the clean one.
        return jnp.abs(within_copy(q_idx) - within_copy(kv_idx)) < self.size

    @property
    def copies(self):
        return self.count


@flax.struct.dataclass
class CopyPair(Visibility):
    """Queries of one copy of the row attend to keys of one copy, in rows that hold several copies next to each other.

    Attributes:
      q_copy: number of the queries' copy; static.
      kv_copy: number of the keys' copy; static.
      count: copies in the row; static.
    """

    q_copy: int = flax.struct.field(pytree_node=False)
    kv_copy: int = flax.struct.field(pytree_node=False)
    count: int = flax.struct.field(pytree_node=False, default=2)

    def mask_mod(self, q_idx, kv_idx, num_keys):
        length = num_keys // self.count

        def is_in(slots, copy):
            return (slots >= copy * length) & (slots < (copy + 1) * length)

        return is_in(q_idx, self.q_copy) & is_in(kv_idx, self.kv_copy)

    @property
    def copies(self):
        return self.count


@flax.struct.dataclass
class Groups(Visibility):
    """Pairs compared by their group numbers, independent of the slots.

    Attributes:
      group_ids: i32[B,T].
      order: "same" (the key's group is the query's), "earlier" or "not_later"; static.
    """

    group_ids: jax.Array
    order: str = flax.struct.field(pytree_node=False, default="same")

    def mask_mod(self, q_idx, kv_idx, num_keys):
        of_query, of_key = _pair(self.group_ids)
        match self.order:
            case "same":
                return of_key == of_query
            case "earlier":
                return of_key < of_query
            case "not_later":
                return of_key <= of_query
        raise ConfigError(
            f"order={self.order!r}: there is no such order", where="Groups.order", fix="Use same, earlier or not_later."
        )


def two_streams(block_ids: jax.Array, *, causal_noisy: bool = False, causal_clean: bool = False) -> Visibility:
    """Returns the visibility of a row [noisy ; clean] of block diffusion (BD3-LM, arXiv 2503.09573, section 3).

    M_BD | M_OBC | M_BC: a noisy token attends to the noisy tokens of its block and to the clean tokens of earlier
    blocks; a clean token attends to the clean tokens of its block and of earlier ones. So no noisy token reaches
    another block, and no clean token reaches the noisy copy of its own block.

    Args:
      block_ids: i32[B,T], the block of each token of one copy, increasing inside each packed example.
      causal_noisy: inside a block, noisy tokens attend only to those before them (I-DLM, arXiv 2604.11035).
      causal_clean: the clean copy is a causal language model (Nemotron-Labs-Diffusion).
    """
    noisy, clean = 0, 1
    blocks = jnp.concatenate([block_ids, block_ids], axis=1)
    # M_BD: noisy to noisy, block-diagonal.
    within_block = CopyPair(noisy, noisy) & Groups(blocks, "same")
    if causal_noisy:
        within_block = within_block & Causal()
    # M_OBC: noisy to clean, strictly earlier blocks; a token of its own block would reveal the target.
    clean_past = CopyPair(noisy, clean) & Groups(blocks, "earlier")
    # M_BC: clean to clean, block-causal.
    clean_copy = CopyPair(clean, clean) & (Causal() if causal_clean else Groups(blocks, "not_later"))
    return within_block | clean_past | clean_copy


@flax.struct.dataclass
class Segments(Visibility):
    """Tokens of the same packed example; segment 0 (padding) neither attends nor is attended to.

    Attributes:
      segment_ids: i32[B,T].
    """

    segment_ids: jax.Array

    def mask_mod(self, q_idx, kv_idx, num_keys):
        of_query, of_key = _pair(self.segment_ids)
        return (of_key == of_query) & (of_query > 0)


def same_segment(q_segments: jax.Array, k_segments: jax.Array) -> jax.Array:
    """Returns bool[B,Q,T] from i32[B,Q] and i32[B,T]: equal and not padding. Cross-attention uses it directly."""
    return (q_segments[:, :, None] == k_segments[:, None, :]) & (q_segments[:, :, None] > 0)


def _pair(values: jax.Array | QueryKey) -> QueryKey:
    """Returns an array's `QueryKey`; inside `mask_mod` every array of an expression is one."""
    assert isinstance(values, QueryKey)
    return values


def _paired(values: jax.Array, q_idx: jax.Array | None) -> QueryKey:
    """Returns an array of an expression at queries and keys: [B] per row, [B,T] per slot or [B,Q,T] per pair."""
    if values.ndim == 1:
        return QueryKey(values[:, None, None], values[:, None, None])
    if values.ndim == 2:
        return QueryKey(_at_queries(values, q_idx)[:, :, None], values[:, None, :])
    # A value per pair has no sides: both fields hold the matrix, with the rows of the queries.
    if q_idx is not None:
        values = jnp.broadcast_to(values, (q_idx.shape[0], *values.shape[1:]))
        values = jnp.take_along_axis(values, q_idx[:, :, None], axis=1, mode="clip")
    return QueryKey(values, values)


def _at_queries(values_BT: jax.Array, q_idx: jax.Array | None) -> jax.Array:
    """Returns per-slot values at the query slots; slots past the end (finished rows of a sampler) read the last one."""
    if q_idx is None:
        return values_BT
    return jnp.take_along_axis(values_BT, q_idx, axis=1, mode="clip")
