"""Corruptions: which target tokens are chosen, and what a chosen one turns into. Conditioning is never touched."""

import dataclasses
from typing import Any, Protocol

import flax.struct
import jax
import jax.numpy as jnp

from diffusion_lm.core.errors import require
from diffusion_lm.core.rng import StreamKeys
from diffusion_lm.core.segments import segment_max, segment_rank, segment_sum
from diffusion_lm.core.types import Batch

CHOICE_STREAM = "noise/choice"
REPLACEMENT_STREAM = "noise/replacement"
KIND_STREAM = "noise/kind"


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
    """A noise process; at rate 1 it is also the start canvas of the samplers.

    A corruption that writes MASK names it as `mask_id`, and one that writes nothing else says so by `absorbing = True`.
    For a given key the tokens chosen at one rate are among those chosen at a higher one.
    """

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
class Bernoulli:
    """Chooses each target token independently (SUNDAE, MDLM, LLaDA and most others).

    Attributes:
      joint_tail: the filler behind the content of a target, EOS for Dream (arXiv 2508.15487). The run of it that ends a
        target is chosen as a whole or not at all, so that its visible part cannot give the length away. None = no such
        rule.
    """

    joint_tail: int | None = None

    def choose(self, keys: StreamKeys, batch: Batch, rate_BT: jax.Array) -> jax.Array:
        """Returns bool[B,T], the chosen target tokens."""
        if self.joint_tail is None:
            return chosen_tokens(keys, batch, rate_BT)
        content = ~batch.target_mask | (batch.tokens != self.joint_tail)
        last = segment_max(jnp.where(content, batch.positions, -1), batch.segment_ids)
        # All of the tail draws with the key of its first token.
        positions = jnp.minimum(batch.positions, last + 1)
        return chosen_tokens(keys, batch.replace(positions=positions), rate_BT)


@dataclasses.dataclass(frozen=True)
class ExactCount:
    """Chooses exactly ceil(rate x n) of the n target tokens of an example, every subset of that size alike.

    With a rate uniform in (0, 1] the count is uniform in 1..n: with weights n / count (`weighting.InverseShare`) the
    loss is the order-agnostic likelihood bound itself, and no target goes without a masked token (traps T07, T08).
    The rate must be the same for all tokens of an example.
    """

    def choose(self, keys: StreamKeys, batch: Batch, rate_BT: jax.Array) -> jax.Array:
        """Returns bool[B,T], the chosen target tokens."""
        uniform = keys.token_uniform(CHOICE_STREAM, batch.example_ids, batch.positions)
        target = batch.target_mask
        among_targets = segment_rank(uniform, jnp.where(target, batch.segment_ids, 0))
        targets = segment_sum(target.astype(jnp.float32), batch.segment_ids)
        # The factor keeps a product that rounding has lifted above a whole number from being counted up.
        count = jnp.ceil(rate_BT * targets * (1 - 1e-6))
        return (among_targets < count) & target


@dataclasses.dataclass(frozen=True)
class UniformCorruption:
    """Replaces tokens by draws from the uniform distribution over the whole vocabulary (SUNDAE; AR2Diff).

    Special tokens are inside the draw: the paper does not exclude them, and PAD must be reachable because AR2Diff
    models predict length by it. A replacement may equal the original token.

    Attributes:
      vocab_size: ids are drawn from [0, vocab_size); None = the model's vocabulary without its padding rows.
      choice: which tokens are replaced, `Bernoulli` or `ExactCount`.
    """

    vocab_size: int | None = None
    choice: Any = Bernoulli()

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
        replaced = self.choice.choose(keys, batch, rate_BT)
        return Corrupted(jnp.where(replaced, _random_tokens(keys, batch, size), batch.tokens), replaced)


