"""Estimators of `scoring.score`: autoregressive, and five published ones for masked diffusion."""

import dataclasses
from typing import ClassVar, Protocol

import jax
import jax.numpy as jnp

from diffusion_lm.architectures.base import BoundModel
from diffusion_lm.core.alignment import Alignment, SamePosition, Shifted
from diffusion_lm.core.errors import require
from diffusion_lm.core.rng import StreamKeys
from diffusion_lm.core.types import Batch
from diffusion_lm.nn.named_masks import check_visibility, named_visibility, noise_share
from diffusion_lm.nn.time_conditioning import time_input
from diffusion_lm.noise.weighting import BoundKind
from diffusion_lm.objectives.block_layout import blocks_of, smallest_in_block

CHOICE_STREAM = "scoring/choice"


@dataclasses.dataclass(frozen=True)
class ExactAutoregressive:
    """The exact likelihood by the chain rule, in one forward pass.

    Attributes:
      visibility: "causal" or "prefix", as in training.
      append_eos: whether EOS is appended to the choices of a question.
    """

    visibility: str = "causal"
    append_eos: bool = False
    bound_kind: BoundKind = dataclasses.field(default="exact", init=False)
    draws: int = dataclasses.field(default=1, init=False)
    random_start: bool = dataclasses.field(default=False, init=False)

    def __post_init__(self):
        check_visibility(self.visibility, "ExactAutoregressive.visibility")

    def exact_for(self, tokens: int) -> bool:
        """True."""
        del tokens
        return True

    def nll(self, model: BoundModel, batch: Batch, keys: StreamKeys, level_B: jax.Array) -> jax.Array:
        """Returns f32[B], the exact negative log-likelihood."""
        del keys, level_B
        nll = _nll(model, batch, batch.tokens, batch.loss_weights != 0, Shifted(), self.visibility, ())
        return jnp.sum(nll * batch.loss_weights, axis=1)


@dataclasses.dataclass(frozen=True)
class _Masked:
    """Base class of the estimators for masked diffusion.

    Attributes:
      draws: number of draws per row.
      alignment: which position predicts which token, as in training (trap T20).
      visibility: attention visibility, as in training.
      guidance: strength w of classifier-free guidance: logits c + w (c - u), where u has MASK as conditioning. The
        scores are those of the guided model. 0 disables guidance and its second forward pass.
      append_eos: whether EOS is appended to the choices of a question.
    """

    draws: int = 128
    alignment: Alignment = SamePosition()
    visibility: str = "full"
    guidance: float = 0.0
    append_eos: bool = False
    needs_mask_token: ClassVar[bool] = True
    """Whether it replaces tokens by MASK, which the vocabulary of the run must then have."""
    keeps_past_clean: ClassVar[bool] = False
    """Whether all tokens before a masked token are clean, as in the training of block diffusion."""

    def __post_init__(self):
        check_visibility(self.visibility, f"{type(self).__name__}.visibility")
        require_draws(self)

    def exact_for(self, tokens: int) -> bool:
        """False, because every draw has different masks."""
        del tokens
        return False

    def _masked_nll(
        self, model: BoundModel, batch: Batch, masked: jax.Array, subset: jax.Array | bool = True
    ) -> jax.Array:
        """Returns f32[B,T], cross-entropy times loss weight at masked tokens (in `subset`), 0 elsewhere."""
        mask_id = batch.special.mask  # MASK itself has probability 0
        noisy_tokens = jnp.where(masked, mask_id, batch.tokens)
        scored = masked & subset & (batch.loss_weights != 0)
        nll = _nll(model, batch, noisy_tokens, scored, self.alignment, self.visibility, (mask_id,), self.guidance)
        return jnp.where(scored, nll * batch.loss_weights, 0.0)

    def _bernoulli(self, batch: Batch, keys: StreamKeys, rate_B: jax.Array) -> jax.Array:
        return (_uniform(batch, keys) < rate_B[:, None]) & batch.target_mask


