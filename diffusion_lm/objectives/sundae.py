"""SUNDAE: denoise a corrupted target, then denoise the model's own prediction (arXiv 2112.06749; AR2Diff, 2401.17181).

    L = sum_{s=0}^{unrolls} CE(f([prefix; x_s]), x),      x_0 ~ q(z_t | x),  t ~ U(0, 1]
    x_{s+1} = argmax f([prefix; x_s])   (or a sample at `unroll_temperature`), without gradient

With one unroll and argmax this is the two-term loss L1 + L2 of AR2Diff. Every target token is scored, corrupted or not:
scoring intact tokens is what makes the model decide which tokens are noise (trap T17).
"""

import dataclasses

import jax
import jax.numpy as jnp

from diffusion_lm.architectures.base import BoundModel, Hidden
from diffusion_lm.core.alignment import Alignment, SamePosition
from diffusion_lm.core.checks import check_count, check_non_negative, check_probability
from diffusion_lm.core.errors import require
from diffusion_lm.core.real_tokens import is_real
from diffusion_lm.core.rng import StreamKeys
from diffusion_lm.core.types import Batch, LossTerms, WeightedMean
from diffusion_lm.nn.named_masks import check_visibility
from diffusion_lm.noise.contract import Contract
from diffusion_lm.noise.process import NoiseProcess, Uniform, forbidden_ids, is_noise
from diffusion_lm.noise.time_sampling import TIME_STREAM, TimeSampler, UniformTime
from diffusion_lm.noise.weighting import BoundKind
from diffusion_lm.objectives.annealing import Annealing, annealed_visibility
from diffusion_lm.objectives.draws import check_draws, mean_over_draws, shifted
from diffusion_lm.objectives.forward_pass import ForwardPasses
from diffusion_lm.objectives.objective import Needs, evaluation_keys
from diffusion_lm.objectives.self_conditioning import predicted_embedding
from diffusion_lm.objectives.token_losses import cross_entropy, weighted_mean, weighted_sum


