"""Real tokens of a target: one definition for losses, bounds, scores, lengths and reports.

A scored target window may contain filler after the text: PAD (AR2Diff) or EOS (LLaDA, Dream) up to its end. The model
learns length from it, and it has a loss, but it is not text. The first EOS, which ends the text, is a real token.
"""

import jax
import jax.numpy as jnp

from diffusion_lm.core.special import SpecialTokens
from diffusion_lm.core.types import Batch


def filler(tokens: jax.Array, target_mask: jax.Array, pad_id: int, eos_id: int) -> jax.Array:
    """Returns bool[B,T], the filler among the target tokens: PAD, and each EOS directly after another EOS.

    An EOS that separates two documents of one target follows text, so it is real, as is the text after it.

    Args:
      tokens: i32[B,T].
      target_mask: bool[B,T]; the first slot of every packed example is conditioning, as in `Batch`.
      pad_id: id of PAD.
      eos_id: id of EOS.
    """
    ends = target_mask & (tokens == eos_id)
    after_end = jnp.pad(ends[:, :-1], ((0, 0), (1, 0)))
    return target_mask & ((tokens == pad_id) | (ends & after_end))


def real_tokens(batch: Batch, pad_id: int, eos_id: int) -> jax.Array:
    """Returns bool[B,T], the scored target tokens that are not filler.

    A diffusion model that learns length from scored filler has an easy loss on it. Only the loss per *real* token can
    be compared with that of an autoregressive model.
    """
    unreal = filler(batch.tokens, batch.target_mask, pad_id, eos_id)
    return batch.target_mask & (batch.loss_weights > 0) & ~unreal


def text_tokens(tokens: jax.Array, target_mask: jax.Array, pad_id: int, eos_id: int) -> jax.Array:
    """Returns bool[B,T], the target tokens that are text: neither filler nor EOS. Their number is a target's length."""
    return target_mask & (tokens != eos_id) & ~filler(tokens, target_mask, pad_id, eos_id)


def is_filler(tokens: jax.Array, target_mask: jax.Array, special: SpecialTokens) -> jax.Array:
    """Returns bool[B,T], the filler among the target tokens: PAD, and each EOS directly after another EOS.

    An EOS that separates two documents of one target follows text, so it is real, as is the text after it.

    Args:
      tokens: i32[B,T].
      target_mask: bool[B,T]; the first slot of every packed example is conditioning, as in `Batch`.
      special: the special tokens of the vocabulary.
    """
    ends = target_mask & special.is_eos(tokens)
    after_end = jnp.pad(ends[:, :-1], ((0, 0), (1, 0)))
    return target_mask & ((tokens == special.pad_id) | (ends & after_end))


def is_real(batch: Batch) -> jax.Array:
    """Returns bool[B,T], the scored target tokens that are not filler.

    A diffusion model that learns length from scored filler has an easy loss on it. Only the loss per *real* token can
    be compared with that of an autoregressive model.
    """
    unreal = is_filler(batch.tokens, batch.target_mask, batch.special)
    return batch.target_mask & (batch.loss_weights > 0) & ~unreal


def is_text(tokens: jax.Array, target_mask: jax.Array, special: SpecialTokens) -> jax.Array:
    """Returns bool[B,T], the target tokens that are text: neither filler nor EOS. Their number is a target's length."""
    return target_mask & ~special.is_eos(tokens) & ~is_filler(tokens, target_mask, special)
