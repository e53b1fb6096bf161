"""Corruptions: what a target token turns into. Conditioning is never touched."""

import dataclasses
from typing import Protocol

import flax.struct
import jax
import jax.numpy as jnp

from diffusion_lm.core.errors import require
from diffusion_lm.core.rng import StreamKeys
from diffusion_lm.core.types import Batch

CHOICE_STREAM = "noise/choice"
REPLACEMENT_STREAM = "noise/replacement"


@flax.struct.dataclass
class Corrupted:
    """A noisy canvas.

    Attributes:
      tokens: i32[B,T], the batch's tokens with some target tokens replaced.
      replaced: bool[B,T], which were chosen for replacement (the new token may equal the old one).
    """

    tokens: jax.Array
    replaced: jax.Array


class Corruption(Protocol):
    """A noise process; at rate 1 it is also the start canvas of the samplers."""

    @property
    def needs_mask_token(self) -> bool:
        """Whether the vocabulary must have a MASK token."""
        ...

    def corrupt(self, keys: StreamKeys, batch: Batch, rate_BT: jax.Array, *, vocab_size: int) -> Corrupted:
        """Returns the batch's tokens with each target token corrupted with probability `rate_BT`."""
        ...


def chosen_tokens(keys: StreamKeys, batch: Batch, rate_BT: jax.Array) -> jax.Array:
    """Returns bool[B,T]: independent Bernoulli(rate) draws, keyed by example and position, False on conditioning.

    The uniforms lie in [0, 1), so a rate of 1 chooses every target token and a rate of 0 none.
    """
    uniform = keys.token_uniform(CHOICE_STREAM, batch.example_ids, batch.positions)
    return (uniform < rate_BT) & batch.target_mask


@dataclasses.dataclass(frozen=True)
class UniformCorruption:
    """Replaces tokens by draws from the uniform distribution over the whole vocabulary (SUNDAE; AR2Diff).

    Special tokens are inside the draw: the paper does not exclude them, and PAD must be reachable because AR2Diff
    models predict length by it. A replacement may equal the original token.

    Attributes:
      vocab_size: ids are drawn from [0, vocab_size); None = the model's vocabulary without its padding rows.
    """

    vocab_size: int | None = None

    def __post_init__(self):
        require(
            self.vocab_size is None or self.vocab_size > 0,
            f"vocab_size = {self.vocab_size} is not a vocabulary",
            where="UniformCorruption.vocab_size",
            fix="Leave it at None to draw from the model's own vocabulary.",
        )

    @property
    def needs_mask_token(self) -> bool:
        """False: noise is made of ordinary tokens."""
        return False

    def corrupt(self, keys: StreamKeys, batch: Batch, rate_BT: jax.Array, *, vocab_size: int) -> Corrupted:
        """Returns the noisy canvas; `rate_BT` is f32[B,T] (or broadcastable), `vocab_size` the model's."""
        size = vocab_size if self.vocab_size is None else self.vocab_size
        require(
            size <= vocab_size,
            f"noise is drawn from {size} tokens but the model knows {vocab_size}",
            where="UniformCorruption.vocab_size",
            fix="Leave it at None to draw from the model's own vocabulary.",
        )
        replaced = chosen_tokens(keys, batch, rate_BT)
        token_keys = keys.per_token(REPLACEMENT_STREAM, batch.example_ids, batch.positions)
        draw = jax.vmap(lambda key: jax.random.randint(key, (), 0, size, jnp.int32))
        replacements = draw(token_keys.reshape(-1)).reshape(token_keys.shape)
        return Corrupted(tokens=jnp.where(replaced, replacements, batch.tokens), replaced=replaced)


@dataclasses.dataclass(frozen=True)
class AbsorbingCorruption:
    """Replaces tokens by MASK (D3PM-absorbing; MDLM, MD4, LLaDA, DiffuLLaMA, Dream).

    Attributes:
      mask_id: id of MASK, which must not occur in the data.
    """

    mask_id: int

    def __post_init__(self):
        require(
            self.mask_id >= 0,
            f"mask_id = {self.mask_id} is no token",
            where="AbsorbingCorruption.mask_id",
            fix="Give the vocabulary's MASK id, 4 in the vocabularies of this project.",
        )

    @property
    def needs_mask_token(self) -> bool:
        """True."""
        return True

    def corrupt(self, keys: StreamKeys, batch: Batch, rate_BT: jax.Array, *, vocab_size: int) -> Corrupted:
        """Returns the noisy canvas; `rate_BT` is f32[B,T] (or broadcastable), `vocab_size` the model's."""
        require(
            self.mask_id < vocab_size,
            f"MASK is token {self.mask_id} but the model knows {vocab_size}",
            where="AbsorbingCorruption.mask_id",
            fix="Give the vocabulary's MASK id.",
        )
        replaced = chosen_tokens(keys, batch, rate_BT)
        return Corrupted(tokens=jnp.where(replaced, self.mask_id, batch.tokens), replaced=replaced)
