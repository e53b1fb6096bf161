"""Next-token prediction: causal language models, prefix-LMs and the decoders of encoder-decoders.

L = sum over target tokens i of -log p(x_i | x_<i)
"""

import dataclasses

import jax.numpy as jnp

from diffusion_lm.architectures.base import BoundModel
from diffusion_lm.core.alignment import Shifted
from diffusion_lm.core.checks import check_non_negative, check_probability
from diffusion_lm.core.real_tokens import is_real
from diffusion_lm.core.rng import StreamKeys
from diffusion_lm.core.types import Batch, LossTerms
from diffusion_lm.nn.named_masks import check_visibility
from diffusion_lm.noise.contract import NO_NOISE, Contract
from diffusion_lm.noise.weighting import BoundKind
from diffusion_lm.objectives.forward_pass import ForwardPasses
from diffusion_lm.objectives.objective import Needs, evaluation_keys
from diffusion_lm.objectives.token_losses import weighted_mean, weighted_sum


@dataclasses.dataclass(frozen=True)
class Autoregressive:
    """Cross-entropy of each target token given the tokens before it.

    Attributes:
      visibility: "causal", or "prefix" for conditioning that attends to itself in both directions.
      z_loss: coefficient of log(Z)^2, which keeps the softmax normaliser near 1 (T5X and PaLM use 1e-4).
      label_smoothing: probability mass that the training target spreads over the vocabulary.
    """

    visibility: str = "causal"
    z_loss: float = 0.0
    label_smoothing: float = 0.0

    def __post_init__(self):
        check_visibility(self.visibility, "Autoregressive.visibility")
        check_non_negative(self.z_loss, "Autoregressive.z_loss", "Use 0.0 to leave it out, 1e-4 is usual.")
        check_probability(self.label_smoothing, "Autoregressive.label_smoothing", "0.1 is usual.", below_one=True)

    @property
    def bound_kind(self) -> BoundKind:
        """The chain rule makes the likelihood exact."""
        return "exact"

    @property
    def alignment(self) -> Shifted:
        """The state before a token predicts it."""
        return Shifted()

    def needs(self) -> Needs:
        """One pass, no MASK token."""
        return Needs(self.visibility, contracts=(Contract(NO_NOISE, self.visibility, self.alignment),))

    def loss(self, model: BoundModel, batch: Batch, keys: StreamKeys, *, train: bool = True) -> LossTerms:
        """Returns the summed loss in nats and the number of scored tokens.

        z-loss and label smoothing change the training loss only; metrics and evaluation are the plain likelihood.
        """
        hidden = ForwardPasses(model, batch, keys, visibility=self.visibility, train=train)(batch.tokens)
        targets = self.alignment.to_slots(batch.tokens)
        scored = self.alignment.to_slots(batch.loss_weights != 0)
        if train and (self.z_loss or self.label_smoothing):
            terms = model.nll_terms(hidden, targets, where=scored)
            nll = terms.nll
            loss = (1 - self.label_smoothing) * nll + self.label_smoothing * terms.uniform_nll
            loss = loss + self.z_loss * jnp.square(terms.log_z)
        else:
            nll = loss = model.nll(hidden, targets, where=scored)
        nll, loss = self.alignment.to_tokens(nll), self.alignment.to_tokens(loss)
        return LossTerms(
            loss_sum=weighted_sum(loss, batch.loss_weights),
            weight=jnp.sum(batch.loss_weights, dtype=jnp.float32),
            metrics={"nll_per_real_token": weighted_mean(nll, is_real(batch))},
        )

    def bound(self, model: BoundModel, batch: Batch, keys: StreamKeys) -> LossTerms:
        """Returns the exact negative log-likelihood; it needs no noise."""
        return self.loss(model, batch, evaluation_keys(keys), train=False)