@dataclasses.dataclass(frozen=True)
class ExactCount(_Masked):
    """LLaDA's Monte Carlo bound (arXiv 2502.09992): masks exactly k of n target tokens and weights their loss by n/k.

    k is evenly spaced over 1..n from one random start per row. One draw is exact if the target has one token.
    """

    bound_kind: BoundKind = dataclasses.field(default="nelbo", init=False)
    random_start: bool = dataclasses.field(default=True, init=False)

    def exact_for(self, tokens: int) -> bool:
        """True for a single token, which is always masked."""
        return tokens == 1

    def nll(self, model: BoundModel, batch: Batch, keys: StreamKeys, level_B: jax.Array) -> jax.Array:
        """Returns f32[B], one unbiased draw of the negative ELBO."""
        blocks = blocks_of(batch, batch.tokens.shape[1], "target")
        total = jnp.sum(batch.target_mask, axis=1).astype(jnp.float32)
        count = jnp.clip(jnp.ceil((1.0 - level_B) * total), 1.0, jnp.maximum(total, 1.0))
        masked = smallest_in_block(_uniform(batch, keys), count[:, None], batch.target_mask, blocks)
        return total / count * jnp.sum(self._masked_nll(model, batch, masked), axis=1)


class _WeightedRates(_Masked):
    """Masks each token independently with a rate and weights the loss by 1/rate; subclasses define the rates."""

    def nll(self, model: BoundModel, batch: Batch, keys: StreamKeys, level_B: jax.Array) -> jax.Array:
        """Returns f32[B], the weighted loss of one draw at rate 1 - level."""
        rate = 1.0 - level_B
        masked = self._bernoulli(batch, keys, rate)
        return jnp.sum(self._masked_nll(model, batch, masked), axis=1) / rate


@dataclasses.dataclass(frozen=True)
class StratifiedRates(_WeightedRates):
    """Dream's bound (arXiv 2508.15487): stratified rates t in (0, 1], independent masks, loss weight 1/t."""

    bound_kind: BoundKind = dataclasses.field(default="nelbo", init=False)
    random_start: bool = dataclasses.field(default=True, init=False)


@dataclasses.dataclass(frozen=True)
class WeightedGrid(_WeightedRates):
    """The bound of the process with `draws` discrete steps: rates t = k/draws, loss weight 1/t.

    It is usually looser than the bound in continuous time.
    """

    bound_kind: BoundKind = dataclasses.field(default="nelbo", init=False)
    random_start: bool = dataclasses.field(default=False, init=False)


@dataclasses.dataclass(frozen=True)
class UnweightedGrid(_Masked):
    """The score of DiffuLLaMA's code (arXiv 2410.17891): mean loss of masked tokens, averaged over rates k/draws.

    This is not a bound, because the weights 1/t are missing. The mean is multiplied by the number of tokens to have the
    scale of a log-likelihood. A draw without masked tokens is 0.
    """

    bound_kind: BoundKind = dataclasses.field(default="pseudo", init=False)
    random_start: bool = dataclasses.field(default=False, init=False)

    def nll(self, model: BoundModel, batch: Batch, keys: StreamKeys, level_B: jax.Array) -> jax.Array:
        """Returns f32[B], the mean loss over the masked tokens of one draw, times the number of tokens."""
        masked = self._bernoulli(batch, keys, 1.0 - level_B)
        weight = jnp.sum(jnp.where(masked, batch.loss_weights, 0.0), axis=1)
        total = jnp.sum(self._masked_nll(model, batch, masked), axis=1)
        return jnp.where(weight > 0, total / jnp.where(weight > 0, weight, 1.0), 0.0) * jnp.sum(batch.loss_weights, 1)


