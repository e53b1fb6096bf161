"""Likelihood bounds of denoisers under uniform and mixed noise: UDLM, D3PM in discrete time, GIDD.

Masked noise alone has a bound of cross-entropies (`denoising.py`). Where noise looks like data, intact tokens carry
loss too, since the model must say that they are intact (trap T17), and the bound needs the whole predicted
distribution of every token; it is made chunk by chunk and [B,T,V] is never held.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffusion_lm.core.alignment import SamePosition
from diffusion_lm.core.errors import require
from diffusion_lm.core.rng import StreamKeys
from diffusion_lm.core.types import Batch, LossTerms
from diffusion_lm.noise.interpolation import SMALLEST, HybridNoise, Level, UniformNoise, corrupt, noise_at, process_of
from diffusion_lm.noise.time_sampling import TIME_STREAM, UniformTime
from diffusion_lm.noise.weighting import BoundKind
from diffusion_lm.objectives.base import (
    Forward,
    Model,
    Needs,
    check_auxiliary,
    check_visibility,
    frozen,
    mapped_losses,
    per_token_terms,
)
from diffusion_lm.objectives.draws import bound_times, check_draws, mean_over_draws, shifted

WEIGHTINGS = ("nelbo", "dynamic", "log_snr")


class Divergence(NamedTuple):
    """How far the predicted marginal at a noise level, alpha p_theta + noise, is from the true one; f32[b,t].

    Attributes:
      kl: KL(q_t(. | x) || q_t(. | p_theta)).
      log_ratio: log q_t(z | x) / q_t(z | p_theta) at the noisy token z.
    """

    kl: jax.Array
    log_ratio: jax.Array


def divergence(log_p_btV, tokens, noisy, level: Level, mask_id: int | None) -> Divergence:
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
        positive = jnp.maximum(q, jnp.finfo(jnp.float32).tiny)
        u = alpha * (jnp.exp(log_p) - (token == tokens)) / positive
        # Near -1, 1 + u has lost its digits: the logarithm of the predicted share itself has them.
        tiny = jnp.finfo(jnp.float32).tiny
        log_share = jnp.logaddexp(jnp.log(jnp.maximum(alpha, tiny)) + log_p, jnp.log(jnp.maximum(noise, tiny)))
        return q, u, jnp.where(u > -0.5, -jnp.log1p(jnp.maximum(u, -0.5)), jnp.log(positive) - log_share)

    q_x, u_x, log_ratio_x = excess(tokens)
    _, _, log_ratio_z = excess(noisy)
    noise_btV = noise_at(ids, mask_id, level.mask[..., None], level.uniform[..., None], vocab_size)
    share_btV = alpha[..., None] * jnp.exp(log_p_btV)
    ratio_btV = share_btV / jnp.maximum(noise_btV, 1e-30)
    elsewhere = share_btV - jnp.where(
        noise_btV > 0, noise_btV * jnp.log1p(jnp.where(noise_btV > 0, ratio_btV, 0.0)), 0.0
    )
    kl = jnp.sum(jnp.where(ids == tokens[..., None], 0.0, elsewhere), axis=-1) + q_x * (u_x + log_ratio_x)
    return Divergence(kl, log_ratio_z)


def marginal(tokens, noisy, level: Level, mask_id: int | None, vocab_size: int) -> jax.Array:
    """Returns q_t(z | x)."""
    noise = noise_at(noisy, mask_id, level.mask, level.uniform, vocab_size)
    return jnp.where(noisy == tokens, level.signal + noise, noise)


def bound_weight(tokens, noisy, level: Level, mask_id: int | None, vocab_size: int) -> jax.Array:
    """Returns r_t(z) / q_t(z | x), by which the negative ELBO in continuous time weighs its integrand."""
    rate = noise_at(noisy, mask_id, level.mask_rate, level.uniform_rate, vocab_size)
    return rate / jnp.maximum(marginal(tokens, noisy, level, mask_id, vocab_size), 1e-30)


def log_snr_weight(tokens, noisy, level: Level, mask_id: int | None, vocab_size: int) -> jax.Array:
    """Returns `bound_weight` x |dt / d log(alpha/(1 - alpha))|: the negative ELBO per unit of log-SNR, not of time.

    For MASK alone it is 1. This is the training weight of the code of arXiv 2512.10858 (there: the ELBO's weight times
    the density of the log-SNR at uniform times).
    """
    # d log(alpha/(1 - alpha))/dt = alpha'/alpha / (1 - alpha), and all rates together are -alpha'/alpha.
    slope = (level.mask_rate + level.uniform_rate) / jnp.maximum(1.0 - level.signal, SMALLEST)
    return bound_weight(tokens, noisy, level, mask_id, vocab_size) / slope


def dynamic_weight(tokens, noisy, t, noise: HybridNoise, vocab_size: int) -> jax.Array:
    """Returns GIDD's weights: 2 on MASK, 1 on other noise, B/V SNR^(-gamma/2) on intact tokens, SNR = (1 - t)/t.

    They keep the ratios of the ELBO's weights r_t(z)/q_t(z | x) and drop their common size, which grows without bound
    at both ends (arXiv 2503.04482, section 4). Intact over other noise is c_t/V / (1 - t + c_t/V) in the ELBO, and
    c_t/(1 - t) = B SNR^(-1/2) for gamma = 1: intact tokens count least where little is noise.
    """
    t = jnp.clip(t, 1e-6, 1.0 - 1e-6)
    intact = noise.scale / vocab_size * (t / (1.0 - t)) ** (0.5 * noise.gamma)
    return jnp.where(noisy == noise.mask_id, 2.0, jnp.where(noisy == tokens, intact, 1.0))


@dataclasses.dataclass(frozen=True)
class UniformNelbo:
    """The negative ELBO of interpolating noise, over all target positions, intact ones included.

    In continuous time, with q = q_t(. | x) and q_theta = q_t(. | p_theta) its value at the predicted distribution,

        integrand = r_t(z)/q(z) [ KL(q || q_theta) + q(z)/q_theta(z) - log q(z)/q_theta(z) - 1 ]

    (GIDD, arXiv 2503.04482), which for uniform noise is the bound of UDLM (arXiv 2412.10193) and for MASK alone the
    weighted cross-entropy of MDLM. In discrete time it is D3PM's sum of T divergences of the reverse steps
    (arXiv 2107.03006), their first one being the reconstruction.

    Attributes:
      noise: `noise.interpolation.UniformNoise`, `HybridNoise` or `AbsorbingNoise`.
      steps: T of discrete time, with a schedule that ends without signal; or None for continuous time.
      weighting: "nelbo" trains the bound. "dynamic" replaces r/q by the weights of GIDD's paper (`dynamic_weight`),
        "log_snr" by those of its authors' later code (`log_snr_weight`). `bound` is the bound whatever it is.
      max_weight: upper limit of "dynamic" and "log_snr" weights (the releases use 2 and 1000).
      auxiliary: weight of D3PM's second loss, the plain cross-entropy of all scored tokens (L_lambda). 0 is off;
        `bound` has none.
      time: at which t an example is trained.
      alignment: which hidden state predicts which token.
      visibility: "full", or another name of `nn.named_masks.named_visibility`.
      evaluation_draws: times of `bound` per example, spread evenly from a random start.
      pad_id: filler inside the scored window; left out of the loss per real token.
      eos_id: ends a target; further ones behind the first are filler too.
    """

    noise: Any = UniformNoise()
    steps: int | None = None
    weighting: str = "nelbo"
    max_weight: float = 2.0
    auxiliary: float = 0.0
    time: Any = UniformTime()
    alignment: Any = SamePosition()
    visibility: str = "full"
    evaluation_draws: int = 4
    pad_id: int = 0
    eos_id: int = 1

    def __post_init__(self):
        check_visibility(self.visibility, "UniformNelbo.visibility")
        check_draws(self.evaluation_draws, "UniformNelbo.evaluation_draws")
        check_auxiliary(self.auxiliary, "UniformNelbo.auxiliary")
        require(
            self.weighting in WEIGHTINGS,
            f"weighting = {self.weighting!r} is unknown",
            where="UniformNelbo.weighting",
            fix=f"Choose one of {', '.join(WEIGHTINGS)}.",
        )
        require(
            self.weighting != "dynamic" or hasattr(self.noise, "gamma"),
            "dynamic weights are defined by the schedule of HybridNoise",
            where="UniformNelbo.weighting",
            fix="Use weighting = 'nelbo' or 'log_snr', or noise = @interpolation.HybridNoise().",
        )
        require(
            self.steps is None or (isinstance(self.steps, int) and self.steps > 0 and self.weighting == "nelbo"),
            f"steps = {self.steps} is no number of steps of the bound",
            where="UniformNelbo.steps",
            fix="None is continuous time; D3PM uses 1000, with weighting = 'nelbo'.",
        )
        if self.steps is not None:
            left = float(self.noise.level(jnp.ones(())).signal)
            require(
                left < 1e-5,
                f"the last of {self.steps} steps leaves a share {left:.2g} of the tokens intact, outside of the bound",
                where="UniformNelbo.noise",
                fix="Use a schedule that ends without signal, such as Linear() or Cosine().",
            )

    @property
    def bound_kind(self) -> BoundKind:
        """`bound` is a negative ELBO whatever the training weights are."""
        return "nelbo"

    def needs(self) -> Needs:
        """One pass; a MASK token where the noise has one."""
        contract = process_of(self.noise, self.visibility, self.alignment)
        return Needs(visibility=self.visibility, mask_token=self.noise.mask_id is not None, contracts=(contract,))

    def loss(self, model: Model, batch: Batch, keys: StreamKeys, *, train: bool = True) -> LossTerms:
        """Returns the summed loss; `weight` counts each scored token once.

        Metrics: `nll_per_real_token`, the same loss per real token (the bound's estimate where that alone is trained).
        """
        t = self.time.draw(keys, batch.example_ids, strata=batch.strata)
        extra = self.auxiliary
        return self._at(t, self.noise, model, batch, keys, train=train, weighting=self.weighting, auxiliary=extra)

    def bound(self, model: Model, batch: Batch, keys: StreamKeys) -> LossTerms:
        """Returns an unbiased estimate of the negative ELBO, with frozen noise and without dropout.

        In continuous time it is taken over the whole range of noise, whatever the schedule of training, so that no
        terms for its ends are missing. In discrete time the schedule belongs to the bound and stays.
        """
        keys = frozen(keys)
        noise = self.noise.complete() if self.steps is None else self.noise
        uniform = keys.example_uniform(TIME_STREAM, batch.example_ids)

        def one(offset, draw_keys):
            t, factor = bound_times(uniform, offset)
            if self.steps is not None:
                t = 1.0 - shifted(uniform, offset)
                factor = jnp.ones_like(t)
            return self._at(t, noise, model, batch, draw_keys, train=False, weighting="nelbo", factor=factor)

        return mean_over_draws(keys, self.evaluation_draws, one)

    def token_losses(
        self,
        t_BT,
        noisy_BT,
        noise,
        model: Model,
        batch: Batch,
        forward: Forward,
        weighting: str = "nelbo",
        auxiliary: float = 0.0,
    ) -> jax.Array:
        """Returns f32[B,T]: the integrand at given times (T times a step's divergence in discrete time)."""
        mask_id = noise.mask_id

        def fn(logits, tokens, noisy, t):
            log_p = jax.nn.log_softmax(logits, axis=-1)
            level = noise.level(t)
            second = -auxiliary * jnp.take_along_axis(log_p, tokens[..., None], axis=-1)[..., 0] if auxiliary else 0.0
            if self.steps is not None:
                return second + self.steps * self._step_divergence(log_p, tokens, noisy, t, noise)
            apart = divergence(log_p, tokens, noisy, level, mask_id)
            if weighting == "dynamic":
                weight = jnp.minimum(dynamic_weight(tokens, noisy, t, noise, logits.shape[-1]), self.max_weight)
            elif weighting == "log_snr":
                weight = log_snr_weight(tokens, noisy, level, mask_id, logits.shape[-1])
                weight = jnp.minimum(weight, self.max_weight)
            else:
                weight = bound_weight(tokens, noisy, level, mask_id, logits.shape[-1])
            return second + weight * (apart.kl + jnp.expm1(apart.log_ratio) - apart.log_ratio)

        hidden = forward(noisy_BT, rate=1.0 - noise.level(t_BT).signal)
        return mapped_losses(model, hidden, self.alignment, batch, fn, batch.tokens, noisy_BT, t_BT, mask_id=mask_id)

    def _at(
        self,
        t_BT,
        noise,
        model: Model,
        batch: Batch,
        keys: StreamKeys,
        *,
        train: bool,
        weighting: str,
        factor: Any = 1.0,
        auxiliary: float = 0.0,
    ) -> LossTerms:
        if self.steps is not None:
            t_BT = jnp.clip(jnp.ceil(t_BT * self.steps), 1, self.steps) / self.steps
        noisy = corrupt(noise, keys, batch, t_BT, model.spec.vocab_size)
        forward = Forward(model, batch, keys, visibility=self.visibility, train=train)
        losses = factor * self.token_losses(t_BT, noisy, noise, model, batch, forward, weighting, auxiliary)
        return per_token_terms(losses, batch, self.pad_id, self.eos_id)

    def _step_divergence(self, log_p, tokens, noisy, t, noise) -> jax.Array:
        """Returns KL(q(z_s | z_t, x) || q(z_s | z_t, p_theta)) of the step from t to s = t - 1/T.

        q(z_s = j | z_t = z, x) = [ alpha_t/alpha_s 1(j = z) + n(z) ] q_s(j | x) / q_t(z | x), where n(z) is the noise
        that the step adds at z; so the divergence is made of those of the two marginals.
        """
        assert self.steps is not None
        vocab_size, mask_id = log_p.shape[-1], noise.mask_id
        s = jnp.where(t * self.steps > 1.5, t - 1.0 / self.steps, 0.0)
        now, before = noise.level(t), noise.level(s)
        apart_now = divergence(log_p, tokens, noisy, now, mask_id)
        apart_before = divergence(log_p, tokens, noisy, before, mask_id)
        kept = now.signal / before.signal
        added = noise_at(noisy, mask_id, now.mask - kept * before.mask, now.uniform - kept * before.uniform, vocab_size)
        q_now = jnp.maximum(marginal(tokens, noisy, now, mask_id, vocab_size), 1e-30)
        q_before = marginal(tokens, noisy, before, mask_id, vocab_size)
        stayed = jnp.where(q_before > 0, kept * q_before * apart_before.log_ratio, 0.0)
        return (stayed + added * apart_before.kl) / q_now - apart_now.log_ratio
