"""Teacher-forced bounds on held-out data, on fixed noise times and frozen noise, so that curves can be read."""

import dataclasses
import functools
import math

import jax

from diffusion_lm.architectures.base import Architecture, BoundModel
from diffusion_lm.core.errors import require
from diffusion_lm.core.rng import StreamKeys
from diffusion_lm.core.types import Batch, LossTerms
from diffusion_lm.data.checks import Cut
from diffusion_lm.data.iterator import DataPipeline
from diffusion_lm.nn.constrain import Constrain, no_constraint
from diffusion_lm.objectives.base import Objective


@functools.cache
def compiled_bound(architecture: Architecture, objective: Objective, constrain: Constrain = no_constraint):
    """Returns the jitted `(params, batch, keys) -> LossTerms`, one per set of arguments in a process."""

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
    """Returns the bound over the first `limit` examples of `data`, laid out for the architecture, and its kind.

    Keys: `loss` (per scored token), every metric of the objective (per-real-token values among them), `kind`
    ("exact", "nelbo" or "pseudo") and `tokens`. Only the first two kinds are about the likelihood; those also have
    `bits_per_real_token`, the whole loss, scored padding included, over the real tokens: a model that must say the
    length by padding and one that says it by EOS are then charged for the same text.
    """
    architecture, constrain = model.architecture, model.constrain
    step = compiled_bound(architecture, objective, constrain)
    keys = StreamKeys.create(seed)
    total: LossTerms | None = None
    for batch, _ in data.with_encoder(architecture.needs_encoder).eval_batches(batch_size, limit=limit):
        terms = step(model.params, constrain.rows(batch), keys)
        total = terms if total is None else total + terms
    require(total is not None, "the evaluation split holds no examples", where="BoundEvaluation.data", fix="Fill it.")
    assert total is not None
    total = jax.device_get(total)
    values: dict[str, float | str] = {"loss": float(total.loss), "tokens": float(total.weight)}
    values.update({name: float(mean.value) for name, mean in total.metrics.items()})
    values["kind"] = objective.bound_kind
    real = total.metrics.get("nll_per_real_token")
    if objective.bound_kind != "pseudo" and real is not None and float(real.weight) > 0:
        values["bits_per_real_token"] = float(total.loss_sum) / float(real.weight) / math.log(2)
    return values


@dataclasses.dataclass(frozen=True)
class BoundEvaluation:
    """Evaluates the objective's bound during training; the trainer calls `run` every `every` steps.

    Attributes:
      data: held-out examples.
      objective: the objective whose bound is reported, normally that of the run.
      name: prefix of the values in the log.
      every: period in steps; 0 = only after the last step.
      limit: number of examples; None = all.
      batch_size: examples per forward pass.
      seed: root of the frozen noise.
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
        """What the window cuts of the examples that are used."""
        return self.data.cuts("scoring", self.limit)

    def run(self, model: BoundModel, step: int) -> dict[str, float]:
        """Returns the bound's values (`loss`, per-real-token metrics)."""
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
