"""Diffusion with uniform or hybrid noise, trained on its likelihood bound: UDLM, D3PM-uniform, GIDD.

In continuous time, with q = q_t(. | x) and q_theta = q_t(. | p_theta) its value at the predicted distribution,

    -log p(x)  <=  E_t E_{z ~ q} [ r_t(z)/q(z) x ( KL(q || q_theta) + q(z)/q_theta(z) - log q(z)/q_theta(z) - 1 ) ]

(GIDD, arXiv 2503.04482). For uniform noise it is the bound of UDLM (arXiv 2412.10193), for MASK alone the weighted
cross-entropy of MDLM. In discrete time it is D3PM's sum of T divergences of the reverse steps (arXiv 2107.03006).

Where noise looks like data, intact tokens carry loss too, since the model must say that they are intact (trap T17). The
bound needs the whole predicted distribution of every token; it is computed in chunks, and [B,T,V] is never formed.
"""

import dataclasses
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from diffusion_lm.architectures.base import BoundModel
from diffusion_lm.core.alignment import Alignment, SamePosition
from diffusion_lm.core.checks import check_count, check_non_negative, check_positive
from diffusion_lm.core.errors import require
from diffusion_lm.core.rng import StreamKeys
from diffusion_lm.core.types import Batch, LossTerms
from diffusion_lm.nn.named_masks import check_visibility
from diffusion_lm.noise.contract import Contract
from diffusion_lm.noise.process import (
    SMALLEST,
    Hybrid,
    InterpolatingProcess,
    Marginal,
    Uniform,
    forbidden_ids,
    mask_id_of,
    noise_at,
)
from diffusion_lm.noise.time_sampling import TIME_STREAM, TimeSampler, UniformTime
from diffusion_lm.noise.weighting import BoundKind
from diffusion_lm.objectives.draws import bound_times, check_draws, mean_over_draws, shifted
from diffusion_lm.objectives.forward_pass import ForwardPasses
from diffusion_lm.objectives.objective import Needs, evaluation_keys
from diffusion_lm.objectives.token_losses import mapped_losses, per_token_terms


class Divergence(NamedTuple):
    """How far the predicted marginal at a noise level, alpha p_theta + noise, is from the true one; f32[b,t].

    Attributes:
      kl: KL(q_t(. | x) || q_t(. | p_theta)).
      log_ratio: log q_t(z | x) / q_t(z | p_theta) at the noisy token z.
    """

    kl: jax.Array
    log_ratio: jax.Array


def divergence(log_p_btV, tokens, noisy, level: Marginal, mask_id: int | None) -> Divergence:
    """Compares the marginals of the predicted and of the clean token.

    Everything is written with u = q_theta/q - 1, which is of the order of alpha: differences of logarithms would lose
    all digits at high noise, where rates are large.

    Args:
      log_p_btV: f32[b,t,V], log p_theta(x | z_t).
      tokens: i32[b,t], x.
      noisy: i32[b,t], z_t.
      level: the noise level of each token.
      mask_id: the id of MASK, or None.
    """
    vocab_size = log_p_btV.shape[-1]
    ids = jnp.arange(vocab_size)
    alpha = level.signal

    def excess(token):
        """Returns q(token | x), u and -log(1 + u) at a token."""
        log_p = jnp.take_along_axis(log_p_btV, token[..., None], axis=-1)[..., 0]
        noise = noise_at(token, mask_id, level.mask, level.uniform, vocab_size)
        q = jnp.where(token == tokens, alpha + noise, noise)
        # q is 0 where the noise cannot produce the token.
        positive = jnp.maximum(q, jnp.finfo(jnp.float32).tiny)
        u = alpha * (jnp.exp(log_p) - (token == tokens)) / positive
        # Near -1, 1 + u has lost its digits: the logarithm of the predicted share itself has them.
        tiny = jnp.finfo(jnp.float32).tiny
        log_share = jnp.logaddexp(jnp.log(jnp.maximum(alpha, tiny)) + log_p, jnp.log(jnp.maximum(noise, tiny)))
        return q, u, jnp.where(u > -0.5, -jnp.log1p(jnp.maximum(u, -0.5)), jnp.log(positive) - log_share)

    # Only the clean and the noisy token have signal in q; all others are pure noise and follow in closed form below.
    q_x, u_x, log_ratio_x = excess(tokens)
    _, _, log_ratio_z = excess(noisy)
    noise_btV = noise_at(ids, mask_id, level.mask[..., None], level.uniform[..., None], vocab_size)
    share_btV = alpha[..., None] * jnp.exp(log_p_btV)
    # For j != x: q log(q / q_theta) + q_theta - q = alpha p_j - n_j log(1 + alpha p_j / n_j).
    ratio_btV = share_btV / jnp.maximum(noise_btV, 1e-30)
    elsewhere = share_btV - jnp.where(
        noise_btV > 0, noise_btV * jnp.log1p(jnp.where(noise_btV > 0, ratio_btV, 0.0)), 0.0
    )
    kl = jnp.sum(jnp.where(ids == tokens[..., None], 0.0, elsewhere), axis=-1) + q_x * (u_x + log_ratio_x)
    return Divergence(kl, log_ratio_z)


