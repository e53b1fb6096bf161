"""Best-checkpoint selection: a run returns the checkpoint with the best validation metric instead of the last one.

The selection so far is part of every checkpoint (`Progress.best`), so an interrupted and resumed run selects the same
one. `CheckpointPolicy.best` configures it. The selected checkpoint is never deleted.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from diffusion_lm.core.checks import check_choice
from diffusion_lm.core.errors import near_names, require
from diffusion_lm.training.card import plain
from diffusion_lm.training.hooks import Evaluation

MODES = ("max", "min")


@dataclasses.dataclass(frozen=True)
class Selected:
    """The checkpoint that a run returns.

    Attributes:
      step: its number of updates.
      value: the metric at that step.
      metric: the metric's name in the log.
      mode: "max" or "min", whether larger or smaller values are better.
    """

    step: int
    value: float
    metric: str
    mode: str

    def __str__(self) -> str:
        return f"step {self.step:,}: {self.metric} {self.value:.6g} is the {self.mode}imum"


@dataclasses.dataclass(frozen=True)
class BestCheckpoint:
    """Selects the checkpoint with the best value of one evaluation of the run (`TrainRun.evaluations`).

    Candidates are the steps at which that evaluation runs: multiples of its `every`, and the last step. Of equal values
    the earlier step is selected; values that are not finite are never selected. If the run has a moving average
    (`TrainRun.ema_decay`), the average is evaluated, selected and returned.

    Attributes:
      metric: name of the value in the log, EVALUATION/VALUE, e.g. `decode/qa_validation/f1`.
      mode: "max" or "min".
    """

    metric: str
    mode: str = "max"

    def __post_init__(self):
        check_choice(self.mode, MODES, "BestCheckpoint.mode")

    def evaluation(self, evaluations: Sequence[Evaluation]) -> Evaluation:
        """Returns the evaluation that measures the metric.

        Evaluations may declare the names of their values (`value_names`); others are checked when they first run.

        Raises:
          ConfigError: there is none, or it runs only after the last step.
        """
        found = [one for one in evaluations if self.metric.startswith(f"{one.name}/")]
        # The longest name: `bound/qa/loss` belongs to `bound/qa` and not to `bound`.
        evaluation = max(found, key=lambda one: len(one.name), default=None)
        known = [f"{one.name}/{name}" for one in evaluations for name in getattr(one, "value_names", ("...",))]
        names = None if evaluation is None else getattr(evaluation, "value_names", None)
        require(
            evaluation is not None and (names is None or self.metric.removeprefix(f"{evaluation.name}/") in names),
            f"metric={self.metric!r}: no evaluation of the run measures it{near_names(self.metric, known)}",
            where="BestCheckpoint.metric",
            fix=f"Use one of {', '.join(known)}." if known else "Add the evaluation to TrainRun.evaluations.",
        )
        assert evaluation is not None
        require(
            evaluation.every > 0,
            f"metric={self.metric!r}: is measured only after the last step, so there is one candidate",
            where="BestCheckpoint.metric",
            fix="Set the evaluation's `every` to a number of steps.",
        )
        return evaluation

    def identity(self, evaluations: Sequence[Evaluation]) -> dict[str, Any]:
        """Returns plain data that determines the selection: the metric, and how and when it is measured."""
        evaluation: Any = self.evaluation(evaluations)
        how = evaluation.identity if hasattr(evaluation, "identity") else plain(evaluation)
        return {**plain(self), "evaluation": how, "every": evaluation.every}

    def update(self, best: Selected | None, step: int, values: Mapping[str, float]) -> Selected | None:
        """Returns the selection after the evaluations of `step`.

        Args:
          best: the selection so far.
          step: number of updates.
          values: the values measured at `step`, by their names in the log; may be empty.

        Raises:
          ConfigError: the evaluation ran and did not measure the metric.
        """
        if self.metric not in values:
            there = [name for name in values if name.rpartition("/")[0] == self.metric.rpartition("/")[0]]
            require(
                not there,
                f"metric={self.metric!r}: the evaluation did not measure it{near_names(self.metric, there)}",
                where="BestCheckpoint.metric",
                fix=f"Use one of {', '.join(there)}.",
            )
            return best
        value = values[self.metric]
        if not math.isfinite(value):
            return best
        # Only if strictly better: of equal values the earlier step is selected.
        if best is not None and not (value > best.value if self.mode == "max" else value < best.value):
            return best
        return Selected(step, value, self.metric, self.mode)
