"""Which hidden state predicts which token: the one difference between how AR and diffusion models read their output."""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class SamePosition:
    """The hidden state at slot i predicts token i (SUNDAE, AR2Diff, masked language models).

    Attributes:
      back: how many slots before its token a state stands.
    """

    back = 0

    def slot_of(self, tokens: jax.Array) -> jax.Array:
        """Returns the slots whose hidden states predict the tokens at these slots."""
        return tokens

    def to_slots(self, values: jax.Array) -> jax.Array:
        """Moves per-token values [B,T] (targets, keys) to the slots that predict those tokens."""
        return values

    def to_tokens(self, values: jax.Array) -> jax.Array:
        """Moves per-slot values [B,T] (losses, draws) to the tokens they speak about; undoes `to_slots`."""
        return values


@dataclasses.dataclass(frozen=True)
class Shifted:
    """The hidden state at slot i - 1 predicts token i (autoregressive models; DiffuLLaMA, arXiv 2410.17891).

    Only [B,T] values move, never hidden states. Slot T - 1 is handed token 0, a conditioning token (every example opens
    with one), so what wraps around is never scored and never written; the same holds at the border of packed examples.

    Attributes:
      back: how many slots before its token a state stands.
    """

    back = 1

    def slot_of(self, tokens: jax.Array) -> jax.Array:
        """Returns the slots before; what stands first is conditioning and is never asked for."""
        return jnp.maximum(tokens - 1, 0)

    def to_slots(self, values: jax.Array) -> jax.Array:
        """Moves per-token values [B,T] one slot to the left."""
        return jnp.roll(values, -1, axis=1)

    def to_tokens(self, values: jax.Array) -> jax.Array:
        """Moves per-slot values [B,T] one slot to the right."""
        return jnp.roll(values, 1, axis=1)
