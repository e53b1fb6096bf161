"""Masked diffusion whose masking schedule is learned, one exponent a token (GenMD4, arXiv 2406.04329, section 6).

    alpha_i(t) = 1 - t^(w_i),  w the exponents of the network (`architectures.exponents`)

What is masked depends on w, so the gradient has two parts: that of the loss at given masks, and that of the masks' law.
"""

import dataclasses

import jax
import jax.numpy as jnp

from diffusion_lm.architectures.base import BoundModel
from diffusion_lm.architectures.exponents import token_exponents
from diffusion_lm.core.alignment import Alignment, SamePosition
from diffusion_lm.core.errors import ConfigError, require
from diffusion_lm.core.rng import StreamKeys
from diffusion_lm.core.segments import segment_sum
from diffusion_lm.core.types import Batch, LossTerms
from diffusion_lm.nn.named_masks import check_visibility
from diffusion_lm.noise.choice import bernoulli
from diffusion_lm.noise.contract import MASK_NOISE, Contract
from diffusion_lm.noise.time_sampling import TIME_STREAM, UniformTime
from diffusion_lm.noise.weighting import BoundKind
from diffusion_lm.objectives.draws import bound_times, check_draws, mean_over_draws
from diffusion_lm.objectives.forward_pass import ForwardPasses
from diffusion_lm.objectives.objective import Needs, evaluation_keys
from diffusion_lm.objectives.token_losses import mapped_losses, per_token_terms, weighted_mean


