"""Score entropy: learning ratios of probabilities instead of a denoiser (SEDD, arXiv 2310.16834).

    L = E_t E_{z ~ q_t} [ r_t(z) sum_{j != z} ( exp(s_j) - a_j s_j + a_j (log a_j - 1) ) ]

where a_j = q_t(j | x) / q_t(z | x), and the network's output s_j estimates log p_t(j) / p_t(z).
"""

import dataclasses

import jax
import jax.numpy as jnp

from diffusion_lm.architectures.base import BoundModel
from diffusion_lm.core.alignment import Alignment, SamePosition
from diffusion_lm.core.checks import check_positive
from diffusion_lm.core.errors import require
from diffusion_lm.core.rng import StreamKeys
from diffusion_lm.core.types import Batch, LossTerms
from diffusion_lm.nn.named_masks import check_visibility
from diffusion_lm.noise.contract import RATIOS, SCALED_RATIOS, Contract
from diffusion_lm.noise.process import (
    Absorbing,
    Marginal,
    Uniform,
    forbidden_ids,
    mask_id_of,
    noise_at,
    noise_tokens,
)
from diffusion_lm.noise.schedules import PowerTotal
from diffusion_lm.noise.time_sampling import TIME_STREAM, TimeSampler, UniformTime
from diffusion_lm.noise.weighting import BoundKind
from diffusion_lm.objectives.draws import bound_times, check_draws, mean_over_draws
from diffusion_lm.objectives.forward_pass import ForwardPasses
from diffusion_lm.objectives.objective import Needs, evaluation_keys
from diffusion_lm.objectives.token_losses import mapped_losses, per_token_terms
from diffusion_lm.objectives.uniform_diffusion import marginal_at


def score_entropy(log_scores_btV, tokens, noisy, level: Marginal, mask_id: int | None) -> jax.Array:
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
    # z was drawn from q_t, so q_t(z | x) > 0 up to rounding.
    q_z = jnp.maximum(marginal_at(tokens, noisy, level, mask_id, vocab_size), 1e-30)
    noise_btV = noise_at(ids, mask_id, level.mask[..., None], level.uniform[..., None], vocab_size)
    a_btV = (jnp.where(ids == tokens[..., None], level.signal[..., None], 0.0) + noise_btV) / q_z[..., None]
    constant_btV = jnp.where(a_btV > 0, a_btV * (jnp.log(jnp.maximum(a_btV, 1e-30)) - 1.0), 0.0)
    # Tokens that are not noise have a rate of 0 under MASK noise: their scores must not overflow into 0 x infinity.
    rate = noise_at(noisy, mask_id, level.mask_rate, level.uniform_rate, vocab_size)
    scores = jnp.where(elsewhere & (rate > 0)[..., None], log_scores_btV, 0.0)
    # The slot's own token has the ratio 1 by definition and no term.
    entropy = jnp.where(elsewhere, jnp.exp(scores) - a_btV * scores + constant_btV, 0.0)
    return jnp.where(rate > 0, rate * jnp.sum(entropy, axis=-1), 0.0)


def prior_divergence(level: Marginal, vocab_size: int) -> jax.Array:
    """Returns KL(q_1(. | x) || uniform), the part of the bound that belongs to the signal left at the end."""
    alpha = level.signal
    # V q_1 - 1 at x and at all other tokens; log1p keeps the digits of a small alpha.
    at_x, elsewhere = alpha * (vocab_size - 1.0), -alpha
    total = (1.0 + at_x) * jnp.log1p(at_x) + (vocab_size - 1.0) * (1.0 + elsewhere) * jnp.log1p(elsewhere)
    return total / vocab_size