def marginal_at(tokens, noisy, level: Marginal, mask_id: int | None, vocab_size: int) -> jax.Array:
    """Returns q_t(z | x)."""
    noise = noise_at(noisy, mask_id, level.mask, level.uniform, vocab_size)
    return jnp.where(noisy == tokens, level.signal + noise, noise)


class IntegrandWeight(Protocol):
    """Weight of the bound's integrand in training; `bound` always uses `Elbo`."""

    def __hash__(self) -> int: ...

    def weigh(
        self,
        tokens: jax.Array,
        noisy: jax.Array,
        t: jax.Array,
        process: InterpolatingProcess,
        mask_id: int | None,
        vocab_size: int,
    ) -> jax.Array:
        """Returns f32 weights in the shape of the clean tokens x, the noisy tokens z and the times t."""
        ...


@dataclasses.dataclass(frozen=True)
class Elbo:
    """r_t(z) / q_t(z | x): the weight of the negative ELBO in continuous time."""

    def weigh(self, tokens, noisy, t, process, mask_id, vocab_size) -> jax.Array:
        """Returns the weights; see `IntegrandWeight`."""
        level = process.marginal(t)
        rate = noise_at(noisy, mask_id, level.mask_rate, level.uniform_rate, vocab_size)
        return rate / jnp.maximum(marginal_at(tokens, noisy, level, mask_id, vocab_size), 1e-30)


@dataclasses.dataclass(frozen=True)
class LogSnr:
    """`Elbo` x |dt / d log(alpha/(1 - alpha))|: the negative ELBO per unit of log-SNR instead of time.

    For MASK alone it is 1. It is the training weight in the code of arXiv 2512.10858, which writes it as the ELBO's
    weight times the density of the log-SNR at uniform times.

    Attributes:
      max_weight: upper limit of a weight; the code uses 1000.
    """

    max_weight: float = 1000.0

    def __post_init__(self):
        check_positive(self.max_weight, "LogSnr.max_weight")

    def weigh(self, tokens, noisy, t, process, mask_id, vocab_size) -> jax.Array:
        """Returns the weights; see `IntegrandWeight`."""
        level = process.marginal(t)
        # d log(alpha/(1 - alpha))/dt = alpha'/alpha / (1 - alpha), and the sum of all rates is -alpha'/alpha.
        slope = (level.mask_rate + level.uniform_rate) / jnp.maximum(1.0 - level.signal, SMALLEST)
        weight = Elbo().weigh(tokens, noisy, t, process, mask_id, vocab_size) / slope
        return jnp.minimum(weight, self.max_weight)


@dataclasses.dataclass(frozen=True)
class Dynamic:
    """GIDD's weights: 2 on MASK, 1 on other noise, B/V SNR^(-gamma/2) on intact tokens, SNR = (1 - t)/t.

    They keep the ratios of the ELBO's weights r_t(z)/q_t(z | x) and drop their common scale, which diverges at both
    ends (arXiv 2503.04482, section 4). In the ELBO, intact over other noise is c_t/V / (1 - t + c_t/V), and
    c_t/(1 - t) = B SNR^(-1/2) for gamma = 1: intact tokens count least where there is little noise.

    Attributes:
      max_weight: upper limit of a weight; the release uses 2.
    """

    max_weight: float = 2.0

    def __post_init__(self):
        check_positive(self.max_weight, "Dynamic.max_weight")

    def weigh(self, tokens, noisy, t, process, mask_id, vocab_size) -> jax.Array:
        """Returns the weights; see `IntegrandWeight`."""
        # The SNR has no finite value at the ends.
        t = jnp.clip(t, 1e-6, 1.0 - 1e-6)
        intact = process.scale / vocab_size * (t / (1.0 - t)) ** (0.5 * process.gamma)
        weight = jnp.where(noisy == mask_id, 2.0, jnp.where(noisy == tokens, intact, 1.0))
        return jnp.minimum(weight, self.max_weight)


