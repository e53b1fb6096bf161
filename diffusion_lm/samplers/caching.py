"""KV caches within a block: the prefix cache and the dual cache of Fast-dLLM (arXiv 2505.22618).

In the first step of a block the network runs on the whole row, and the keys and values of all slots are stored. In the
following steps it runs on some slots only, which attend to the stored keys and values of the others. With bidirectional
attention this is an approximation: what is stored was computed before the block's tokens were sampled.
"""

import dataclasses
from collections.abc import Callable
from typing import Protocol

import flax.struct
import jax
import jax.numpy as jnp

from diffusion_lm.architectures.base import BoundModel, EncoderState, Hidden
from diffusion_lm.core.alignment import Alignment
from diffusion_lm.core.checks import check_count
from diffusion_lm.nn.cache import KVCache
from diffusion_lm.nn.masks import Visibility


class BlockCache(Protocol):
    """Which slots the network runs on in the steps after a block's first. Implementations are frozen dataclasses."""

    def __hash__(self) -> int: ...

    def slots(self, needed: jax.Array) -> jax.Array:
        """Returns bool[R,T], the slots of the next forward pass.

        Args:
          needed: bool[R,T], the slots of the block and those whose states predict its tokens.
        """
        ...

    def widths(self, length: int, block: int) -> tuple[int, ...]:
        """Returns the numbers of slots per row for which the network is compiled, in rising order, up to `length`.

        Args:
          length: T.
          block: the largest number of slots that a block without gaps needs.
        """
        ...


@dataclasses.dataclass(frozen=True)
class PrefixCache:
    """Caches the tokens before the block; the network runs on the block and all later tokens in each step.

    A compiled program has fixed shapes and the suffix shrinks from block to block, so it is padded to the next of a few
    widths.

    Attributes:
      programs: number of widths, multiples of T / programs. Each is a compiled forward pass.
    """

    programs: int = 4

    def __post_init__(self):
        check_count(self.programs, "PrefixCache.programs", "The default is 4; 1 runs whole rows, and saves nothing.")

    def slots(self, needed: jax.Array) -> jax.Array:
        """Returns the first needed slot and all later ones."""
        return jnp.cumsum(needed, axis=1) > 0

    def widths(self, length: int, block: int) -> tuple[int, ...]:
        """Returns `programs` widths, or fewer if rows are short."""
        del block
        return tuple(sorted({-(-length * part // self.programs) for part in range(1, self.programs + 1)}))


@dataclasses.dataclass(frozen=True)
class DualCache:
    """Caches the tokens before the block and the MASK of later blocks; the network runs on the block only."""

    def slots(self, needed: jax.Array) -> jax.Array:
        """Returns the needed slots."""
        return needed

    def widths(self, length: int, block: int) -> tuple[int, ...]:
        """Returns the width of the block, and that of the row, which also serves blocks with gaps."""
        return tuple(sorted({min(block, length), length}))


@flax.struct.dataclass
class CacheState:
    """The cache of R rows between two steps.

    Attributes:
      cache: keys and values of the rows of a forward pass, those of guidance included.
      block: i32[R], the block in whose first step the whole row was run; -1 before the first one.
    """

    cache: KVCache
    block: jax.Array

    @classmethod
    def empty(cls, cache: KVCache, rows: int) -> "CacheState":
        """Returns the state before the first step: nothing that may be read."""
        return cls(cache, jnp.full(rows, -1, jnp.int32))

    def after(self, cache: KVCache, block: jax.Array, active: jax.Array) -> "CacheState":
        """Returns the state after a step of block i32[R] over the slots `active` bool[R,T]."""
        return CacheState(cache, jnp.where(jnp.any(active, axis=1), block, self.block))


@dataclasses.dataclass(frozen=True, eq=False)
class CachedPass:
    """A forward pass over some slots of each row.

    Attributes:
      cache: keys and values of all other slots that may be attended to.
      wanted: bool[R,T], the slots of the pass.
      widths: see `BlockCache.widths`.
    """

    cache: KVCache
    wanted: jax.Array
    widths: tuple[int, ...]

    @classmethod
    def of(
        cls,
        cache: BlockCache,
        state: CacheState,
        *,
        block: jax.Array,
        block_size: int,
        active: jax.Array,
        used: jax.Array,
        alignment: Alignment,
    ) -> "CachedPass":
        """Returns the pass of a step.

        Args:
          cache: which slots are run again.
          state: after the step before.
          block: i32[R], each row's block.
          block_size: slots per block.
          active: bool[R,T], its slots; none in rows that do not take this step, of which nothing is run or stored.
          used: bool[R,T], the slots that hold an example.
          alignment: which hidden state predicts which token.
        """
        # The first step of a block runs the whole row: the tokens of the block before have changed since.
        fresh = jnp.any(active, axis=1) & (state.block != block)
        # The state that predicts the block's first token may be one slot before the block.
        needed = active | alignment.to_slots(active)
        wanted = used & (cache.slots(needed) | fresh[:, None])
        return cls(state.cache, wanted, cache.widths(active.shape[1], block_size + alignment.back))

    def run(
        self,
        model: BoundModel,
        tokens: jax.Array,
        *,
        self_condition: jax.Array | None,
        time: jax.Array | None,
        visibility: Visibility,
        segment_ids: jax.Array,
        encoder: EncoderState | None,
    ) -> Hidden:
        """Runs the network over the wanted slots, at the smallest width that holds those of all rows.

        Arguments are those of `BoundModel.__call__`, for all T slots of R' rows: R' = R, or 2 R with guidance.

        Returns:
          The hidden states as [R',T,D], 0 where no slot was run, with the cache that now holds the slots of the pass.
        """
        # With guidance both passes run the same slots.
        wanted = jnp.tile(self.wanted, (tokens.shape[0] // self.wanted.shape[0], 1))
        length, count = tokens.shape[1], jnp.sum(wanted, axis=1, dtype=jnp.int32)
        # Wanted slots first, in their order.
        order = jnp.argsort(~wanted, axis=1).astype(jnp.int32)
        # Slots at T are neither stored nor attended to.
        slots = jnp.where(jnp.arange(length) < count[:, None], order, length)
        rows = jnp.arange(tokens.shape[0])[:, None]

        def over(width: int) -> Callable[[KVCache], Hidden]:
            at = slots[:, :width]
            inside = jnp.minimum(at, length - 1)

            def call(cache: KVCache) -> Hidden:
                fed, predicted, t = jax.tree.map(lambda x: x[rows, inside], (tokens, self_condition, time))
                hidden = model(
                    fed,
                    visibility=visibility,
                    positions=at,
                    segment_ids=segment_ids,
                    encoder=encoder,
                    self_condition=predicted,
                    time=t,
                    cache=cache,
                )
                values = hidden.values_BTD
                # Back to one state per slot, so that the rest of the loop does not know about the cache.
                whole = jnp.zeros((*tokens.shape, values.shape[-1]), values.dtype)
                return dataclasses.replace(hidden, values_BTD=whole.at[rows, at].set(values, mode="drop"))

            return call

        if len(self.widths) == 1:
            return over(length)(self.cache)
        smallest = jnp.searchsorted(jnp.asarray(self.widths), jnp.max(count))
        return jax.lax.switch(smallest, [over(width) for width in self.widths], self.cache)
