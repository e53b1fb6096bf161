"""Teacher-forced likelihood bounds on held-out data, with the same noise at every training step."""

import dataclasses
import functools
import math

import jax
import numpy as np

from diffusion_lm.architectures.base import Architecture, BoundModel
from diffusion_lm.core.errors import require
from diffusion_lm.core.real_tokens import is_real
from diffusion_lm.core.rng import StreamKeys
from diffusion_lm.core.types import Batch, LossTerms
from diffusion_lm.data.checks import Cut
from diffusion_lm.data.iterator import DataPipeline
from diffusion_lm.nn.constrain import Constrain, no_constraint
from diffusion_lm.objectives.objective import Objective


@functools.cache
def compiled_bound(architecture: Architecture, objective: Objective, constrain: Constrain = no_constraint):
    """Returns a jitted function `(params, batch, keys) -> LossTerms`, cached per process."""

    def bound(params, batch: Batch, keys: StreamKeys) -> LossTerms:
        return constrain.whole(objective.bound(BoundModel(architecture, params, constrain), batch, keys))

    return jax.jit(bound)


def evaluate_bound(
    model: BoundModel,
    objective: Objective,
    data: DataPipeline,
    *,
    batch_size: int,
    limit: int | None = None,
    seed: int = 0,
) -> dict[str, float | str]:
    """Returns the bound over the first `limit` examples of `data`, in the layout of the architecture.

    Keys: `loss` (nats per scored token), the metrics of the objective (e.g. `nll_per_real_token`), `kind` ("exact",
    "nelbo" or "pseudo"), `tokens` (scored tokens) and `real_tokens` (without padding).

    For "exact" and "nelbo" there is also `bits_per_real_token`: the total loss, including that of scored padding,
    divided by the real tokens. Models that learn the length from padding and models that learn it from EOS are then
    comparable. Bounds that are sampled also have standard errors over the draws for these examples, `loss_error` and
    `bits_per_real_token_error`, which are overestimates if the draws are evenly spaced.
    """
    architecture, constrain = model.architecture, model.constrain
    step = compiled_bound(architecture, objective, constrain)
    keys = StreamKeys.create(seed)
    total: LossTerms | None = None
    scored = real = 0
    for batch, _ in data.with_encoder(architecture.needs_encoder).eval_batches(batch_size, limit=limit):
        terms = step(model.params, constrain.rows(batch), keys)
        total = terms if total is None else total + terms
        scored += int(np.sum(np.asarray(batch.target_mask) & (np.asarray(batch.loss_weights) > 0)))
        real += int(np.sum(np.asarray(is_real(batch))))
    require(
        total is not None,
        "the evaluation split has no examples",
        where="BoundEvaluation.data",
        fix="Use a split that is not empty.",
    )
    assert total is not None
    total = jax.device_get(total)
    values: dict[str, float | str] = {"loss": float(total.loss), "tokens": float(scored), "real_tokens": float(real)}
    values.update({name: float(mean.value) for name, mean in total.metrics.items()})
    values["kind"] = objective.bound_kind
    error = math.nan if total.variance is None else math.sqrt(total.variance)
    if math.isfinite(error) and total.weight > 0:
        values["loss_error"] = error / float(total.weight)
    if objective.bound_kind != "pseudo" and real:
        values["bits_per_real_token"] = float(total.loss_sum) / real / math.log(2)
        if math.isfinite(error):
            values["bits_per_real_token_error"] = error / real / math.log(2)
    return values


@dataclasses.dataclass(frozen=True)
class BoundEvaluation:
    """Evaluates the bound of an objective during training; the training loop calls `run` every `every` steps.

    Attributes:
      data: held-out examples.
      objective: the objective, normally that of the run.
      name: prefix of the logged values.
      every: period in steps; 0 = only after the last step.
      limit: number of examples; None = all.
      batch_size: examples per forward pass.
      seed: seed of the frozen noise.
    """

    data: DataPipeline
    objective: Objective
    name: str = "bound"
    every: int = 0
    limit: int | None = None
    batch_size: int = 32
    seed: int = 0

    @property
    def cuts(self) -> tuple[Cut, ...]:
        """Truncated examples among those in use."""
        return self.data.cuts("scoring", self.limit)

    def run(self, model: BoundModel, step: int) -> dict[str, float]:
        """Returns the numeric values of `evaluate_bound`."""
        del step
        values = evaluate_bound(
            model,
            self.objective,
            self.data,
            batch_size=self.batch_size,
            limit=self.limit,
            seed=self.seed,
        )
        return {name: value for name, value in values.items() if isinstance(value, float)}