@dataclasses.dataclass(frozen=True)
class TokenSchedules:
    """The negative ELBO of masked diffusion under schedules of the tokens' own, and its gradient by the schedules too.

    From time t to t - dt a masked token i is revealed with probability w_i dt / t. The model draws its token j from mu
    and reveals it at that token's rate, so what a masked slot costs a unit of time is

        (1/t) [ -w_i (1 + log mu_i) + sum_j w_j mu_j ]

    which is never negative and, with all w = 1, is -log mu_i / t. Over t in (0, 1] it is a bound for every w.

    `loss` takes two draws x, x' of the masks at one time, with losses f, f', and adds to the gradient of (f + f') / 2

        (f - f')/2 (grad log q(x) - grad log q(x')),    log q = sum over targets of log(t^w_i) or log(1 - t^w_i)

    the score-function estimator in which each draw is the other's baseline. f is the sum over an example, whose tokens
    are predicted from each other's masks; examples of a packed row do not touch.

    Attributes:
      time: at which t an example is trained. Below `time.low` the bound continues with a model that knows the schedules
        alone: at time low, a masked token is j with probability proportional to low^(w_j). The term is exact, and
        without it the schedules would learn to hide their cost there.
      alignment: which hidden state predicts which token.
      visibility: "full", or another name of `nn.named_masks.named_visibility`.
      evaluation_draws: times of `bound` per example, spread evenly from a random start.
    """

    time: UniformTime = UniformTime(low=1e-3, stratified=True)
    alignment: Alignment = SamePosition()
    visibility: str = "full"
    evaluation_draws: int = 8

    def __post_init__(self):
        check_visibility(self.visibility, "TokenSchedules.visibility")
        check_draws(self.evaluation_draws, "TokenSchedules.evaluation_draws")
        low, high = getattr(self.time, "low", None), getattr(self.time, "high", None)
        require(
            low is not None and high == 1.0,
            f"times up to {high} leave out a part of the bound, which the schedules would learn to use",
            where="TokenSchedules.time",
            fix="Use UniformTime with high = 1.0.",
        )

    @property
    def bound_kind(self) -> BoundKind:
        """A negative ELBO, whatever the exponents are."""
        return "nelbo"

    def needs(self) -> Needs:
        """Two passes, MASK, and a network with exponents."""
        contract = Contract(MASK_NOISE, self.visibility, self.alignment)
        return Needs(
            visibility=self.visibility,
            passes=2,
            mask_token=True,
            token_schedules=True,
            contracts=(contract,),
        )

    def loss(self, model: BoundModel, batch: Batch, keys: StreamKeys, *, train: bool = True) -> LossTerms:
        """Returns the summed loss of an example's two draws, half each; `weight` counts each scored token once.

        Metrics: `nll_per_real_token`, an estimate of the bound; `exponent_per_token`, the mean w of the scored tokens.
        """
        low = self.time.low
        t = self.time.draw(keys, batch.example_ids, strata=batch.strata)
        other = keys.replace(root=jax.random.fold_in(keys.root, 1))
        draws = tuple(self._masks(t, model, batch, draw_keys) for draw_keys in (keys, other))
        return self.terms(t, draws, model, batch, keys, train=train, factor=1.0 - low, low=low)

    def bound(self, model: BoundModel, batch: Batch, keys: StreamKeys) -> LossTerms:
        """Returns an unbiased estimate of the negative ELBO, with frozen noise and without dropout.

        It goes down to t = 0, whatever the times of training are, with one draw of the masks a time.
        """
        keys = evaluation_keys(keys)
        uniform = keys.example_uniform(TIME_STREAM, batch.example_ids)

        def one(offset, draw_keys):
            t, factor = bound_times(uniform, offset)
            masks = self._masks(t, model, batch, draw_keys)
            return self.terms(t, (masks,), model, batch, draw_keys, train=False, factor=factor)

        return mean_over_draws(keys, self.evaluation_draws, one)

    def terms(
        self,
        t_BT: jax.Array,
        draws: tuple[jax.Array, ...],
        model: BoundModel,
        batch: Batch,
        keys: StreamKeys,
        *,
        train: bool,
        factor: jax.Array | float = 1.0,
        low: float = 0.0,
    ) -> LossTerms:
        """Returns the sums at given times and masks.

        Args:
          t_BT: f32[B,T] in (0, 1], one time an example.
          draws: one or two bool[B,T], which tokens are MASK. Two make the gradient by the exponents whole.
          model: a network with exponents.
          batch: the targets.
          keys: of the dropout.
          train: whether there is any.
          factor: one over the density of the times.
          low: where the times begin; see `time`.
        """
        w_V = _exponents(model)
        w_BT = w_V[batch.tokens]
        forward = ForwardPasses(model, batch, keys, visibility=self.visibility, train=train, passes=len(draws))
        losses = [
            factor * self._draw_losses(t_BT, masked, w_V, model, batch, forward, number)
            for number, masked in enumerate(draws)
        ]
        mean = sum(losses) / len(losses) + self._start(low, w_V, w_BT, batch.special.mask)
        plain = per_token_terms(mean, batch)
        metrics = {**plain.metrics, "exponent_per_token": weighted_mean(w_BT, batch.loss_weights)}
        loss_sum = plain.loss_sum
        if len(draws) == 2:
            score = _score(t_BT, draws, losses, w_BT, batch)
            loss_sum += score - jax.lax.stop_gradient(score)
        return LossTerms(loss_sum, plain.weight, metrics)

    def _masks(self, t_BT: jax.Array, model: BoundModel, batch: Batch, keys: StreamKeys) -> jax.Array:
        """Returns bool[B,T], each target token by itself with probability t^w."""
        rate = jax.lax.stop_gradient(jnp.exp(_exponents(model)[batch.tokens] * jnp.log(t_BT)))
        return bernoulli(keys, batch, rate)

    def _draw_losses(
        self,
        t_BT: jax.Array,
        masked_BT: jax.Array,
        w_V: jax.Array,
        model: BoundModel,
        batch: Batch,
        forward,
        number: int,
    ) -> jax.Array:
        """Returns f32[B,T], the integrand at scored masked tokens and 0 elsewhere."""

        def fn(logits, tokens, t):
            log_p = jax.nn.log_softmax(logits, axis=-1)
            rate = w_V[tokens]
            log_mu = jnp.take_along_axis(log_p, tokens[..., None], axis=-1)[..., 0]
            return (jnp.sum(jnp.exp(log_p) * w_V, axis=-1) - rate * (1.0 + log_mu)) / t

        hidden = forward(jnp.where(masked_BT, batch.special.mask, batch.tokens), number, rate=t_BT)
        seen = batch.replace(loss_weights=jnp.where(masked_BT, batch.loss_weights, 0.0))
        return mapped_losses(
            model, hidden, self.alignment, seen, fn, batch.tokens, t_BT, forbidden=(batch.special.mask,)
        )

    def _start(self, low: float, w_V: jax.Array, w_BT: jax.Array, mask_id: int) -> jax.Array:
        """Returns f32[B,T], the mean of what a token costs that is still MASK at time `low`."""
        if low == 0.0:
            return jnp.zeros_like(w_BT)
        log_low = jnp.log(jnp.float32(low))
        is_token = jnp.arange(w_V.shape[0]) != mask_id
        log_total = jax.nn.logsumexp(w_V * log_low, where=is_token)
        return jnp.exp(w_BT * log_low) * (log_total - w_BT * log_low)


def _exponents(model: BoundModel) -> jax.Array:
    found = token_exponents(model)
    if found is None:
        raise ConfigError(
            "the network has no exponents",
            where="TokenSchedules",
            fix="Wrap it: run.TrainRun.model = @exponents.WithTokenSchedules(), as gin/runs/token_schedules.gin does.",
        )
    return found


def _score(t_BT: jax.Array, draws: tuple[jax.Array, ...], losses: list[jax.Array], w_BT: jax.Array, batch: Batch):
    """Returns f32[] whose gradient by w is that of the masks' law, summed over examples; its value means nothing.

    log q of a slot differs between the draws only where it is MASK in one of them, and there by the logit of t^w.
    """
    first, second = draws
    summed = [segment_sum(loss * batch.loss_weights, batch.segment_ids) for loss in losses]
    advantage = jax.lax.stop_gradient(summed[0] - summed[1])
    differs = (first != second) & batch.target_mask
    log_rate = jnp.minimum(jnp.where(differs, w_BT * jnp.log(t_BT), -1.0), -1e-30)
    logit = log_rate - jnp.log(-jnp.expm1(log_rate))
    return 0.5 * jnp.sum(jnp.where(differs, jnp.where(first, logit, -logit) * advantage, 0.0))
