"""Length prediction, for models that decode windows of a known length (arXiv 2308.12219)."""

import dataclasses

import jax
import jax.numpy as jnp

from diffusion_lm.architectures.base import BoundModel
from diffusion_lm.architectures.length_head import length_logits
from diffusion_lm.core.alignment import Alignment, SamePosition
from diffusion_lm.core.real_tokens import is_text
from diffusion_lm.core.rng import StreamKeys
from diffusion_lm.core.types import Batch, LossTerms, WeightedMean
from diffusion_lm.nn.named_masks import check_visibility
from diffusion_lm.noise.weighting import BoundKind
from diffusion_lm.objectives.objective import Needs
from diffusion_lm.objectives.token_losses import weighted_mean, weighted_sum


@dataclasses.dataclass(frozen=True)
class LengthPrediction:
    """Cross-entropy of each target's length, EOS and PAD not counted, under the length head of a frozen network.

    Lengths beyond the last class count as the last class. The gradient of the network itself is 0, but weight decay
    would still change it: use an optimizer that freezes it (`training.partial.PartialAdamW`).

    Attributes:
      visibility: the one that the network was trained with.
    """

    visibility: str = "full"

    def __post_init__(self):
        check_visibility(self.visibility, "LengthPrediction.visibility")

    @property
    def alignment(self) -> Alignment:
        """Lengths are read from the whole row, so no state predicts a token."""
        return SamePosition()

    @property
    def bound_kind(self) -> BoundKind:
        """Not a bound: a loss of lengths says nothing about the likelihood of text."""
        return "pseudo"

    def needs(self) -> Needs:
        """One forward pass without a backward pass, over rows with one example each."""
        return Needs(visibility=self.visibility, frozen_passes=1, one_example_per_row=True)

    def loss(self, model: BoundModel, batch: Batch, keys: StreamKeys, *, train: bool = True) -> LossTerms:
        """Returns the summed cross-entropy in nats and the number of targets; it needs no noise and has no dropout.

        Metrics: `length_accuracy`, and `length_error`, the mean distance of the most likely length in tokens.
        """
        del keys, train
        logits_BC = length_logits(model, batch, self.visibility)
        lengths_B = target_lengths(batch)
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

    def bound(self, model: BoundModel, batch: Batch, keys: StreamKeys) -> LossTerms:
        """Returns the same sums."""
        return self.loss(model, batch, keys, train=False)


def target_lengths(batch: Batch) -> jax.Array:
    """Returns i32[B], the number of target tokens of each row that are neither EOS nor PAD."""
    return jnp.sum(is_text(batch.tokens, batch.target_mask, batch.special), axis=1, dtype=jnp.int32)
