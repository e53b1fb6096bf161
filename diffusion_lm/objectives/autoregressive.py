"""Next-token prediction: causal language models, prefix-LMs and the decoders of encoder-decoders."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from diffusion_lm.core.alignment import Shifted
from diffusion_lm.core.errors import require
from diffusion_lm.core.real_tokens import real_tokens
from diffusion_lm.core.rng import StreamKeys
from diffusion_lm.core.types import Batch, LossTerms
from diffusion_lm.noise.contract import NO_NOISE, Contract
from diffusion_lm.noise.weighting import BoundKind
from diffusion_lm.objectives.base import (
    Forward,
    Model,
    Needs,
    check_visibility,
    frozen,
    weighted_mean,
    weighted_sum,
)


@dataclasses.dataclass(frozen=True)
class Autoregressive:
    """Cross-entropy of each target token given what stands before it.

    Attributes:
      visibility: "causal", or "prefix" for conditioning that sees itself in both directions.
      z_loss: coefficient of log(Z)^2, which keeps the softmax normaliser near 1 (T5X and PaLM use 1e-4).
      label_smoothing: probability mass that the training target spreads over the vocabulary.
      pad_id: filler inside a scored window; left out of the loss per real token.
      eos_id: ends a target; further ones behind the first are filler too.
    """

    visibility: str = "causal"
    z_loss: float = 0.0
    label_smoothing: float = 0.0
    pad_id: int = 0
    eos_id: int = 1

    def __post_init__(self):
        check_visibility(self.visibility, "Autoregressive.visibility")
        require(
            self.z_loss >= 0,
            f"z_loss = {self.z_loss} is negative",
            where="Autoregressive.z_loss",
            fix="0.0 turns it off, 1e-4 is usual.",
        )
        require(
            0 <= self.label_smoothing < 1,
            f"label_smoothing = {self.label_smoothing} is no probability below 1",
            where="Autoregressive.label_smoothing",
            fix="0.0 turns it off, 0.1 is usual in translation.",
        )

    @property
    def bound_kind(self) -> BoundKind:
        """The chain rule makes the likelihood exact."""
        return "exact"

    @property
    def alignment(self) -> Any:
        """The state before a token predicts it."""
        return Shifted()

    def needs(self) -> Needs:
        """One pass, no MASK token."""
        return Needs(self.visibility, contracts=(Contract(NO_NOISE, self.visibility, self.alignment),))

    def loss(self, model: Model, batch: Batch, keys: StreamKeys, *, train: bool = True) -> LossTerms:
        """Returns the summed loss in nats and the number of scored tokens.

        z-loss and label smoothing shape the gradient of training only; metrics and evaluation are the plain likelihood.
        """
        hidden = Forward(model, batch, keys, visibility=self.visibility, train=train)(batch.tokens)
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
            metrics={"nll_per_real_token": weighted_mean(nll, real_tokens(batch, self.pad_id, self.eos_id))},
        )

    def bound(self, model: Model, batch: Batch, keys: StreamKeys) -> LossTerms:
        """Returns the exact negative log-likelihood; it needs no noise."""
        return self.loss(model, batch, frozen(keys), train=False)
