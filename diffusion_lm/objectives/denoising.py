"""Denoising objectives by composition: noise, schedule, time, weighting, normaliser, alignment, visibility, unrolls.

The simplified SUNDAE objective of AR2Diff is one composition (`gin/objectives/sundae.gin`), MDLM, LLaDA, DiffuLLaMA,
Dream and RDM are others; another noise process or another weighting is another composition, not another class.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from diffusion_lm.core.alignment import SamePosition
from diffusion_lm.core.errors import require
from diffusion_lm.core.real_tokens import real_tokens
from diffusion_lm.core.rng import StreamKeys
from diffusion_lm.core.segments import segment_sum
from diffusion_lm.core.types import Batch, LossTerms, WeightedMean
from diffusion_lm.noise.contract import Contract, kind_of
from diffusion_lm.noise.corruption import AbsorbingCorruption, Corrupted, ExactCount, UniformCorruption
from diffusion_lm.noise.schedules import Linear
from diffusion_lm.noise.time_sampling import TIME_STREAM, UniformTime
from diffusion_lm.noise.weighting import BoundKind, Flat, InverseShare, Nelbo
from diffusion_lm.objectives.base import (
    Forward,
    Model,
    Needs,
    check_auxiliary,
    check_visibility,
    frozen,
    weighted_mean,
    weighted_sum,
)
from diffusion_lm.objectives.draws import check_draws, mean_over_draws, shifted
from diffusion_lm.objectives.parts import NORMALISERS, VIEWS, check_name, noisy_views, normalised

SELF_CONDITIONING_STREAM = "self_conditioning"


@dataclasses.dataclass(frozen=True)
class Denoising:
    """Predict the clean target from a corrupted one, then, `unrolls` times, from the model's own prediction.

    With the defaults this is the two-term loss L1 + L2 of AR2Diff (arXiv 2401.17181):

    1. draw t per example, corrupt each target token with probability 1 - alpha(t);
    2. L1 = cross-entropy of the clean target given [clean conditioning; corrupted target];
    3. the predicted tokens replace the target, the conditioning stays clean, no gradient flows through the choice;
    4. L2 = cross-entropy of the clean target given [clean conditioning; predicted target].

    Where the noise holds MASK, a clean token is never MASK, so MASK has no probability; where it is nothing but MASK, a
    token that is not MASK is known, so it has no loss (SUBS of MDLM, arXiv 2406.07524; trap T16).

    Attributes:
      corruption: what a chosen token turns into.
      schedule: how the time maps to a corruption rate.
      time: at which t an example is trained.
      weighting: how much each token's loss counts at its noise level.
      normaliser: what the weighted sum is divided by. "scored" = all scored target tokens, with which unbiased weights
        stay unbiased; "replaced" = the tokens that happen to be replaced (DiffuLLaMA's code, Dream; a ratio, biased,
        trap T06); "example" = each example's own number of scored tokens, then the number of examples (LLaDA SFT, RDM).
      alignment: which hidden state predicts which token.
      visibility: "full", or another name of `nn.named_masks.named_visibility`.
      annealing: opens a causal mask to `visibility` over the first steps of the training (`annealing.MaskAnnealing`;
        DiffuGPT), or None. `bound` is taken under `visibility`, which is what samplers use, at every step.
      views: noisy canvases of a batch, over which the loss is averaged. "nested" = two times and masks of which one
        holds the other (RDM, arXiv 2302.05737); "complementary" = a second canvas in which exactly the other target
        tokens are noise (LLaDA2.0, Fast-dLLM v2), as at time 1 - t.
      unrolls: passes after the first one, each on the model's last prediction; the losses of all passes are *summed*.
      unroll_temperature: 0 feeds back the argmax (AR2Diff, its best), 1 a sample (SUNDAE).
      self_conditioning: probability with which an example's pass reads the prediction of a pass before it, as the mean
        embedding of each noisy token; no gradient flows through that. The loss is of the second pass alone, which reads
        zeros otherwise (Analog Bits, arXiv 2208.04202; DiffusionGemma uses 0.5). `bound` always reads a prediction.
      auxiliary: weight of D3PM's second loss, the plain cross-entropy of all scored tokens, intact ones included, which
        is added to that of each pass (arXiv 2107.03006, L_lambda): a mean over the scored tokens, or over examples with
        normaliser "example". 0 is off; `bound` has none.
      label_smoothing: probability mass that the training target spreads over the vocabulary.
      protected: ids that stay clean and unscored in a target (RDM: EOS); they count as conditioning.
      evaluation_draws: noise levels of `bound` per example, spread evenly from a random start.
      pad_id: filler inside the scored window; left out of the loss per real token.
      eos_id: ends a target; further ones behind the first are filler too.
    """

    corruption: Any = UniformCorruption()
    schedule: Any = Linear()
    time: Any = UniformTime()
    weighting: Any = Flat()
    normaliser: str = "scored"
    alignment: Any = SamePosition()
    visibility: str = "full"
    annealing: Any = None
    views: str = "one"
    unrolls: int = 1
    unroll_temperature: float = 0.0
    self_conditioning: float = 0.0
    auxiliary: float = 0.0
    label_smoothing: float = 0.0
    protected: tuple[int, ...] = ()
    evaluation_draws: int = 8
    pad_id: int = 0
    eos_id: int = 1

    def __post_init__(self):
        object.__setattr__(self, "protected", tuple(self.protected))
        check_visibility(self.visibility, "Denoising.visibility")
        check_name(self.normaliser, NORMALISERS, "Denoising.normaliser")
        check_name(self.views, VIEWS, "Denoising.views")
        check_draws(self.evaluation_draws, "Denoising.evaluation_draws")
        require(
            isinstance(self.unrolls, int) and self.unrolls >= 0,
            f"unrolls = {self.unrolls} is not a number of passes",
            where="Denoising.unrolls",
            fix="0 trains on the corrupted target alone, 1 is AR2Diff.",
        )
        require(
            self.unroll_temperature >= 0,
            f"unroll_temperature = {self.unroll_temperature} is negative",
            where="Denoising.unroll_temperature",
            fix="0.0 is argmax, 1.0 samples from the model.",
        )
        require(
            0 <= self.label_smoothing < 1,
            f"label_smoothing = {self.label_smoothing} is no probability below 1",
            where="Denoising.label_smoothing",
            fix="0.0 turns it off, 0.1 is usual in translation.",
        )
        require(
            0 <= self.self_conditioning <= 1 and (self.self_conditioning == 0 or self.unrolls == 0),
            f"self_conditioning = {self.self_conditioning} with unrolls = {self.unrolls} is not defined",
            where="Denoising.self_conditioning",
            fix="Give a probability, and unrolls = 0: a prediction is fed back as a distribution or as tokens.",
        )
        check_auxiliary(self.auxiliary, "Denoising.auxiliary")
        self._check_composition()

    def _check_composition(self) -> None:
        """Raises `ConfigError` for parts that do not belong together."""
        if hasattr(self.weighting, "steps"):
            steps, drawn = self.weighting.steps, getattr(self.time, "steps", None)
            require(
                steps == drawn,
                f"the weights are those of {_time_name(steps)} and the times those of {_time_name(drawn)}",
                where="Denoising.weighting",
                fix=f"Set {type(self.weighting).__name__}.steps to {drawn} (trap T12).",
            )
        require(
            not getattr(self.weighting, "needs_exact_count", False) or _counts_exactly(self.corruption),
            f"{type(self.weighting).__name__} with independent choices loses the examples in which nothing is chosen",
            where="Denoising.corruption",
            fix="Set the corruption's choice to ExactCount(), or the weighting to Nelbo() (trap T08).",
        )
        require(
            self.weighting.bound_kind != "nelbo" or self._absorbing,
            f"{type(self.weighting).__name__} holds the likelihood weights of noise that is nothing but MASK",
            where="Denoising.weighting",
            fix="Use InverseRate() with other noise.",
        )
        require(
            self.views != "complementary" or self.schedule == Linear(),
            "the complement of the noise at time t is noise at time 1 - t for the linear schedule only",
            where="Denoising.schedule",
            fix="Use Linear(), or views = 'one'.",
        )

    @property
    def bound_kind(self) -> BoundKind:
        """What `bound` says about the likelihood.

        "nelbo" where the noise is nothing but MASK and all target tokens take part, whatever weights, normaliser and
        unrolled terms the training has.
        """
        return "nelbo" if self._has_bound else "pseudo"

    def needs(self) -> Needs:
        """One pass a view and one more for each unroll or a prediction; MASK where the corruption writes one."""
        views = 1 if self.views == "one" else 2
        choice = getattr(self.corruption, "choice", None)
        fillers: dict[int | None, str] = {self.eos_id: "eos", self.pad_id: "pad"}
        return Needs(
            visibility=self.visibility,
            passes=views * self._passes_per_view,
            frozen_passes=views if self.self_conditioning else 0,
            self_conditioning=self.self_conditioning > 0,
            several_weights=self._auxiliary_is_apart,
            mask_token=self.corruption.needs_mask_token,
            mask_id=self._mask_id,
            contracts=(self._contract,),
            tail=fillers.get(getattr(choice, "joint_tail", None)),
        )

    def loss(self, model: Model, batch: Batch, keys: StreamKeys, *, train: bool = True) -> LossTerms:
        """Returns the summed loss of all passes; `weight` is what `normaliser` says.

        With "scored", `weight` counts each scored token once, so that the AR2Diff loss is L1 + L2 per token.

        Metrics: `nll_per_real_token` and `nll_per_token` (given the corrupted target), with unrolling also
        `unrolled_nll_per_real_token` and `unrolled_nll_per_token` (given the last prediction) and `prediction_accuracy`
        (real tokens that the last fed-back prediction had right). Under absorbing noise the first two are estimates of
        the likelihood bound, replaced tokens weighted by `Nelbo`, and `nll_per_masked_token` is the plain mean.
        """
        t = self.time.draw(keys, batch.example_ids, strata=batch.strata)
        return self._at(t, model, batch, keys, train=train)

    def bound(self, model: Model, batch: Batch, keys: StreamKeys) -> LossTerms:
        """Returns an unbiased estimate with frozen noise and without dropout.

        Under absorbing noise, all of which is MASK, it is the NELBO of the network: the mean over generation orders,

            -log p(x)  <=  E_k E_mask [ n/k x sum over masked i of -log p(x_i | x_t) ],   k uniform in 1..n,

        where exactly k of an example's n target tokens are MASK (arXiv 2110.02037; LLaDA's estimator, 2502.09992).
        Draws spread k evenly over 1..n from a random start per example. It does not depend on schedule, weights and
        normaliser of the training. For other noise it is the training loss in expectation, at times spread as evenly.
        """
        keys, evaluated = frozen(keys), self._evaluated()
        uniform = keys.example_uniform(TIME_STREAM, batch.example_ids)
        targets = segment_sum(batch.target_mask.astype(jnp.float32), batch.segment_ids)

        def one(offset, draw_keys):
            t = evaluated.time.at(shifted(uniform, offset))
            if self._has_bound:
                # k/n, at which exactly k tokens are chosen: a network that reads the time reads its share of MASK.
                t = jnp.ceil(t * targets * (1 - 1e-6)) / jnp.maximum(targets, 1.0)
            return evaluated._at(t, model, batch, draw_keys, train=False)

        return mean_over_draws(keys, self.evaluation_draws, one)

    def _evaluated(self) -> "Denoising":
        """Returns the composition that `bound` evaluates."""
        one = dataclasses.replace(
            self, views="one", annealing=None, self_conditioning=float(self.self_conditioning > 0), auxiliary=0.0
        )
        if not self._has_bound:
            return one
        return dataclasses.replace(
            one,
            corruption=AbsorbingCorruption(self.corruption.mask_id, choice=ExactCount()),
            schedule=Linear(),
            time=UniformTime(),
            weighting=InverseShare(),
            normaliser="scored",
            unrolls=0,
        )

    @property
    def _contract(self) -> Contract:
        noise = kind_of(self._mask_id, uniform=not self._absorbing)
        closed = self.eos_id in self.protected
        return Contract(noise, self.visibility, self.alignment, self._mask_id, closed=closed)

    @property
    def _passes_per_view(self) -> int:
        return 1 + self.unrolls + (self.self_conditioning > 0)

    @property
    def _auxiliary_is_apart(self) -> bool:
        """Whether the second loss is divided by a weight of its own."""
        return self.auxiliary > 0 and self.normaliser == "replaced"

    @property
    def _mask_id(self) -> int | None:
        return getattr(self.corruption, "mask_id", None)

    @property
    def _absorbing(self) -> bool:
        return getattr(self.corruption, "absorbing", False)

    @property
    def _has_bound(self) -> bool:
        return self._absorbing and not self.protected

    @property
    def _forbidden(self) -> tuple[int, ...]:
        """Ids that no clean token has."""
        return () if self._mask_id is None else (self._mask_id,)

    def _at(self, t_BT: jax.Array, model: Model, batch: Batch, keys: StreamKeys, *, train: bool) -> LossTerms:
        """Returns the terms of all passes at the given times, averaged over the views."""
        if self.protected:
            kept = batch.target_mask & ~jnp.isin(batch.tokens, jnp.asarray(self.protected))
            batch = batch.replace(target_mask=kept, loss_weights=jnp.where(kept, batch.loss_weights, 0.0))
        seen = self.visibility if self.annealing is None else self.annealing.visibility(self.visibility, batch, keys)
        forward = Forward(model, batch, keys, visibility=seen, train=train, passes=self.needs().passes)
        noise = {"corruption": self.corruption, "schedule": self.schedule, "time": self.time}
        views = noisy_views(self.views, t_BT, batch, keys, model.spec.vocab_size, **noise)
        terms = [
            self._view(noisy, t, forward, model, batch, keys, first_pass=number * self._passes_per_view, train=train)
            for number, (t, noisy) in enumerate(views)
        ]
        return terms[0] if len(terms) == 1 else jax.tree.map(lambda a, b: 0.5 * (a + b), *terms)

    def _view(
        self,
        noisy: Corrupted,
        t_BT: jax.Array,
        forward: Forward,
        model: Model,
        batch: Batch,
        keys: StreamKeys,
        *,
        first_pass: int,
        train: bool,
    ) -> LossTerms:
        """Returns the terms of one canvas and of what is unrolled from it."""
        weights = batch.loss_weights * self.weighting.weigh(t_BT, noisy.replaced, self.schedule, batch=batch)
        weights, weight = normalised(self.normaliser, weights, noisy.replaced, batch)
        # All scored tokens take part in the second loss, so "replaced" tokens cannot be what it is divided by.
        normaliser = "scored" if self._auxiliary_is_apart else self.normaliser
        everywhere, everyone = normalised(normaliser, batch.loss_weights, noisy.replaced, batch)
        real = real_tokens(batch, self.pad_id, self.eos_id)
        scored = batch.loss_weights != 0
        counted = jnp.ones_like(t_BT)
        if self._absorbing:
            scored &= noisy.replaced
            counted = self._bound_weights(t_BT, noisy, batch)

        canvas, losses, second, metrics, prediction = noisy.tokens, [], [], {}, None
        rate = 1.0 - self.schedule.alpha(t_BT)
        if self.self_conditioning:
            before = forward(canvas, first_pass, rate=rate, has_gradient=False)
            prediction = self._expect(model, before, canvas, batch, keys)
            first_pass += 1
        for number in range(1 + self.unrolls):
            hidden = forward(canvas, first_pass + number, self_condition=prediction, rate=rate)
            where = batch.loss_weights != 0 if self.auxiliary else scored
            nll, loss = self._token_losses(model, hidden, batch, where, train=train)
            losses.append(weighted_sum(loss, jnp.where(scored, weights, 0.0)))
            if self.auxiliary:
                second.append(self.auxiliary * weighted_sum(loss, everywhere))
            prefix = "unrolled_" if number else ""
            metrics[f"{prefix}nll_per_token"] = weighted_mean(nll * counted, batch.loss_weights)
            metrics[f"{prefix}nll_per_real_token"] = weighted_mean(nll * counted, real)
            if self._absorbing:
                metrics[f"{prefix}nll_per_masked_token"] = weighted_mean(nll, batch.loss_weights * noisy.replaced)
            if number < self.unrolls:
                canvas = self._predict(model, hidden, batch, keys, first_pass + number)
                metrics["prediction_accuracy"] = weighted_mean((canvas == batch.tokens).astype(jnp.float32), real)
        if self._auxiliary_is_apart:
            others = (WeightedMean(jnp.sum(jnp.stack(second)), everyone),)
            return LossTerms(jnp.sum(jnp.stack(losses)), weight, metrics, others)
        return LossTerms(jnp.sum(jnp.stack(losses + second)), weight, metrics)

    def _bound_weights(self, t_BT: jax.Array, noisy: Corrupted, batch: Batch) -> jax.Array:
        """Returns f32[B,T], the weights under which replaced tokens cost the likelihood bound at the drawn times.

        -alpha'(t) over the probability of being replaced, which with an exact count k of n is k/n and not the rate: the
        rate would leave ceil(rate n) / (rate n) too much.
        """
        if not _counts_exactly(self.corruption):
            return Nelbo().weigh(t_BT, noisy.replaced, self.schedule)
        fall = -self.schedule.alpha_derivative(t_BT)
        return fall * InverseShare().weigh(t_BT, noisy.replaced, self.schedule, batch=batch)

    def _token_losses(
        self, model: Model, hidden: Any, batch: Batch, scored_BT: jax.Array, *, train: bool
    ) -> tuple[jax.Array, jax.Array]:
        """Returns -log p of the clean tokens and what is trained on, f32[B,T] each; 0 where nothing is scored."""
        targets = self.alignment.to_slots(jnp.asarray(batch.tokens))
        where = self.alignment.to_slots(scored_BT)
        if not (train and self.label_smoothing):
            nll = self.alignment.to_tokens(model.nll(hidden, targets, where=where, forbidden=self._forbidden))
            return nll, nll
        terms = model.nll_terms(hidden, targets, where=where, forbidden=self._forbidden)
        smooth = (1.0 - self.label_smoothing) * terms.nll + self.label_smoothing * terms.uniform_nll
        return self.alignment.to_tokens(terms.nll), self.alignment.to_tokens(smooth)

    def _expect(self, model: Model, hidden: Any, canvas: jax.Array, batch: Batch, keys: StreamKeys) -> jax.Array:
        """Returns what the next pass reads, [B,T,D]: the mean embedding of each noisy token, no gradient.

        Noisy are all target tokens, or those that are MASK where the noise has one. By a chance of its own each example
        reads zeros.
        """
        read = batch.target_mask if self._mask_id is None else batch.target_mask & (canvas == self._mask_id)
        read &= keys.example_uniform(SELF_CONDITIONING_STREAM, batch.example_ids) < self.self_conditioning
        stats = model.token_stats(hidden, where=self.alignment.to_slots(read), forbidden=self._forbidden, expected=True)
        return jax.lax.stop_gradient(self.alignment.to_tokens(stats.expected)[:, :, 0])

    def _predict(self, model: Model, hidden: Any, batch: Batch, keys: StreamKeys, number: int) -> jax.Array:
        """Returns the canvas of the next pass: the predicted target with the conditioning clean, no gradient."""
        token_keys = None
        if self.unroll_temperature > 0:
            token_keys = self.alignment.to_slots(keys.per_token(f"unroll/{number}", batch.example_ids, batch.positions))
        stats = model.token_stats(
            jax.lax.stop_gradient(hidden),
            where=self.alignment.to_slots(batch.target_mask),
            keys_BT=token_keys,
            temperature=self.unroll_temperature,
            forbidden=self._forbidden,
        )
        return jnp.where(batch.target_mask, self.alignment.to_tokens(stats.sample), batch.tokens)


def _time_name(steps: int | None) -> str:
    return "continuous time" if steps is None else f"{steps} discrete steps"


def _counts_exactly(corruption: Any) -> bool:
    return isinstance(getattr(corruption, "choice", None), ExactCount)
