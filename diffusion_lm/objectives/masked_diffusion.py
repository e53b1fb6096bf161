"""Masked diffusion: predict masked tokens from the visible ones (MDLM, MD4, LLaDA, DiffuLLaMA, Dream, D3PM-absorbing).

    L = E_t E_{z_t ~ q(. | x)} [ sum over replaced i of w(t) x -log p(x_i | z_t) ]

The weighting w decides what the loss is: w(t) = -alpha'(t) / (1 - alpha(t)) makes it the negative ELBO (MDLM, arXiv
2406.07524; MD4, 2406.04329). MASK has no probability, and a token that is not MASK is known, so it has no loss (SUBS of
MDLM; trap T16).

Noise that is not MASK alone (`process.MaskAndReplace`: BERT, LLaDA2.1) is trained in the same way, without a bound.
"""

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp

from diffusion_lm.architectures.base import BoundModel, Hidden
from diffusion_lm.core.alignment import Alignment, SamePosition
from diffusion_lm.core.checks import check_choice, check_non_negative, check_probability
from diffusion_lm.core.errors import require
from diffusion_lm.core.real_tokens import is_real
from diffusion_lm.core.rng import StreamKeys
from diffusion_lm.core.segments import segment_sum
from diffusion_lm.core.types import Batch, LossTerms, WeightedMean
from diffusion_lm.nn.named_masks import check_visibility
from diffusion_lm.noise.choice import Bernoulli, Choice, ExactCount
from diffusion_lm.noise.contract import Contract
from diffusion_lm.noise.process import Absorbing, Corrupted, NoiseProcess, forbidden_ids, is_noise
from diffusion_lm.noise.schedules import Schedule
from diffusion_lm.noise.time_sampling import TIME_STREAM, TimeSampler, UniformTime
from diffusion_lm.noise.weighting import BoundKind, InverseShare, Nelbo, Weighting
from diffusion_lm.objectives.annealing import Annealing, annealed_visibility
from diffusion_lm.objectives.draws import check_draws, mean_over_draws, shifted
from diffusion_lm.objectives.forward_pass import ForwardPasses
from diffusion_lm.objectives.normalisers import NORMALISERS, Normaliser, normalised
from diffusion_lm.objectives.objective import Needs, evaluation_keys
from diffusion_lm.objectives.self_conditioning import predicted_embedding
from diffusion_lm.objectives.token_losses import cross_entropy, weighted_mean, weighted_sum


class MaskingProcess(NoiseProcess, Protocol):
    """A process that replaces chosen tokens, mostly by MASK: `process.Absorbing` or `process.MaskAndReplace`."""

    @property
    def schedule(self) -> Schedule:
        """alpha."""
        ...

    @property
    def choice(self) -> Choice:
        """Which tokens are replaced."""
        ...