@dataclasses.dataclass(frozen=True)
class ScoreEntropy:
    """Denoising score entropy (SEDD): the output at a slot is s, the logarithm of ratios to the slot's noisy token.

    Attributes:
      process: `process.Absorbing` or `process.Uniform`, with the schedule of the training.
      scale_by_sigma: adds log(alpha / (1 - alpha)) - log(V - 1) to the output. Under MASK noise the true ratios are the
        clean conditionals times alpha / (1 - alpha), so a network without a time input can be exact. It must be True
        under MASK noise; the paper turns it off for uniform noise.
      sigma_max: total noise at which `bound` ends under uniform noise, where scores without a time input have no finite
        limit. Under MASK noise the bound covers the whole range.
      time: at which t an example is trained.
      alignment: which hidden state predicts which token's ratios.
      visibility: "full", or another name of `nn.named_masks.named_visibility`.
      evaluation_draws: times of `bound` per example, spread evenly from a random start.
    """

    process: Absorbing | Uniform = Uniform()
    scale_by_sigma: bool = False
    sigma_max: float = 20.0
    time: TimeSampler = UniformTime()
    alignment: Alignment = SamePosition()
    visibility: str = "full"
    evaluation_draws: int = 4

    def __post_init__(self):
        check_visibility(self.visibility, "ScoreEntropy.visibility")
        check_draws(self.evaluation_draws, "ScoreEntropy.evaluation_draws")
        check_positive(self.sigma_max, "ScoreEntropy.sigma_max", "The paper's schedule ends at 20.")
        require(
            isinstance(self.process, Absorbing | Uniform),
            f"{type(self.process).__name__}: score entropy is defined for MASK noise or uniform noise",
            where="ScoreEntropy.process",
            fix="Use Absorbing or Uniform, or the objective UniformDiffusion.",
        )
        require(
            not self.process.has_mask or self.scale_by_sigma,
            "scale_by_sigma=False under MASK noise: without a time input, unscaled ratios have no finite bound",
            where="ScoreEntropy.scale_by_sigma",
            fix="Set it to True.",
        )

    @property
    def bound_kind(self) -> BoundKind:
        """The score entropy is a negative ELBO for any scores."""
        return "nelbo"

    def needs(self) -> Needs:
        """One pass; a MASK token if the noise has one."""
        output = SCALED_RATIOS if self.scale_by_sigma else RATIOS
        contract = Contract(self.process.kind, self.visibility, self.alignment, output)
        return Needs(visibility=self.visibility, mask_token=self.process.has_mask, contracts=(contract,))

    def loss(self, model: BoundModel, batch: Batch, keys: StreamKeys, *, train: bool = True) -> LossTerms:
        """Returns the summed loss; `weight` counts each scored token once.

        Metrics: `nll_per_real_token`, the same loss per real token.
        """
        t_BT = self.time.draw(keys, batch.example_ids, strata=batch.strata)
        return self._at(t_BT, model, batch, keys, train=train)

    def bound(self, model: BoundModel, batch: Batch, keys: StreamKeys) -> LossTerms:
        """Returns an unbiased estimate of the negative ELBO, with fixed noise and without dropout.

        It starts at no noise at all, whatever the schedule of the training, so no term for the start is missing.
        """
        keys = evaluation_keys(keys)
        whole = isinstance(self.process, Absorbing)
        process = self.process.whole_range() if whole else Uniform(PowerTotal(self.sigma_max))
        prior = 0.0 if whole else prior_divergence(process.marginal(jnp.ones(())), model.spec.vocab_size)
        evaluated = dataclasses.replace(self, process=process)
        uniform = keys.example_uniform(TIME_STREAM, batch.example_ids)

        def one(offset: jax.Array, draw_keys: StreamKeys) -> LossTerms:
            # More times at small t, where rare noise has large weights; `factor` is one over their density.
            t_BT, factor = bound_times(uniform, offset)
            return evaluated._at(t_BT, model, batch, draw_keys, train=False, factor=factor, constant=prior)

        return mean_over_draws(keys, self.evaluation_draws, one)

    def token_losses(
        self, t_BT: jax.Array, noisy_BT: jax.Array, model: BoundModel, batch: Batch, forward: ForwardPasses
    ) -> jax.Array:
        """Returns f32[B,T]: the integrand at given times and noisy tokens."""
        mask_id = mask_id_of(self.process, batch.special)

        def fn(logits: jax.Array, tokens: jax.Array, noisy: jax.Array, t: jax.Array) -> jax.Array:
            level = self.process.marginal(t)
            scores = logits
            if self.scale_by_sigma:
                # The scale is known from the noise level, so the network need not learn it.
                rest = level.mask + level.uniform
                scale = jnp.log(level.signal) - jnp.log(jnp.maximum(rest, 1e-30))
                scores = logits + (scale - jnp.log(noise_tokens(mask_id, logits.shape[-1])))[..., None]
            return score_entropy(scores, tokens, noisy, level, mask_id)

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
        constant: jax.Array | float = 0.0,
    ) -> LossTerms:
        """Returns the terms at times f32[B,T]; `factor` is one over the density of the times."""
        noisy_BT = self.process.corrupt(keys, batch, t_BT, vocab_size=model.spec.vocab_size).tokens
        forward = ForwardPasses(model, batch, keys, visibility=self.visibility, train=train)
        losses = factor * self.token_losses(t_BT, noisy_BT, model, batch, forward) + constant
        return per_token_terms(losses, batch)
