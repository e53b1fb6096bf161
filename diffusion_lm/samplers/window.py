"""The target window of a prompt: where it is, and where the generated target ends."""

import flax.struct
import jax
import jax.numpy as jnp

from diffusion_lm.core.real_tokens import is_text
from diffusion_lm.core.special import SpecialTokens
from diffusion_lm.core.types import Batch


@flax.struct.dataclass
class Window:
    """The target windows of a prompt batch.

    Attributes:
      starts: i32[B], the first target slot of each row.
      sizes: i32[B], the number of target slots; 0 in a row that only fills up the batch.
    """

    starts: jax.Array
    sizes: jax.Array

    @classmethod
    def of(cls, prompt: Batch) -> "Window":
        """Returns the windows of `prompt`."""
        return cls(
            starts=jnp.argmax(prompt.target_mask, axis=1).astype(jnp.int32),
            sizes=jnp.sum(prompt.target_mask, axis=1, dtype=jnp.int32),
        )


def without_target(prompt: Batch) -> jax.Array:
    """Returns the prompt's tokens with PAD in the whole target window, so that no reference text can leak."""
    return jnp.where(prompt.target_mask, prompt.special.pad_id, prompt.tokens)


def ends_before(tokens: jax.Array, target_mask: jax.Array, special: SpecialTokens) -> jax.Array:
    """Returns i32[B,T], the number of EOS or PAD tokens of the target before each slot."""
    ends = (target_mask & special.is_end(tokens)).astype(jnp.int32)
    return jnp.cumsum(ends, axis=1) - ends


def cut_at_end(tokens: jax.Array, target_mask: jax.Array, special: SpecialTokens) -> jax.Array:
    """Returns the tokens with PAD after the first EOS or PAD of each target; that EOS itself stays."""
    return jnp.where(target_mask & (ends_before(tokens, target_mask, special) > 0), special.pad_id, tokens)


def target_lengths(tokens: jax.Array, target_mask: jax.Array, special: SpecialTokens) -> jax.Array:
    """Returns i32[B], the number of generated tokens before the first EOS or PAD, which do not count (trap T55)."""
    return jnp.sum(is_text(cut_at_end(tokens, target_mask, special), target_mask, special), axis=1, dtype=jnp.int32)