@dataclasses.dataclass(frozen=True)
class MaskedDiffusion:
    """Weighted cross-entropy of replaced tokens.

    Attributes:
      process: the noise with its schedule.
      time: at which t an example is trained.
      weighting: weight of a replaced token at its noise level.
      normaliser: what the weighted sum is divided by; see `normalisers.normalised`.
      alignment: which hidden state predicts which token.
      visibility: "full", or another name of `nn.named_masks.named_visibility`.
      annealing: opens a causal mask to `visibility` over the first steps of the training (`annealing.MaskAnnealing`;
        DiffuGPT), or None. `bound` uses `visibility`, as samplers do, at every step.
      self_conditioning: probability with which an example also reads the prediction of a first pass without gradient,
        as the mean embedding at each noisy slot; zeros otherwise. `bound` always reads a prediction.
      auxiliary: weight of D3PM's second loss, the cross-entropy of all scored tokens, intact ones included (arXiv
        2107.03006, L_lambda): a mean over the scored tokens, or over examples with normaliser "example". 0 disables it;
        `bound` does not have it.
      label_smoothing: probability mass that the training target spreads over the vocabulary.
      evaluation_draws: noise levels of `bound` per example, spread evenly from a random start.
    """

    process: MaskingProcess = Absorbing()
    time: TimeSampler = UniformTime()
    weighting: Weighting = Nelbo()
    normaliser: Normaliser = "scored"
    alignment: Alignment = SamePosition()
    visibility: str = "full"
    annealing: Annealing | None = None
    self_conditioning: float = 0.0
    auxiliary: float = 0.0
    label_smoothing: float = 0.0
    evaluation_draws: int = 8

    def __post_init__(self):
        check_visibility(self.visibility, "MaskedDiffusion.visibility")
        check_choice(self.normaliser, NORMALISERS, "MaskedDiffusion.normaliser")
        check_draws(self.evaluation_draws, "MaskedDiffusion.evaluation_draws")
        check_probability(self.self_conditioning, "MaskedDiffusion.self_conditioning")
        check_probability(self.label_smoothing, "MaskedDiffusion.label_smoothing", "0.1 is usual.", below_one=True)
        check_non_negative(self.auxiliary, "MaskedDiffusion.auxiliary", "Use 0.0 to leave the second loss out.")
        check_weighting(self.weighting, self.process, self.time, "MaskedDiffusion.weighting")

    @property
    def bound_kind(self) -> BoundKind:
        """Returns "nelbo" under noise of MASK alone, whatever the training's weights and normaliser are."""
        return "nelbo" if self._has_bound else "pseudo"

    @property
    def _has_bound(self) -> bool:
        return isinstance(self.process, Absorbing)

    def needs(self) -> Needs:
        """One pass, or two under self-conditioning, and MASK."""
        contract = Contract(self.process.kind, self.visibility, self.alignment)
        return Needs(
            visibility=self.visibility,
            passes=1 + (self.self_conditioning > 0),
            frozen_passes=int(self.self_conditioning > 0),
            self_conditioning=self.self_conditioning > 0,
            several_weights=self._auxiliary_has_own_weight,
            mask_token=self.process.has_mask,
            contracts=(contract,),
            tail=self.process.choice.joint_tail if isinstance(self.process.choice, Bernoulli) else None,
        )

    def loss(self, model: BoundModel, batch: Batch, keys: StreamKeys, *, train: bool = True) -> LossTerms:
        """Returns the summed loss; `weight` is what `normaliser` says.

        Metrics: `nll_per_real_token` and `nll_per_token`; under noise of MASK alone these are estimates of the
        likelihood bound, replaced tokens weighted by `Nelbo`, and `nll_per_masked_token` is the plain mean.
        """
        t_BT = self.time.draw(keys, batch.example_ids, strata=batch.strata)
        noisy = self.process.corrupt(keys, batch, t_BT, vocab_size=model.spec.vocab_size)
        return self.terms(noisy, t_BT, self.passes(model, batch, keys, train), model, batch, keys, train=train)

    def bound(self, model: BoundModel, batch: Batch, keys: StreamKeys) -> LossTerms:
        """Returns an unbiased estimate of the NELBO under noise of MASK alone, else of the training loss.

        The NELBO of the network is the mean over generation orders,

            -log p(x)  <=  E_k E_mask [ n/k x sum over masked i of -log p(x_i | z) ],   k uniform in 1..n,

        where exactly k of an example's n target tokens are MASK (arXiv 2110.02037; LLaDA's estimator, 2502.09992). It
        does not depend on the schedule, the weights and the normaliser of the training. Draws spread k evenly over 1..n
        from a random start per example. The noise is the same at every step, and there is no dropout.
        """
        keys, evaluated = evaluation_keys(keys), self._evaluated()
        uniform = keys.example_uniform(TIME_STREAM, batch.example_ids)
        targets = segment_sum(batch.target_mask.astype(jnp.float32), batch.segment_ids)

        def one(offset: jax.Array, draw_keys: StreamKeys) -> LossTerms:
            t_BT = evaluated.time.at(shifted(uniform, offset))
            if self._has_bound:
                # Rounded up to k/n, at which exactly k tokens are chosen; a network that reads the time reads k/n.
                t_BT = jnp.ceil(t_BT * targets * (1 - 1e-6)) / jnp.maximum(targets, 1.0)
            noisy = evaluated.process.corrupt(draw_keys, batch, t_BT, vocab_size=model.spec.vocab_size)
            passes = evaluated.passes(model, batch, draw_keys, train=False)
            return evaluated.terms(noisy, t_BT, passes, model, batch, draw_keys, train=False)

        return mean_over_draws(keys, self.evaluation_draws, one)

    def _evaluated(self) -> "MaskedDiffusion":
        """Returns the objective whose mean loss `bound` estimates."""
        # Decoding sees the final mask and reads predictions in every step, so the bound does too.
        same = dataclasses.replace(
            self, annealing=None, self_conditioning=float(self.self_conditioning > 0), auxiliary=0.0
        )
        if not self._has_bound:
            return same
        # Exact counts have less variance than independent masks and no empty masks.
        return dataclasses.replace(
            same,
            process=Absorbing(choice=ExactCount()),
            time=UniformTime(),
            weighting=InverseShare(),
            normaliser="scored",
        )

    def passes(self, model: BoundModel, batch: Batch, keys: StreamKeys, train: bool, views: int = 1) -> ForwardPasses:
        """Returns the forward passes of a loss over `views` canvases of the batch."""
        visibility = annealed_visibility(self.annealing, self.visibility, batch, keys)
        # One encoder run for all canvases.
        number = views * self.needs().passes
        return ForwardPasses(model, batch, keys, visibility=visibility, train=train, passes=number)

    def terms(
        self,
        noisy: Corrupted,
        t_BT: jax.Array,
        forward: ForwardPasses,
        model: BoundModel,
        batch: Batch,
        keys: StreamKeys,
        *,
        train: bool,
        first_pass: int = 0,
    ) -> LossTerms:
        """Returns the sums for one noisy canvas.

        Args:
          noisy: z_t and which tokens were replaced.
          t_BT: f32[B,T], its times.
          forward: from `passes`.
          model: the network.
          batch: the clean batch.
          keys: root of the draws.
          train: enables label smoothing.
          first_pass: number of the first pass over this canvas, for its dropout.
        """
        schedule, masks_only = self.process.schedule, self._has_bound
        weights_BT = batch.loss_weights * self.weighting.weigh(t_BT, noisy.replaced, schedule, batch=batch)
        weights_BT, weight = normalised(self.normaliser, weights_BT, noisy.replaced, batch)

        hidden = self._hidden(noisy, t_BT, forward, model, batch, keys, first_pass)
        scored = batch.loss_weights != 0
        # Under noise of MASK alone an intact token is known and has no loss.
        wanted = scored & noisy.replaced if masks_only else scored
        nll, loss = cross_entropy(
            model,
            hidden,
            batch,
            self.alignment,
            # The second loss needs the intact tokens too; without it their logits are not computed.
            scored if self.auxiliary else wanted,
            forbidden=forbidden_ids(self.process, batch.special),
            label_smoothing=self.label_smoothing if train else 0.0,
        )
        # Weights at unwanted tokens may be large: at high alpha 1/(1 - alpha) has no upper limit.
        loss_sum = weighted_sum(loss, jnp.where(wanted, weights_BT, 0.0))

        # The metrics estimate the bound whatever weights the training has.
        bound_weights = self._bound_weights(t_BT, noisy, batch) if masks_only else jnp.ones_like(t_BT)
        metrics = {
            "nll_per_token": weighted_mean(nll * bound_weights, batch.loss_weights),
            "nll_per_real_token": weighted_mean(nll * bound_weights, is_real(batch)),
        }
        if masks_only:
            metrics["nll_per_masked_token"] = weighted_mean(nll, batch.loss_weights * noisy.replaced)
        if not self.auxiliary:
            return LossTerms(loss_sum, weight, metrics)
        return self._with_auxiliary(LossTerms(loss_sum, weight, metrics), loss, noisy, batch)

    def _hidden(
        self,
        noisy: Corrupted,
        t_BT: jax.Array,
        forward: ForwardPasses,
        model: BoundModel,
        batch: Batch,
        keys: StreamKeys,
        first_pass: int,
    ) -> Hidden:
        """Returns the hidden states of the pass that is scored."""
        rate = 1.0 - self.process.alpha(t_BT)
        if not self.self_conditioning:
            return forward(noisy.tokens, first_pass, rate=rate)
        # The first pass only provides an input; the gradient flows through the second.
        before = forward(noisy.tokens, first_pass, rate=rate, has_gradient=False)
        prediction = predicted_embedding(
            model,
            before,
            self.alignment,
            batch,
            is_noise(self.process, noisy.tokens, batch.target_mask, batch.special),
            keys,
            self.self_conditioning,
            forbidden=forbidden_ids(self.process, batch.special),
        )
        return forward(noisy.tokens, first_pass + 1, self_condition=prediction, rate=rate)

    @property
    def _auxiliary_has_own_weight(self) -> bool:
        """All scored tokens take part in D3PM's second loss, so it cannot be divided by the number of replaced ones."""
        return self.auxiliary > 0 and self.normaliser == "replaced"

    def _with_auxiliary(self, terms: LossTerms, loss_BT: jax.Array, noisy: Corrupted, batch: Batch) -> LossTerms:
        """Returns the terms with D3PM's second loss added."""
        normaliser: Normaliser = "scored" if self._auxiliary_has_own_weight else self.normaliser
        weights_BT, weight = normalised(normaliser, batch.loss_weights, noisy.replaced, batch)
        second = self.auxiliary * weighted_sum(loss_BT, weights_BT)
        if self._auxiliary_has_own_weight:
            return dataclasses.replace(terms, others=(WeightedMean(second, weight),))
        return dataclasses.replace(terms, loss_sum=terms.loss_sum + second)

    def _bound_weights(self, t_BT: jax.Array, noisy: Corrupted, batch: Batch) -> jax.Array:
        """Returns f32[B,T], the weights under which replaced tokens cost the likelihood bound at the drawn times.

        They are -alpha'(t) over the probability of being replaced. With an exact count k of n that probability is k/n
        and not the rate, which would leave a factor of ceil(rate n) / (rate n).
        """
        schedule = self.process.schedule
        if not isinstance(self.process.choice, ExactCount):
            return Nelbo().weigh(t_BT, noisy.replaced, schedule)
        fall = -schedule.alpha_derivative(t_BT)
        return fall * InverseShare().weigh(t_BT, noisy.replaced, schedule, batch=batch)


def check_weighting(weighting: Weighting, process: MaskingProcess, time: TimeSampler, where: str) -> None:
    """Raises `ConfigError` for weights that are wrong for the noise or for the law of the times."""
    if hasattr(weighting, "steps"):
        steps, drawn = weighting.steps, getattr(time, "steps", None)
        require(
            steps == drawn,
            f"the weights are those of {_time_name(steps)} and the times those of {_time_name(drawn)}",
            where=where,
            fix=f"Set {type(weighting).__name__}.steps to {drawn} (trap T12).",
        )
    require(
        not getattr(weighting, "needs_exact_count", False) or isinstance(process.choice, ExactCount),
        f"{type(weighting).__name__} with independent choices loses the examples in which no token is chosen",
        where=where,
        fix=f"Set {type(process).__name__}.choice to ExactCount(), or the weighting to Nelbo() (trap T08).",
    )
    require(
        weighting.bound_kind != "nelbo" or isinstance(process, Absorbing),
        f"{type(weighting).__name__} holds for noise of MASK alone, not for {type(process).__name__}",
        where=where,
        fix="Use InverseRate().",
    )


def _time_name(steps: int | None) -> str:
    return "continuous time" if steps is None else f"{steps} discrete steps"
