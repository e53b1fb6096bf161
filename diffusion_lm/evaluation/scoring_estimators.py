"""The estimators of `scoring.score`: autoregressive, and masked diffusion by five recipes."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from diffusion_lm.architectures.base import BoundModel
from diffusion_lm.core.alignment import SamePosition, Shifted
from diffusion_lm.core.errors import require
from diffusion_lm.core.rng import StreamKeys
from diffusion_lm.core.types import Batch
from diffusion_lm.nn.named_masks import named_visibility, noise_share
from diffusion_lm.nn.time_conditioning import time_input
from diffusion_lm.noise.weighting import BoundKind
from diffusion_lm.objectives.base import check_visibility
from diffusion_lm.objectives.block_layout import blocks_of, smallest_in_block

CHOICE_STREAM = "scoring/choice"


@dataclasses.dataclass(frozen=True)
class ExactAutoregressive:
    """The chain rule: one pass, exact.

    Attributes:
      visibility: "causal" or "prefix", as the model was trained.
      append_eos: whether the choices of a question are scored with EOS behind them.
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
    """What the estimators of masked diffusion share.

    Attributes:
      mask_id: id of MASK; it has no probability.
      draws: draws a row.
      alignment: which state predicts which token, as the model was trained (trap T20).
      visibility: as the model was trained.
      guidance: strength w of classifier-free guidance, logits c + w (c - u), u with the conditioning replaced by MASK;
        what is scored is then the guided model. 0 is off and costs nothing.
      append_eos: whether the choices of a question are scored with EOS behind them.
    """

    mask_id: int
    draws: int = 128
    alignment: Any = SamePosition()
    visibility: str = "full"
    guidance: float = 0.0
    append_eos: bool = False
    keeps_past_clean: ClassVar[bool] = False
    """Whether every token before a masked one is clean, as in the training of block diffusion."""

    def __post_init__(self):
        check_visibility(self.visibility, f"{type(self).__name__}.visibility")
        require_draws(self)

    def exact_for(self, tokens: int) -> bool:
        """False: every draw has masks of its own."""
        del tokens
        return False

    def _masked_nll(
        self, model: BoundModel, batch: Batch, masked: jax.Array, among: jax.Array | bool = True
    ) -> jax.Array:
        """Returns f32[B,T], the cross-entropy of masked tokens (those `among` them) times their loss weights."""
        canvas = jnp.where(masked, self.mask_id, batch.tokens)
        wanted = masked & among & (batch.loss_weights != 0)
        nll = _nll(model, batch, canvas, wanted, self.alignment, self.visibility, (self.mask_id,), self.guidance)
        return jnp.where(wanted, nll * batch.loss_weights, 0.0)

    def _bernoulli(self, batch: Batch, keys: StreamKeys, rate_B: jax.Array) -> jax.Array:
        return (_uniform(batch, keys) < rate_B[:, None]) & batch.target_mask


@dataclasses.dataclass(frozen=True)
class ExactCount(_Masked):
    """LLaDA's Monte Carlo (arXiv 2502.09992): exactly k of the n answer tokens are masked, n/k times their loss.

    k is evenly spaced over 1..n from one random start. One draw is exact where the answer is one token.
    """

    bound_kind: BoundKind = dataclasses.field(default="nelbo", init=False)
    random_start: bool = dataclasses.field(default=True, init=False)

    def exact_for(self, tokens: int) -> bool:
        """True for a single token, which is then masked."""
        return tokens == 1

    def nll(self, model: BoundModel, batch: Batch, keys: StreamKeys, level_B: jax.Array) -> jax.Array:
        """Returns f32[B], one unbiased draw of the negative ELBO."""
        blocks = blocks_of(batch, batch.tokens.shape[1], "target")
        total = jnp.sum(batch.target_mask, axis=1).astype(jnp.float32)
        count = jnp.clip(jnp.ceil((1.0 - level_B) * total), 1.0, jnp.maximum(total, 1.0))
        masked = smallest_in_block(_uniform(batch, keys), count[:, None], batch.target_mask, blocks)
        return total / count * jnp.sum(self._masked_nll(model, batch, masked), axis=1)


class _WeightedRates(_Masked):
    """Independent masks at a rate, 1/rate times their loss; subclasses say which rates."""

    def nll(self, model: BoundModel, batch: Batch, keys: StreamKeys, level_B: jax.Array) -> jax.Array:
        """Returns f32[B], the weighted loss of one draw at rate 1 - level."""
        rate = 1.0 - level_B
        masked = self._bernoulli(batch, keys, rate)
        return jnp.sum(self._masked_nll(model, batch, masked), axis=1) / rate


