"""Which hidden state predicts which token: the one difference in how AR and diffusion models read their output."""

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp


class Alignment(Protocol):
    """Maps between tokens and the slots whose hidden states predict them. Implementations are frozen dataclasses."""

    def __hash__(self) -> int: ...

    @property
    def back(self) -> int:
        """How many slots before its token the predicting state is: 0 or 1."""
        ...

    def slot_of(self, tokens: jax.Array) -> jax.Array:
        """Returns the slots whose hidden states predict the tokens at these slots."""
        ...

    def to_slots(self, values: jax.Array) -> jax.Array:
        """Moves per-token values [B,T] (targets, keys) to the slots that predict those tokens."""
        ...

    def to_tokens(self, values: jax.Array) -> jax.Array:
        """Moves per-slot values [B,T] (losses, samples) to the tokens that they belong to; inverse of `to_slots`."""
        ...


@dataclasses.dataclass(frozen=True)
class SamePosition:
    """The hidden state at slot i predicts token i (SUNDAE, AR2Diff, masked language models)."""

    back = 0

    def slot_of(self, tokens: jax.Array) -> jax.Array:
        """Returns the slots whose hidden states predict the tokens at these slots."""
        return tokens

    def to_slots(self, values: jax.Array) -> jax.Array:
        """Returns per-token values [B,T] unchanged."""
        return values

    def to_tokens(self, values: jax.Array) -> jax.Array:
        """Returns per-slot values [B,T] unchanged."""
        return values


@dataclasses.dataclass(frozen=True)
class Shifted:
    """The hidden state at slot i - 1 predicts token i (autoregressive models; DiffuLLaMA, arXiv 2410.17891).

    Only [B,T] values are shifted, never hidden states. Slot T - 1 receives the value of token 0, which is a
    conditioning token (every example starts with one), so what wraps around is never scored and never sampled. The same
    holds at the boundary of packed examples.
    """

    back = 1

    def slot_of(self, tokens: jax.Array) -> jax.Array:
        """Returns the slots before; the first token is conditioning and is never predicted."""
        return jnp.maximum(tokens - 1, 0)

    def to_slots(self, values: jax.Array) -> jax.Array:
        """Moves per-token values [B,T] one slot to the left."""
        return jnp.roll(values, -1, axis=1)

    def to_tokens(self, values: jax.Array) -> jax.Array:
        """Moves per-slot values [B,T] one slot to the right."""
        return jnp.roll(values, 1, axis=1)