@dataclasses.dataclass(frozen=True)
class LeftToRight(_Masked):
    """The chain rule from left to right with MASK at all later positions: Dream's `ar_ftb` (arXiv 2508.15487).

    It is the exact probability that a sampler generates the target when it unmasks one token per step from left to
    right, in a window of the target's length. It needs one forward pass per target token.
    """

    draws: int = dataclasses.field(default=1, init=False)
    bound_kind: BoundKind = dataclasses.field(default="exact", init=False)
    random_start: bool = dataclasses.field(default=False, init=False)
    keeps_past_clean: ClassVar[bool] = True

    def exact_for(self, tokens: int) -> bool:
        """True."""
        del tokens
        return True

    def nll(self, model: BoundModel, batch: Batch, keys: StreamKeys, level_B: jax.Array) -> jax.Array:
        """Returns f32[B], the sum over target tokens of -log p(token | tokens before it, MASK from it on)."""
        del keys, level_B
        index = jnp.cumsum(batch.target_mask, axis=1) - batch.target_mask  # index of each token in its target
        longest = jnp.max(jnp.sum(batch.target_mask, axis=1))

        def step(state):
            number, total = state
            # Rows with shorter targets have no token with this index and add 0.
            losses = self._masked_nll(model, batch, batch.target_mask & (index >= number), index == number)
            return number + 1, total + jnp.sum(losses, axis=1)

        start = (jnp.zeros((), index.dtype), jnp.zeros(batch.tokens.shape[0], jnp.float32))
        return jax.lax.while_loop(lambda state: state[0] < longest, step, start)[1]


def _nll(
    model,
    batch: Batch,
    noisy_tokens: jax.Array,
    scored: jax.Array,
    alignment: Alignment,
    visibility: str,
    forbidden: tuple[int, ...],
    guidance: float = 0.0,
) -> jax.Array:
    """Returns f32[B,T], the cross-entropy of the batch's tokens given i32[B,T] noisy tokens, where bool[B,T] scored."""

    def run(tokens, encoder):
        return model(
            tokens,
            visibility=named_visibility(visibility, batch.target_mask),
            positions=batch.positions,
            segment_ids=batch.segment_ids,
            encoder=encoder,
            time=time_input(model.spec, share, batch.target_mask),
        )

    # A time-conditioned network is conditioned on the fraction of noisy tokens.
    share = noise_share(noisy_tokens != batch.tokens, batch.target_mask, visibility)
    # `to_slots` moves each target to the position whose hidden state predicts it; `to_tokens` moves the loss back.
    targets, where = alignment.to_slots(batch.tokens), alignment.to_slots(scored)
    hidden = run(noisy_tokens, batch.encoder)
    if guidance == 0:
        return alignment.to_tokens(model.nll(hidden, targets, where=where, forbidden=forbidden))
    # The unconditional pass replaces the conditioning, in encoder and decoder, by MASK; padding stays.
    (mask_id,), encoder = forbidden, batch.encoder
    if encoder is not None:
        encoder = dataclasses.replace(encoder, tokens=jnp.where(encoder.segment_ids > 0, mask_id, encoder.tokens))
    unconditional = run(jnp.where(batch.target_mask | (batch.segment_ids == 0), noisy_tokens, mask_id), encoder)
    stats = model.token_stats(
        hidden, where=where, score=targets, forbidden=forbidden, unconditional=unconditional, guidance=guidance
    )
    return -alignment.to_tokens(stats.target_log_prob)


def _uniform(batch: Batch, keys: StreamKeys) -> jax.Array:
    return keys.token_uniform(CHOICE_STREAM, batch.example_ids, batch.positions)


class HasDraws(Protocol):
    """An estimator with a configured number of draws."""

    @property
    def draws(self) -> int:
        """Number of draws per row."""
        ...


def require_draws(estimator: HasDraws) -> None:
    """Raises `ConfigError` unless `draws` is a positive integer."""
    require(
        isinstance(estimator.draws, int) and estimator.draws > 0,
        f"draws={estimator.draws!r}: must be an integer >= 1",
        where=f"{type(estimator).__name__}.draws",
        fix="LLaDA uses 128, DiffuLLaMA 32.",
    )