@dataclasses.dataclass(frozen=True)
class StratifiedRates(_WeightedRates):
    """Dream's estimate (arXiv 2508.15487): rates t spread over (0, 1], independent masks, 1/t times their loss."""

    bound_kind: BoundKind = dataclasses.field(default="nelbo", init=False)
    random_start: bool = dataclasses.field(default=True, init=False)


@dataclasses.dataclass(frozen=True)
class WeightedGrid(_WeightedRates):
    """The ELBO in `draws` discrete steps: rates k/draws, 1/t times the loss of masked tokens.

    It bounds the likelihood of the process with that many steps, which as a rule is looser than the continuous bound.
    """

    bound_kind: BoundKind = dataclasses.field(default="nelbo", init=False)
    random_start: bool = dataclasses.field(default=False, init=False)


@dataclasses.dataclass(frozen=True)
class UnweightedGrid(_Masked):
    """What the code of DiffuLLaMA (arXiv 2410.17891) scores with: the mean loss of masked tokens, over rates k/draws.

    No bound: without weights the many tokens of high rates count most. The mean is taken times the number of tokens, so
    that it is on the scale of a log-likelihood. A draw that masks nothing is 0.
    """

    bound_kind: BoundKind = dataclasses.field(default="pseudo", init=False)
    random_start: bool = dataclasses.field(default=False, init=False)

    def nll(self, model: BoundModel, batch: Batch, keys: StreamKeys, level_B: jax.Array) -> jax.Array:
        """Returns f32[B], the mean over the masked tokens of one draw times the number of tokens."""
        masked = self._bernoulli(batch, keys, 1.0 - level_B)
        weight = jnp.sum(jnp.where(masked, batch.loss_weights, 0.0), axis=1)
        total = jnp.sum(self._masked_nll(model, batch, masked), axis=1)
        return jnp.where(weight > 0, total / jnp.where(weight > 0, weight, 1.0), 0.0) * jnp.sum(batch.loss_weights, 1)


@dataclasses.dataclass(frozen=True)
class LeftToRight(_Masked):
    """The chain from left to right with MASK on everything still to come: Dream's `ar_ftb` (arXiv 2508.15487).

    Exact: it is the probability with which a sampler that opens one slot at a time, from the left, writes the target
    into a window of its length. It costs one forward pass a target token.
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
        """Returns f32[B], the sum over target tokens of -log p(token given the tokens before it and MASK behind)."""
        del keys, level_B
        place = jnp.cumsum(batch.target_mask, axis=1) - batch.target_mask
        longest = jnp.max(jnp.sum(batch.target_mask, axis=1))

        def step(state):
            number, total = state
            losses = self._masked_nll(model, batch, batch.target_mask & (place >= number), place == number)
            return number + 1, total + jnp.sum(losses, axis=1)

        start = (jnp.zeros((), place.dtype), jnp.zeros(batch.tokens.shape[0], jnp.float32))
        return jax.lax.while_loop(lambda state: state[0] < longest, step, start)[1]


def _nll(
    model, batch: Batch, canvas, wanted, alignment, visibility: str, forbidden: tuple[int, ...], guidance: float = 0.0
) -> jax.Array:
    """Returns f32[B,T], the cross-entropy of the batch's tokens given a canvas, at the wanted tokens."""

    def run(tokens, encoder):
        return model(
            tokens,
            visibility=named_visibility(visibility, batch.target_mask),
            positions=batch.positions,
            segment_ids=batch.segment_ids,
            encoder=encoder,
            time=time_input(model.spec, share, batch.target_mask),
        )

    share = noise_share(canvas != batch.tokens, batch.target_mask, visibility)
    targets, where = alignment.to_slots(batch.tokens), alignment.to_slots(wanted)
    hidden = run(canvas, batch.encoder)
    if guidance == 0:
        return alignment.to_tokens(model.nll(hidden, targets, where=where, forbidden=forbidden))
    (mask_id,), encoder = forbidden, batch.encoder
    if encoder is not None:
        encoder = dataclasses.replace(encoder, tokens=jnp.where(encoder.segment_ids > 0, mask_id, encoder.tokens))
    blank = run(jnp.where(batch.target_mask | (batch.segment_ids == 0), canvas, mask_id), encoder)
    stats = model.token_stats(
        hidden, where=where, score=targets, forbidden=forbidden, unconditional=blank, guidance=guidance
    )
    return -alignment.to_tokens(stats.target_log_prob)


def _uniform(batch: Batch, keys: StreamKeys) -> jax.Array:
    return keys.token_uniform(CHOICE_STREAM, batch.example_ids, batch.positions)


def require_draws(estimator: Any) -> None:
    """Raises `ConfigError` unless the estimator takes a draw."""
    require(
        isinstance(estimator.draws, int) and estimator.draws > 0,
        f"draws = {estimator.draws} is no number of draws",
        where=f"{type(estimator).__name__}.draws",
        fix="LLaDA uses 128, DiffuLLaMA 32.",
    )
