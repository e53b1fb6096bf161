"""Denoising objectives by composition: noise, schedule, time, weighting, alignment, visibility and unrolled steps.

The simplified SUNDAE objective of AR2Diff is one composition (`gin/objectives/sundae.gin`); another noise process or
another weighting is another composition, not another class.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from diffusion_lm.core.alignment import SamePosition
from diffusion_lm.core.errors import require
from diffusion_lm.core.rng import StreamKeys
from diffusion_lm.core.types import Batch, LossTerms, WeightedMean
from diffusion_lm.noise.corruption import UniformCorruption
from diffusion_lm.noise.schedules import Linear
from diffusion_lm.noise.time_sampling import FixedGrid, UniformTime
from diffusion_lm.noise.weighting import BoundKind, Flat
from diffusion_lm.objectives.base import (
    Forward,
    Model,
    Needs,
    check_visibility,
    frozen,
    real_tokens,
    weighted_mean,
    weighted_sum,
)


@dataclasses.dataclass(frozen=True)
class Denoising:
    """Predict the clean target from a corrupted one, then, `unrolls` times, from the model's own prediction.

    With the defaults this is the two-term loss L1 + L2 of AR2Diff (arXiv 2401.17181):

    1. draw t per example, corrupt each target token with probability 1 - alpha(t);
    2. L1 = cross-entropy of the clean target given [clean conditioning; corrupted target];
    3. the predicted tokens replace the target, the conditioning stays clean, no gradient flows through the choice;
    4. L2 = cross-entropy of the clean target given [clean conditioning; predicted target].

    Attributes:
      corruption: what a chosen token turns into.
      schedule: how the time maps to a corruption rate.
      time: at which t an example is trained.
      weighting: how much each token's loss counts at its noise level.
      alignment: which hidden state predicts which token.
      visibility: "full", or another name of `nn.masks.named_visibility`.
      unrolls: passes after the first one, each on the model's last prediction; the losses of all passes are *summed*.
      unroll_temperature: 0 feeds back the argmax (AR2Diff, its best), 1 a sample (SUNDAE).
      evaluation_time: the fixed noise levels of `bound`.
      pad_id: filler inside the scored window; left out of the loss per real token.
    """

    corruption: Any = UniformCorruption()
    schedule: Any = Linear()
    time: Any = UniformTime()
    weighting: Any = Flat()
    alignment: Any = SamePosition()
    visibility: str = "full"
    unrolls: int = 1
    unroll_temperature: float = 0.0
    evaluation_time: FixedGrid = FixedGrid()
    pad_id: int = 0

    def __post_init__(self):
        check_visibility(self.visibility, "Denoising.visibility")
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

    @property
    def bound_kind(self) -> BoundKind:
        """That of the weighting; unrolled terms belong to no bound."""
        return "pseudo" if self.unrolls else self.weighting.bound_kind

    def needs(self) -> Needs:
        """One pass and one more for each unroll; a MASK token where the corruption writes one."""
        return Needs(visibility=self.visibility, passes=1 + self.unrolls, mask_token=self.corruption.needs_mask_token)

    def loss(self, model: Model, batch: Batch, keys: StreamKeys, *, train: bool = True) -> LossTerms:
        """Returns the summed loss of all passes; `weight` counts each scored token once, so loss = L1 + L2 per token.

        Metrics: `nll_per_real_token` and `nll_per_token` (given the corrupted target), with unrolling also
        `unrolled_nll_per_real_token` and `unrolled_nll_per_token` (given the last prediction) and `prediction_accuracy`
        (real tokens that the last fed-back prediction had right).
        """
        t = self.time.draw(keys, batch.example_ids)
        return self._at(t, model, batch, keys, train=train)

    def bound(self, model: Model, batch: Batch, keys: StreamKeys) -> LossTerms:
        """Returns the same terms summed over the fixed times, with frozen noise and without dropout.

        Adds `nll_per_real_token/t=...` for each time. Their mean over times is `nll_per_real_token`.
        """
        keys = frozen(keys)
        times = self.evaluation_time.times

        def at_one_time(inputs):
            index, t = inputs
            level = keys.replace(root=jax.random.fold_in(keys.root, index))
            return self._at(jnp.full(batch.tokens.shape, t), model, batch, level, train=False)

        per_time = jax.lax.map(at_one_time, (jnp.arange(len(times)), jnp.asarray(times, jnp.float32)))
        terms = jax.tree.map(lambda x: jnp.sum(x, axis=0), per_time)
        by_time = jax.tree.map(lambda x: tuple(jnp.unstack(x)), per_time.metrics["nll_per_real_token"])
        named = {
            f"nll_per_real_token/t={t:g}": WeightedMean(total, weight)
            for t, total, weight in zip(times, by_time.total, by_time.weight, strict=True)
        }
        return terms.replace(metrics={**terms.metrics, **named})

    def _at(self, t_BT: jax.Array, model: Model, batch: Batch, keys: StreamKeys, *, train: bool) -> LossTerms:
        """Returns the terms of all passes at the given times."""
        noisy = self.corruption.corrupt(keys, batch, 1.0 - self.schedule.alpha(t_BT), vocab_size=model.spec.vocab_size)
        weights = batch.loss_weights * self.weighting.weigh(t_BT, noisy.replaced, self.schedule)
        real = real_tokens(batch, self.pad_id)
        targets = self.alignment.to_slots(batch.tokens)
        scored = self.alignment.to_slots(batch.loss_weights != 0)
        forward = Forward(model, batch, keys, visibility=self.visibility, train=train, passes=1 + self.unrolls)

        canvas, losses, metrics = noisy.tokens, [], {}
        for number in range(1 + self.unrolls):
            hidden = forward(canvas, number)
            nll = self.alignment.to_tokens(model.nll(hidden, targets, where=scored))
            losses.append(weighted_sum(nll, weights))
            prefix = "unrolled_" if number else ""
            metrics[f"{prefix}nll_per_token"] = weighted_mean(nll, batch.loss_weights)
            metrics[f"{prefix}nll_per_real_token"] = weighted_mean(nll, real)
            if number < self.unrolls:
                canvas = self._predict(model, hidden, batch, keys, number)
                metrics["prediction_accuracy"] = weighted_mean((canvas == batch.tokens).astype(jnp.float32), real)
        return LossTerms(jnp.sum(jnp.stack(losses)), jnp.sum(batch.loss_weights, dtype=jnp.float32), metrics)

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
        )
        return jnp.where(batch.target_mask, self.alignment.to_tokens(stats.sample), batch.tokens)