@dataclasses.dataclass(frozen=True)
class AbsorbingCorruption:
    """Replaces tokens by MASK (D3PM-absorbing; MDLM, MD4, LLaDA, DiffuLLaMA, Dream).

    Attributes:
      mask_id: id of MASK, which must not occur in the data.
      choice: which tokens are replaced, `Bernoulli` or `ExactCount`.
    """

    mask_id: int
    choice: Any = Bernoulli()

    def __post_init__(self):
        _check_mask_id(self)

    @property
    def needs_mask_token(self) -> bool:
        """True."""
        return True

    @property
    def absorbing(self) -> bool:
        """True: every noisy token is MASK, so what is not MASK is known."""
        return True

    def corrupt(self, keys: StreamKeys, batch: Batch, rate_BT: jax.Array, *, vocab_size: int) -> Corrupted:
        """Returns the noisy canvas; `rate_BT` is f32[B,T] (or broadcastable), `vocab_size` the model's."""
        _check_mask_is_known(self, vocab_size)
        replaced = self.choice.choose(keys, batch, rate_BT)
        return Corrupted(jnp.where(replaced, self.mask_id, batch.tokens), replaced)


@dataclasses.dataclass(frozen=True)
class MixtureCorruption:
    """Replaces tokens by MASK or by a random token: a model of it fills in and corrects (LLaDA2.1; GIDD's noise).

    Attributes:
      mask_id: id of MASK, which must not occur in the data.
      p_uniform: probability that a chosen token becomes a uniform draw from the vocabulary, MASK left out, instead of
        MASK.
      p_keep: probability that a chosen token stays as it is and is scored like the others (BERT, arXiv 1810.04805:
        0.1 beside p_uniform = 0.1).
      choice: which tokens are replaced, `Bernoulli` or `ExactCount`.
    """

    mask_id: int
    p_uniform: float = 0.1
    choice: Any = Bernoulli()
    p_keep: float = 0.0

    def __post_init__(self):
        _check_mask_id(self)
        require(
            0 <= self.p_uniform <= 1,
            f"p_uniform = {self.p_uniform} is no probability",
            where="MixtureCorruption.p_uniform",
            fix="0.0 is AbsorbingCorruption, 1.0 UniformCorruption.",
        )
        require(
            0 <= self.p_keep <= 1 - self.p_uniform,
            f"p_keep = {self.p_keep} beside p_uniform = {self.p_uniform} is no probability",
            where="MixtureCorruption.p_keep",
            fix="Their sum is at most 1; what is left is MASK.",
        )

    @property
    def needs_mask_token(self) -> bool:
        """True."""
        return True

    def corrupt(self, keys: StreamKeys, batch: Batch, rate_BT: jax.Array, *, vocab_size: int) -> Corrupted:
        """Returns the noisy canvas; `rate_BT` is f32[B,T] (or broadcastable), `vocab_size` the model's."""
        _check_mask_is_known(self, vocab_size)
        replaced = self.choice.choose(keys, batch, rate_BT)
        kind = keys.token_uniform(KIND_STREAM, batch.example_ids, batch.positions)
        # One of the vocab_size - 1 tokens that are not MASK: a draw from MASK's id on stands for the token after it.
        random = _random_tokens(keys, batch, vocab_size - 1)
        random = random + (random >= self.mask_id)
        noise = jnp.where(kind < self.p_uniform, random, self.mask_id)
        noise = jnp.where(kind >= 1.0 - self.p_keep, batch.tokens, noise)
        return Corrupted(jnp.where(replaced, noise, batch.tokens), replaced)


def _random_tokens(keys: StreamKeys, batch: Batch, size: int) -> jax.Array:
    """Returns i32[B,T], uniform in [0, size), keyed by example and position."""
    token_keys = keys.per_token(REPLACEMENT_STREAM, batch.example_ids, batch.positions)
    draw = jax.vmap(lambda key: jax.random.randint(key, (), 0, size, jnp.int32))
    return draw(token_keys.reshape(-1)).reshape(token_keys.shape)


def _check_mask_id(corruption: Any) -> None:
    require(
        corruption.mask_id >= 0,
        f"mask_id = {corruption.mask_id} is no token",
        where=f"{type(corruption).__name__}.mask_id",
        fix="Give the vocabulary's MASK id, 4 in the vocabularies of this project.",
    )


def _check_mask_is_known(corruption: Any, vocab_size: int) -> None:
    require(
        corruption.mask_id < vocab_size,
        f"MASK is token {corruption.mask_id} but the model knows {vocab_size}",
        where=f"{type(corruption).__name__}.mask_id",
        fix="Give the vocabulary's MASK id.",
    )
