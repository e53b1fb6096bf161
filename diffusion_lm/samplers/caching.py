"""Keys and values kept from step to step of a block: the prefix cache and the dual cache of Fast-dLLM (2505.22618).

In the first step of a block the network reads the whole row and the keys and values of all slots are stored. In the
steps that follow it reads some slots only, which attend to what is stored of the others. Under bidirectional visibility
this approximates: what is stored was computed before the block's tokens were written.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import flax.struct
import jax
import jax.numpy as jnp

from diffusion_lm.core.errors import require
from diffusion_lm.nn.cache import KVCache
from diffusion_lm.samplers.base import Model


class BlockCache(Protocol):
    """What is read again in the steps after a block's first."""

    def fed(self, needed: jax.Array) -> jax.Array:
        """Returns bool[R,T], the slots that a step feeds to the network.

        Args:
          needed: bool[R,T], the slots of the block and those whose states predict its tokens.
        """
        ...

    def widths(self, length: int, block: int) -> tuple[int, ...]:
        """Returns for how many slots a row the network is compiled, in rising order; `length` is the last one.

        Args:
          length: T.
          block: most slots that a block without holes needs.
        """
        ...


@dataclasses.dataclass(frozen=True)
class PrefixCache:
    """Keeps what stands before the block; block and suffix are read in each step.

    A compiled program has fixed shapes and the suffix shrinks from block to block, so it is filled up to the next of a
    few widths.

    Attributes:
      programs: how many widths, multiples of T / programs. Each is a compiled pass of the network.
    """

    programs: int = 4

    def __post_init__(self):
        require(
            isinstance(self.programs, int) and self.programs >= 1,
            f"programs = {self.programs} must be a whole number of at least 1",
            where="PrefixCache.programs",
            fix="The default is 4; 1 reads whole rows, and saves nothing.",
        )

    def fed(self, needed: jax.Array) -> jax.Array:
        """Returns the first needed slot and all that follow."""
        return jnp.cumsum(needed, axis=1) > 0

    def widths(self, length: int, block: int) -> tuple[int, ...]:
        """Returns `programs` widths, or fewer where rows are short."""
        del block
        return tuple(sorted({-(-length * part // self.programs) for part in range(1, self.programs + 1)}))


@dataclasses.dataclass(frozen=True)
class DualCache:
    """Keeps what stands before the block and behind it, the MASK of later blocks; only the block is read again."""

    def fed(self, needed: jax.Array) -> jax.Array:
        """Returns the needed slots."""
        return needed

    def widths(self, length: int, block: int) -> tuple[int, ...]:
        """Returns the block's width and the row's, which also serves blocks with holes."""
        return tuple(sorted({min(block, length), length}))


@flax.struct.dataclass
class Kept:
    """What R rows keep between two steps.

    Attributes:
      cache: of the rows of a network call, those of guidance included.
      block: i32[R], the block in whose first step the row was read as a whole; -1 before the first one.
    """

    cache: KVCache
    block: jax.Array

    @classmethod
    def nothing(cls, cache: KVCache, rows: int) -> "Kept":
        """Returns what rows keep before the first step: nothing that may be read."""
        return cls(cache, jnp.full(rows, -1, jnp.int32))

    def after(self, cache: KVCache, block: jax.Array, active: jax.Array) -> "Kept":
        """Returns what rows keep after a step of block i32[R] over the slots `active` bool[R,T]."""
        return Kept(cache, jnp.where(jnp.any(active, axis=1), block, self.block))


@dataclasses.dataclass(frozen=True, eq=False)
class Feed:
    """Which slots one network call reads.

    Attributes:
      cache: holds all other slots that may be seen.
      wanted: bool[R,T].
      widths: see `BlockCache.widths`.
    """

    cache: KVCache
    wanted: jax.Array
    widths: tuple[int, ...]

    @classmethod
    def of(cls, settings: Any, kept: Kept, block: jax.Array, active: jax.Array, used: jax.Array) -> "Feed":
        """Returns the slots of a step.

        Args:
          settings: the `DenoisingSampler`.
          kept: by the step before.
          block: i32[R], each row's block.
          active: bool[R,T], its slots; none in rows that this step leaves alone, of which nothing is read or stored.
          used: bool[R,T], the slots that hold an example.
        """
        fresh = jnp.any(active, axis=1) & (kept.block != block)
        needed = active | settings.alignment.to_slots(active)
        wanted = used & (settings.cache.fed(needed) | fresh[:, None])
        return cls(kept.cache, wanted, settings.cache.widths(active.shape[1], settings.block + settings.alignment.back))

    def run(self, model: Model, tokens: jax.Array, slotwise: Mapping[str, jax.Array | None], **inputs: Any) -> Any:
        """Runs the network over the wanted slots, at the smallest width that holds those of all rows.

        Args:
          model: the network.
          tokens: i32[R',T], R' = R, or 2 R under guidance.
          slotwise: further arguments, [R',T,...] or None.
          **inputs: of the call, of T slots.

        Returns:
          The hidden states as [R',T,D], 0 where no slot was read, with the cache that now holds the slots read.
        """
        wanted = jnp.tile(self.wanted, (tokens.shape[0] // self.wanted.shape[0], 1))
        length, count = tokens.shape[1], jnp.sum(wanted, axis=1, dtype=jnp.int32)
        order = jnp.argsort(~wanted, axis=1).astype(jnp.int32)
        # Slots past the end are neither written nor seen.
        slots = jnp.where(jnp.arange(length) < count[:, None], order, length)

        def over(width: int):
            at = slots[:, :width]
            inside = jnp.minimum(at, length - 1)

            def call(cache: KVCache) -> Any:
                rows = jnp.arange(tokens.shape[0])[:, None]
                fed = jax.tree.map(lambda x: x[rows, inside], dict(slotwise))
                hidden = model(tokens[rows, inside], positions=at, cache=cache, **fed, **inputs)
                read = hidden.values_BTD
                whole = jnp.zeros((*tokens.shape, read.shape[-1]), read.dtype)
                return hidden.replace(values_BTD=whole.at[rows, at].set(read, mode="drop"))

            return call

        if len(self.widths) == 1:
            return over(length)(self.cache)
        smallest = jnp.searchsorted(jnp.asarray(self.widths), jnp.max(count))
        return jax.lax.switch(smallest, [over(width) for width in self.widths], self.cache)
