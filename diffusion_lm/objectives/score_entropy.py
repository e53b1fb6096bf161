"""Score entropy: learning ratios of probabilities instead of a denoiser (SEDD, arXiv 2310.16834)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from diffusion_lm.core.alignment import SamePosition
from diffusion_lm.core.errors import require
from diffusion_lm.core.rng import StreamKeys
from diffusion_lm.core.types import Batch, LossTerms
from diffusion_lm.noise.contract import RATIOS, SCALED_RATIOS
from diffusion_lm.noise.interpolation import Level, PowerTotal, UniformNoise, corrupt, kinds, noise_at, process_of
from diffusion_lm.noise.time_sampling import TIME_STREAM, UniformTime
from diffusion_lm.noise.weighting import BoundKind
from diffusion_lm.objectives.base import (
    Forward,
    Model,
    Needs,
    check_visibility,
    frozen,
    mapped_losses,
    per_token_terms,
)
from diffusion_lm.objectives.draws import bound_times, check_draws, mean_over_draws
from diffusion_lm.objectives.uniform_bound import marginal


def score_entropy(log_scores_btV, tokens, noisy, level: Level, mask_id: int | None) -> jax.Array:
    """Returns f32[b,t], the rate-weighted score entropy of each token: 0 at the true ratios, positive elsewhere.

        r(z) sum_{j != z} [ exp(s_j) - a_j s_j + a_j (log a_j - 1) ],   a_j = q_t(j | x) / q_t(z | x)

    Its expectation over times and noise, with any scores, is a negative ELBO.

    Args:
      log_scores_btV: f32[b,t,V], s_j, the predicted log p_t(j)/p_t(z).
      tokens: i32[b,t], x.
      noisy: i32[b,t], z.
      level: the noise level of each token.
      mask_id: the id of MASK, or None for uniform noise.
    """
    vocab_size = log_scores_btV.shape[-1]
    ids = jnp.arange(vocab_size)
    elsewhere = ids != noisy[..., None]
    q_z = jnp.maximum(marginal(tokens, noisy, level, mask_id, vocab_size), 1e-30)
    noise_btV = noise_at(ids, mask_id, level.mask[..., None], level.uniform[..., None], vocab_size)
    a_btV = (jnp.where(ids == tokens[..., None], level.signal[..., None], 0.0) + noise_btV) / q_z[..., None]
    constant_btV = jnp.where(a_btV > 0, a_btV * (jnp.log(jnp.maximum(a_btV, 1e-30)) - 1.0), 0.0)
    # Tokens that are not noise have a rate of 0 under MASK noise: their scores must not overflow into 0 x infinity.
    rate = noise_at(noisy, mask_id, level.mask_rate, level.uniform_rate, vocab_size)
    scores = jnp.where(elsewhere & (rate > 0)[..., None], log_scores_btV, 0.0)
    entropy = jnp.where(elsewhere, jnp.exp(scores) - a_btV * scores + constant_btV, 0.0)
    return jnp.where(rate > 0, rate * jnp.sum(entropy, axis=-1), 0.0)


def prior_divergence(level: Level, vocab_size: int) -> jax.Array:
    """Returns KL(q_1(. | x) || uniform), the part of the bound that belongs to the signal left at the end."""
    alpha = level.signal
    at_x, elsewhere = alpha * (vocab_size - 1.0), -alpha
    total = (1.0 + at_x) * jnp.log1p(at_x) + (vocab_size - 1.0) * (1.0 + elsewhere) * jnp.log1p(elsewhere)
    return total / vocab_size


@dataclasses.dataclass(frozen=True)
class ScoreEntropy:
    """Denoising score entropy (SEDD): the network's output at a slot is s, the logarithm of ratios to its noisy token.

    Attributes:
      noise: `noise.interpolation.AbsorbingNoise` or `UniformNoise` with the schedule of training.
      scale_by_sigma: adds log(alpha / (1 - alpha)) - log(V - 1) to the output. Under MASK noise the true ratios are the
        clean conditionals times alpha / (1 - alpha), so that a network without a time input can be exact; the paper
        turns it off for uniform noise.
      sigma_max: total noise up to which `bound` goes under uniform noise, where scores without a time input have no
        finite limit. MASK noise is taken to its end.
      time: at which t an example is trained.
      alignment: which hidden state predicts which token's ratios.
      visibility: "full", or another name of `nn.named_masks.named_visibility`.
      evaluation_draws: times of `bound` per example, spread evenly from a random start.
      pad_id: filler inside the scored window; left out of the loss per real token.
      eos_id: ends a target; further ones behind the first are filler too.
    """

    noise: Any = UniformNoise()
    scale_by_sigma: bool = False
    sigma_max: float = 20.0
    time: Any = UniformTime()
    alignment: Any = SamePosition()
    visibility: str = "full"
    evaluation_draws: int = 4
    pad_id: int = 0
    eos_id: int = 1

    def __post_init__(self):
        check_visibility(self.visibility, "ScoreEntropy.visibility")
        check_draws(self.evaluation_draws, "ScoreEntropy.evaluation_draws")
        require(
            hasattr(self.noise, "schedule"),
            f"{type(self.noise).__name__} mixes MASK and ordinary noise, which score entropy is not defined for here",
            where="ScoreEntropy.noise",
            fix="Use AbsorbingNoise or UniformNoise, or the objective UniformNelbo.",
        )
        require(
            self.noise.mask_id is None or self.scale_by_sigma,
            "without a time input, unscaled ratios under MASK noise have no finite bound",
            where="ScoreEntropy.scale_by_sigma",
            fix="Set it to True.",
        )
        require(
            self.sigma_max > 0,
            f"sigma_max = {self.sigma_max} is not positive",
            where="ScoreEntropy.sigma_max",
            fix="The paper's schedule ends at 20.",
        )

    @property
    def bound_kind(self) -> BoundKind:
        """The score entropy is a negative ELBO for any scores."""
        return "nelbo"

    def needs(self) -> Needs:
        """One pass; a MASK token where the noise has one."""
        output = SCALED_RATIOS if self.scale_by_sigma else RATIOS
        contract = process_of(self.noise, self.visibility, self.alignment, output)
        return Needs(visibility=self.visibility, mask_token=self.noise.mask_id is not None, contracts=(contract,))

    def loss(self, model: Model, batch: Batch, keys: StreamKeys, *, train: bool = True) -> LossTerms:
        """Returns the summed loss; `weight` counts each scored token once.

        Metrics: `nll_per_real_token`, the same loss per real token.
        """
        t = self.time.draw(keys, batch.example_ids, strata=batch.strata)
        return self._at(t, self.noise, model, batch, keys, train=train)

    def bound(self, model: Model, batch: Batch, keys: StreamKeys) -> LossTerms:
        """Returns an unbiased estimate of the negative ELBO, with frozen noise and without dropout.

        It begins at no noise at all, whatever the schedule of training, so that no term for the beginning is missing.
        """
        keys = frozen(keys)
        absorbs = self.noise.mask_id is not None
        noise = self.noise.complete() if absorbs else UniformNoise(PowerTotal(self.sigma_max))
        prior = 0.0 if absorbs else prior_divergence(noise.level(jnp.ones(())), model.spec.vocab_size)
        uniform = keys.example_uniform(TIME_STREAM, batch.example_ids)

        def one(offset, draw_keys):
            t, factor = bound_times(uniform, offset)
            return self._at(t, noise, model, batch, draw_keys, train=False, factor=factor, constant=prior)

        return mean_over_draws(keys, self.evaluation_draws, one)

    def token_losses(self, t_BT, noisy_BT, noise, model: Model, batch: Batch, forward: Forward) -> jax.Array:
        """Returns f32[B,T]: the integrand at given times and noisy tokens."""
        mask_id = noise.mask_id

        def fn(logits, tokens, noisy, t):
            level = noise.level(t)
            scores = logits
            if self.scale_by_sigma:
                rest = level.mask + level.uniform
                scale = jnp.log(level.signal) - jnp.log(jnp.maximum(rest, 1e-30))
                scores = logits + (scale - jnp.log(kinds(mask_id, logits.shape[-1])))[..., None]
            return score_entropy(scores, tokens, noisy, level, mask_id)

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
        factor: Any = 1.0,
        constant: Any = 0.0,
    ) -> LossTerms:
        noisy = corrupt(noise, keys, batch, t_BT, model.spec.vocab_size)
        forward = Forward(model, batch, keys, visibility=self.visibility, train=train)
        losses = factor * self.token_losses(t_BT, noisy, noise, model, batch, forward) + constant
        return per_token_terms(losses, batch, self.pad_id, self.eos_id)