@dataclasses.dataclass(frozen=True)
class Sundae:
    """Cross-entropy of the clean target, given a corrupted target and then given the model's own predictions.

    Attributes:
      process: the noise, uniform tokens in the papers.
      time: at which t an example is trained.
      unrolls: passes after the first one, each on the model's last prediction; the losses of all passes are *summed*.
      unroll_temperature: 0 feeds back the argmax (AR2Diff, its best), 1 a sample (SUNDAE).
      self_conditioning: probability with which an example also reads the prediction of a first pass without gradient,
        as the mean embedding at each noisy slot; it reads zeros otherwise. The loss is that of the second pass alone
        (DiffusionGemma: 0.5). Needs `unrolls = 0`. `bound` always reads a prediction.
      alignment: which hidden state predicts which token.
      visibility: "full", or another name of `nn.named_masks.named_visibility`.
      annealing: opens a causal mask to `visibility` over the first steps of the training (`annealing.MaskAnnealing`),
        or None. `bound` uses `visibility`, as samplers do, at every step.
      label_smoothing: probability mass that the training target spreads over the vocabulary.
      evaluation_draws: noise levels of `bound` per example, spread evenly from a random start.
    """

    process: NoiseProcess = Uniform()
    time: TimeSampler = UniformTime()
    unrolls: int = 1
    unroll_temperature: float = 0.0
    self_conditioning: float = 0.0
    alignment: Alignment = SamePosition()
    visibility: str = "full"
    annealing: Annealing | None = None
    label_smoothing: float = 0.0
    evaluation_draws: int = 8

    def __post_init__(self):
        check_visibility(self.visibility, "Sundae.visibility")
        check_draws(self.evaluation_draws, "Sundae.evaluation_draws")
        check_count(self.unrolls, "Sundae.unrolls", "Use 1 for AR2Diff, 0 for the corrupted target alone.", minimum=0)
        check_non_negative(self.unroll_temperature, "Sundae.unroll_temperature", "Use 0.0 for argmax, 1.0 to sample.")
        check_probability(self.label_smoothing, "Sundae.label_smoothing", "0.1 is usual.", below_one=True)
        check_probability(self.self_conditioning, "Sundae.self_conditioning")
        require(
            self.self_conditioning == 0 or self.unrolls == 0,
            f"self_conditioning={self.self_conditioning} with unrolls={self.unrolls}: only one of them can be used",
            where="Sundae.self_conditioning",
            fix="Use unrolls = 0, or self_conditioning = 0.0: a prediction is fed back as embeddings or as tokens.",
        )

    @property
    def bound_kind(self) -> BoundKind:
        """The loss is not a bound: models of the SUNDAE family have none."""
        return "pseudo"

    def needs(self) -> Needs:
        """One pass, one more for each unroll, and one without gradient under self-conditioning."""
        contract = Contract(self.process.kind, self.visibility, self.alignment)
        return Needs(
            visibility=self.visibility,
            passes=1 + self.unrolls + (self.self_conditioning > 0),
            frozen_passes=int(self.self_conditioning > 0),
            self_conditioning=self.self_conditioning > 0,
            mask_token=self.process.has_mask,
            contracts=(contract,),
        )

    def loss(self, model: BoundModel, batch: Batch, keys: StreamKeys, *, train: bool = True) -> LossTerms:
        """Returns the summed loss of all passes; `weight` counts each scored token once, so the loss is L1 + L2 + ...

        Metrics: `nll_per_real_token` and `nll_per_token` (given the corrupted target); with unrolls also
        `unrolled_nll_per_real_token`, `unrolled_nll_per_token` (given the last prediction) and `prediction_accuracy`
        (share of the real tokens that the last prediction had right).
        """
        t_BT = self.time.draw(keys, batch.example_ids, strata=batch.strata)
        return self._at(t_BT, model, batch, keys, train=train)

    def bound(self, model: BoundModel, batch: Batch, keys: StreamKeys) -> LossTerms:
        """Returns the expected training loss with fixed noise at evenly spread times, without dropout and annealing."""
        keys = evaluation_keys(keys)
        evaluated = dataclasses.replace(self, annealing=None, self_conditioning=float(self.self_conditioning > 0))
        uniform = keys.example_uniform(TIME_STREAM, batch.example_ids)

        def one(offset: jax.Array, draw_keys: StreamKeys) -> LossTerms:
            t_BT = evaluated.time.at(shifted(uniform, offset))
            return evaluated._at(t_BT, model, batch, draw_keys, train=False)

        return mean_over_draws(keys, self.evaluation_draws, one)

    def _at(self, t_BT: jax.Array, model: BoundModel, batch: Batch, keys: StreamKeys, *, train: bool) -> LossTerms:
        """Returns the terms of all passes at times f32[B,T]."""
        canvas = self.process.corrupt(keys, batch, t_BT, vocab_size=model.spec.vocab_size).tokens
        rate = 1.0 - self.process.alpha(t_BT)
        visibility = annealed_visibility(self.annealing, self.visibility, batch, keys)
        # One object for all passes, so that an encoder runs once.
        forward = ForwardPasses(model, batch, keys, visibility=visibility, train=train, passes=self.needs().passes)
        forbidden = forbidden_ids(self.process, batch.special)
        real, scored = is_real(batch), batch.loss_weights != 0
        # Smoothing would bias the losses that are reported in evaluation.
        smoothing = self.label_smoothing if train else 0.0

        first_pass, prediction = 0, None
        if self.self_conditioning:
            # As in decoding, the prediction is an input: nothing is differentiated through it.
            hidden = forward(canvas, rate=rate, has_gradient=False)
            noisy = is_noise(self.process, canvas, batch.target_mask, batch.special)
            prediction = predicted_embedding(
                model, hidden, self.alignment, batch, noisy, keys, self.self_conditioning, forbidden=forbidden
            )
            # The scored pass has dropout of its own.
            first_pass = 1

        losses: list[jax.Array] = []
        metrics: dict[str, WeightedMean] = {}
        for number in range(1 + self.unrolls):
            hidden = forward(canvas, first_pass + number, self_condition=prediction, rate=rate)
            nll, loss = cross_entropy(
                model, hidden, batch, self.alignment, scored, forbidden=forbidden, label_smoothing=smoothing
            )
            # All tokens of the target are scored, intact ones too: the model learns which of them to keep.
            losses.append(weighted_sum(loss, batch.loss_weights))
            prefix = "unrolled_" if number else ""
            metrics[f"{prefix}nll_per_token"] = weighted_mean(nll, batch.loss_weights)
            metrics[f"{prefix}nll_per_real_token"] = weighted_mean(nll, real)
            # After the last pass there is nothing to predict for.
            if number < self.unrolls:
                # The next pass reads the prediction in place of the target; the conditioning stays clean.
                canvas = self._predict(model, hidden, batch, keys, number)
                metrics["prediction_accuracy"] = weighted_mean((canvas == batch.tokens).astype(jnp.float32), real)
        # The losses of the passes are summed over one weight, as in the paper: L1 + L2 is not halved.
        weight = jnp.sum(batch.loss_weights, dtype=jnp.float32)
        return LossTerms(jnp.sum(jnp.stack(losses)), weight, metrics)

    def _predict(self, model: BoundModel, hidden: Hidden, batch: Batch, keys: StreamKeys, number: int) -> jax.Array:
        """Returns i32[B,T], the batch with its target replaced by the prediction; no gradient flows through."""
        token_keys = None
        if self.unroll_temperature > 0:
            # The draws happen at the slots that predict, so the keys move there with them.
            token_keys = self.alignment.to_slots(keys.per_token(f"unroll/{number}", batch.example_ids, batch.positions))
        stats = model.token_stats(
            # Sampling is not differentiable; for the next pass its result is data.
            jax.lax.stop_gradient(hidden),
            where=self.alignment.to_slots(batch.target_mask),
            keys_BT=token_keys,
            temperature=self.unroll_temperature,
            forbidden=forbidden_ids(self.process, batch.special),
        )
        return jnp.where(batch.target_mask, self.alignment.to_tokens(stats.sample), batch.tokens)
