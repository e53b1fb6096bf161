"""Learning how long targets are, for models that decode windows of a known length (arXiv 2308.12219)."""

import dataclasses

import jax
import jax.numpy as jnp

from diffusion_lm.architectures.length_head import length_logits
from diffusion_lm.core.real_tokens import text_tokens
from diffusion_lm.core.rng import StreamKeys
from diffusion_lm.core.types import Batch, LossTerms, WeightedMean
from diffusion_lm.noise.weighting import BoundKind
from diffusion_lm.objectives.base import Model, Needs, check_visibility, weighted_mean, weighted_sum


@dataclasses.dataclass(frozen=True)
class LengthPrediction:
    """Cross-entropy of each target's length, EOS and PAD not counted, under the length head of a frozen network.

    Lengths beyond the last class count as the last class. The gradient of the network itself is 0; an optimizer that
    decays weights must leave it alone all the same (`training.partial.PartialAdamW`).

    Attributes:
      visibility: under which the network was trained.
      eos_id: ends a target.
      pad_id: filler.
    """

    visibility: str = "full"
    eos_id: int = 1
    pad_id: int = 0

    def __post_init__(self):
        check_visibility(self.visibility, "LengthPrediction.visibility")

    @property
    def bound_kind(self) -> BoundKind:
        """A loss of lengths says nothing about the likelihood of text."""
        return "pseudo"

    def needs(self) -> Needs:
        """One pass without a backward one, over rows of one example each."""
        return Needs(visibility=self.visibility, frozen_passes=1, one_example_a_row=True)

    def loss(self, model: Model, batch: Batch, keys: StreamKeys, *, train: bool = True) -> LossTerms:
        """Returns the summed cross-entropy in nats and the number of targets; it needs no noise and has no dropout.

        Metrics: `length_accuracy`, and `length_error`, the mean distance of the most likely length in tokens.
        """
        del keys, train
        logits_BC = length_logits(model, batch, self.visibility)
        lengths_B = target_tokens(batch, self.eos_id, self.pad_id)
        classes_B = jnp.minimum(lengths_B, logits_BC.shape[1] - 1)
        log_p = jax.nn.log_softmax(logits_BC, axis=-1)
        nll = -jnp.take_along_axis(log_p, classes_B[:, None], axis=1)[:, 0]
        scored = jnp.any(batch.target_mask & (batch.loss_weights != 0), axis=1).astype(jnp.float32)
        best = jnp.argmax(logits_BC, axis=-1)
        metrics: dict[str, WeightedMean] = {
            "length_accuracy": weighted_mean((best == classes_B).astype(jnp.float32), scored),
            "length_error": weighted_mean(jnp.abs(best - lengths_B).astype(jnp.float32), scored),
        }
        return LossTerms(weighted_sum(nll, scored), jnp.sum(scored, dtype=jnp.float32), metrics)

    def bound(self, model: Model, batch: Batch, keys: StreamKeys) -> LossTerms:
        """Returns the same sums."""
        return self.loss(model, batch, keys, train=False)


def target_tokens(batch: Batch, eos_id: int, pad_id: int) -> jax.Array:
    """Returns i32[B], the target tokens of each row that are neither EOS nor PAD."""
    return jnp.sum(text_tokens(batch.tokens, batch.target_mask, pad_id, eos_id), axis=1, dtype=jnp.int32)
