"""Choice of the target tokens that a noise process replaces, at a given rate."""

import dataclasses
from typing import Literal, Protocol

import jax
import jax.numpy as jnp

from diffusion_lm.core.rng import StreamKeys
from diffusion_lm.core.segments import segment_max, segment_rank, segment_sum
from diffusion_lm.core.types import Batch

CHOICE_STREAM = "noise/choice"


class Choice(Protocol):
    """Chooses tokens to replace. For a fixed key, the tokens chosen at one rate are chosen at every higher rate too."""

    def choose(self, keys: StreamKeys, batch: Batch, rate_BT: jax.Array) -> jax.Array:
        """Returns bool[B,T], the target tokens to replace, each with marginal probability `rate_BT`, f32[B,T]."""
        ...


def bernoulli(keys: StreamKeys, batch: Batch, rate_BT: jax.Array) -> jax.Array:
    """Returns bool[B,T]: independent Bernoulli(rate) draws keyed by example and position, False on conditioning."""
    uniform = keys.token_uniform(CHOICE_STREAM, batch.example_ids, batch.positions)
    # The uniforms are in [0, 1), so rate 1 chooses every target token and rate 0 none.
    return (uniform < rate_BT) & batch.target_mask


@dataclasses.dataclass(frozen=True)
class Bernoulli:
    """Chooses each target token independently (SUNDAE, MDLM, LLaDA and most others).

    Attributes:
      joint_tail: "eos" or "pad": the run of this filler at the end of a target is chosen as a whole or not at all.
        Otherwise its visible tokens would reveal the length ("eos" for Dream, arXiv 2508.15487). None = off.
    """

    joint_tail: Literal["eos", "pad"] | None = None

    def choose(self, keys: StreamKeys, batch: Batch, rate_BT: jax.Array) -> jax.Array:
        """Returns bool[B,T], the chosen target tokens."""
        if self.joint_tail is None:
            return bernoulli(keys, batch, rate_BT)
        filler = batch.special.eos_id if self.joint_tail == "eos" else batch.special.pad_id
        content = ~batch.target_mask | (batch.tokens != filler)
        last = segment_max(jnp.where(content, batch.positions, -1), batch.segment_ids)
        # Every token of the tail draws with the key of the tail's first token.
        positions = jnp.minimum(batch.positions, last + 1)
        return bernoulli(keys, batch.replace(positions=positions), rate_BT)


@dataclasses.dataclass(frozen=True)
class ExactCount:
    """Chooses exactly ceil(rate x n) of the n target tokens of an example; all subsets of that size are equally likely.

    With a rate uniform in (0, 1] the count is uniform in 1..n. With the weight n / count (`weighting.InverseShare`) the
    loss is the order-agnostic likelihood bound, and every target has a masked token (traps T07, T08).
    The rate must be the same for all tokens of an example.
    """

    def choose(self, keys: StreamKeys, batch: Batch, rate_BT: jax.Array) -> jax.Array:
        """Returns bool[B,T], the chosen target tokens."""
        uniform = keys.token_uniform(CHOICE_STREAM, batch.example_ids, batch.positions)
        target = batch.target_mask
        rank = segment_rank(uniform, jnp.where(target, batch.segment_ids, 0))
        targets = segment_sum(target.astype(jnp.float32), batch.segment_ids)
        # rate x n may round to just above a whole number, which ceil would turn into one token too many.
        count = jnp.ceil(rate_BT * targets * (1 - 1e-6))
        return (rank < count) & target