@dataclasses.dataclass(frozen=True)
class UniformDiffusion:
    """The negative ELBO of an interpolating noise process, over all target positions, intact ones included.

    Attributes:
      process: `process.Uniform`, `process.Hybrid` or `process.Absorbing`.
      steps: T of discrete time (D3PM: 1000), with a schedule that ends without signal; None = continuous time.
      weighting: `Elbo` trains the bound, `Dynamic` and `LogSnr` are GIDD's training weights. `bound` is the bound
        whatever it is.
      auxiliary: weight of D3PM's second loss, the plain cross-entropy of all scored tokens (L_lambda). 0 disables it;
        `bound` does not have it.
      time: at which t an example is trained.
      alignment: which hidden state predicts which token.
      visibility: "full", or another name of `nn.named_masks.named_visibility`.
      evaluation_draws: times of `bound` per example, spread evenly from a random start.
    """

    process: InterpolatingProcess = Uniform()
    steps: int | None = None
    weighting: IntegrandWeight = Elbo()
    auxiliary: float = 0.0
    time: TimeSampler = UniformTime()
    alignment: Alignment = SamePosition()
    visibility: str = "full"
    evaluation_draws: int = 4

    def __post_init__(self):
        check_visibility(self.visibility, "UniformDiffusion.visibility")
        check_draws(self.evaluation_draws, "UniformDiffusion.evaluation_draws")
        check_non_negative(self.auxiliary, "UniformDiffusion.auxiliary", "Use 0.0 to leave the second loss out.")
        require(
            not isinstance(self.weighting, Dynamic) or isinstance(self.process, Hybrid),
            f"Dynamic() weights are defined for the schedule of Hybrid, not for {type(self.process).__name__}",
            where="UniformDiffusion.weighting",
            fix="Use Elbo() or LogSnr(), or process = @process.Hybrid().",
        )
        if self.steps is None:
            return
        check_count(self.steps, "UniformDiffusion.steps", "Use 1000 for D3PM, None for continuous time.")
        require(
            isinstance(self.weighting, Elbo),
            f"{type(self.weighting).__name__}() with steps={self.steps}: these weights belong to continuous time",
            where="UniformDiffusion.weighting",
            fix="Use Elbo(), or steps = None.",
        )
        # `bound` builds a copy of the objective while it is traced.
        with jax.ensure_compile_time_eval():
            left = float(self.process.marginal(jnp.ones(())).signal)
        require(
            left < 1e-5,
            f"the last of {self.steps} steps leaves {left:.2g} of the tokens intact, which the bound does not contain",
            where="UniformDiffusion.process",
            fix="Use a schedule that ends without signal, such as Linear() or Cosine().",
        )

    @property
    def bound_kind(self) -> BoundKind:
        """A negative ELBO, whatever the training weights are."""
        return "nelbo"

    def needs(self) -> Needs:
        """One pass; a MASK token if the noise has one."""
        contract = Contract(self.process.kind, self.visibility, self.alignment)
        return Needs(visibility=self.visibility, mask_token=self.process.has_mask, contracts=(contract,))

    def loss(self, model: BoundModel, batch: Batch, keys: StreamKeys, *, train: bool = True) -> LossTerms:
        """Returns the summed loss; `weight` counts each scored token once.

        Metrics: `nll_per_real_token`, the same loss per real token: the bound's estimate where the bound is trained.
        """
        t_BT = self.time.draw(keys, batch.example_ids, strata=batch.strata)
        return self._at(t_BT, model, batch, keys, train=train)

    def bound(self, model: BoundModel, batch: Batch, keys: StreamKeys) -> LossTerms:
        """Returns an unbiased estimate of the negative ELBO, with fixed noise and without dropout.

        In continuous time it covers the whole range of noise, whatever the schedule of the training, so no terms for
        the ends are missing. In discrete time the schedule is part of the bound and stays.
        """
        keys = evaluation_keys(keys)
        process = self.process.whole_range() if self.steps is None else self.process
        evaluated = dataclasses.replace(self, process=process, weighting=Elbo(), auxiliary=0.0)
        uniform = keys.example_uniform(TIME_STREAM, batch.example_ids)

        def one(offset: jax.Array, draw_keys: StreamKeys) -> LossTerms:
            t_BT, factor = bound_times(uniform, offset)
            if self.steps is not None:
                t_BT = 1.0 - shifted(uniform, offset)
                factor = jnp.ones_like(t_BT)
            return evaluated._at(t_BT, model, batch, draw_keys, train=False, factor=factor)

        return mean_over_draws(keys, self.evaluation_draws, one)

    def token_losses(
        self, t_BT: jax.Array, noisy_BT: jax.Array, model: BoundModel, batch: Batch, forward: ForwardPasses
    ) -> jax.Array:
        """Returns f32[B,T]: the weighted integrand at given times, or T times a step's divergence in discrete time."""
        mask_id = mask_id_of(self.process, batch.special)

        def fn(logits: jax.Array, tokens: jax.Array, noisy: jax.Array, t: jax.Array) -> jax.Array:
            # Inside the chunk: no array [B,T,V] of probabilities exists.
            log_p = jax.nn.log_softmax(logits, axis=-1)
            second: jax.Array | float = 0.0
            if self.auxiliary:
                second = -self.auxiliary * jnp.take_along_axis(log_p, tokens[..., None], axis=-1)[..., 0]
            if self.steps is not None:
                return second + self.steps * self._step_divergence(log_p, tokens, noisy, t, mask_id)
            apart = divergence(log_p, tokens, noisy, self.process.marginal(t), mask_id)
            weight = self.weighting.weigh(tokens, noisy, t, self.process, mask_id, logits.shape[-1])
            # e^x - 1 - x is at least 0 and exact near 0, where the difference of large terms would not be.
            return second + weight * (apart.kl + jnp.expm1(apart.log_ratio) - apart.log_ratio)

        hidden = forward(noisy_BT, rate=1.0 - self.process.marginal(t_BT).signal)
        forbidden = forbidden_ids(self.process, batch.special)
        return mapped_losses(
            model, hidden, self.alignment, batch, fn, batch.tokens, noisy_BT, t_BT, forbidden=forbidden
        )

    def _at(
        self,
        t_BT: jax.Array,
        model: BoundModel,
        batch: Batch,
        keys: StreamKeys,
        *,
        train: bool,
        factor: jax.Array | float = 1.0,
    ) -> LossTerms:
        """Returns the terms at times f32[B,T]; `factor` is one over the density of the times."""
        if self.steps is not None:
            # Times of the grid 1/T .. 1, each equally likely.
            t_BT = jnp.clip(jnp.ceil(t_BT * self.steps), 1, self.steps) / self.steps
        noisy_BT = self.process.corrupt(keys, batch, t_BT, vocab_size=model.spec.vocab_size).tokens
        forward = ForwardPasses(model, batch, keys, visibility=self.visibility, train=train)
        return per_token_terms(factor * self.token_losses(t_BT, noisy_BT, model, batch, forward), batch)

    def _step_divergence(
        self, log_p: jax.Array, tokens: jax.Array, noisy: jax.Array, t: jax.Array, mask_id: int | None
    ) -> jax.Array:
        """Returns KL(q(z_s | z_t, x) || q(z_s | z_t, p_theta)) of the step from t to s = t - 1/T.

        q(z_s = j | z_t = z, x) = [ alpha_t/alpha_s 1(j = z) + n(z) ] q_s(j | x) / q_t(z | x), where n(z) is the noise
        that the step adds at z. So the divergence follows from those of the two marginals.
        """
        assert self.steps is not None
        vocab_size = log_p.shape[-1]
        # The first step of the grid ends at exactly 0, which t - 1/T misses by rounding.
        s = jnp.where(t * self.steps > 1.5, t - 1.0 / self.steps, 0.0)
        now, before = self.process.marginal(t), self.process.marginal(s)
        apart_now = divergence(log_p, tokens, noisy, now, mask_id)
        apart_before = divergence(log_p, tokens, noisy, before, mask_id)
        ratio = now.signal / before.signal
        added = noise_at(
            noisy, mask_id, now.mask - ratio * before.mask, now.uniform - ratio * before.uniform, vocab_size
        )
        q_now = jnp.maximum(marginal_at(tokens, noisy, now, mask_id, vocab_size), 1e-30)
        q_before = marginal_at(tokens, noisy, before, mask_id, vocab_size)
        # 0 log 0 = 0: where the token cannot have been z before, it did not stay.
        stayed = jnp.where(q_before > 0, ratio * q_before * apart_before.log_ratio, 0.0)
        return (stayed + added * apart_before.kl) / q_now - apart_now.log_ratio
