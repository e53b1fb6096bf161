"""Alignment: which hidden state predicts which token. It differs between AR and diffusion models."""

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp


class Alignment(Protocol):
    """Maps between tokens and the slots whose hidden states predict them. Implementations are frozen dataclasses."""

    def __hash__(self) -> int: ...

    @property
    def back(self) -> int:
        """Number of slots by which the predicting hidden state precedes its token: 0 or 1."""
        ...

    def slot_of(self, tokens: jax.Array) -> jax.Array:
        """Maps slots of tokens to the slots whose hidden states predict them; any shape."""
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
        """Returns `tokens`."""
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

    Only [B,T] values are shifted, never hidden states. The shift wraps around: slot T - 1 gets the value of token 0.
    This is a conditioning token, as is the first token of every packed example, so it is never scored or sampled.
    """

    back = 1

    def slot_of(self, tokens: jax.Array) -> jax.Array:
        """Returns `tokens - 1`, at least 0: the first token is conditioning and is never predicted."""
        return jnp.maximum(tokens - 1, 0)

    def to_slots(self, values: jax.Array) -> jax.Array:
        """Moves per-token values [B,T] one slot to the left."""
        return jnp.roll(values, -1, axis=1)

    def to_tokens(self, values: jax.Array) -> jax.Array:
        """Moves per-slot values [B,T] one slot to the right."""
        return jnp.roll(values, 1, axis=1)
