"""Best-checkpoint selection: a run hands on the checkpoint that a validation metric prefers, not the last one.

The choice so far is part of every checkpoint (`Progress.best`), so a run that was killed anywhere and started again
makes the same one. `CheckpointPolicy.best` configures it; the checkpoint that it names is never deleted.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from diffusion_lm.core.errors import near_names, require
from diffusion_lm.training.card import plain
from diffusion_lm.training.hooks import Evaluation

MODES = ("max", "min")


@dataclasses.dataclass(frozen=True)
class Selected:
    """The checkpoint that a run hands on.

    Attributes:
      step: its number of updates.
      value: the metric there.
      metric: the metric's name in the log.
      mode: "max" or "min": which values are better.
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

    Candidates are the steps at which that evaluation runs: multiples of its `every`, and the last step. Equal values
    select the earlier step; a value that is not finite is never selected. Of a run that keeps a moving average
    (`TrainRun.ema_decay`), that average is what is evaluated, selected and handed on.

    Attributes:
      metric: name of the value in the log, EVALUATION/VALUE, e.g. `decode/qa_validation/f1`.
      mode: "max" or "min".
    """

    metric: str
    mode: str = "max"

    def __post_init__(self):
        require(
            self.mode in MODES,
            f"mode = {self.mode!r} is not a direction",
            where="BestCheckpoint.mode",
            fix=f"Use one of {', '.join(MODES)}.",
        )

    def evaluation(self, evaluations: Sequence[Evaluation]) -> Evaluation:
        """Returns the evaluation that measures the metric.

        Evaluations may say the names of their values (`value_names`); of others the value is checked when it is due.

        Raises:
          ConfigError: none does, or it runs after the last step only.
        """
        found = [one for one in evaluations if self.metric.startswith(f"{one.name}/")]
        # Of `bound` and `bound/qa` the longer name is meant by `bound/qa/loss`.
        evaluation = max(found, key=lambda one: len(one.name), default=None)
        known = [f"{one.name}/{name}" for one in evaluations for name in getattr(one, "value_names", ("...",))]
        names = None if evaluation is None else getattr(evaluation, "value_names", None)
        require(
            evaluation is not None and (names is None or self.metric.removeprefix(f"{evaluation.name}/") in names),
            f"no evaluation of the run measures {self.metric!r}{near_names(self.metric, known)}",
            where="BestCheckpoint.metric",
            fix=f"Use one of {', '.join(known)}." if known else "Add the evaluation to TrainRun.evaluations.",
        )
        assert evaluation is not None
        require(
            evaluation.every > 0,
            f"{self.metric!r} is measured after the last step only, which leaves nothing to choose from",
            where="BestCheckpoint.metric",
            fix="Set the evaluation's `every` to a number of steps.",
        )
        return evaluation

    def identity(self, evaluations: Sequence[Evaluation]) -> dict[str, Any]:
        """Returns plain data that determines the choice: the metric, and how and when it is measured."""
        evaluation: Any = self.evaluation(evaluations)
        how = evaluation.identity if hasattr(evaluation, "identity") else plain(evaluation)
        return {**plain(self), "evaluation": how, "every": evaluation.every}

    def update(self, best: Selected | None, step: int, values: Mapping[str, float]) -> Selected | None:
        """Returns the choice after `step`, given the one before it.

        Args:
          best: the choice so far.
          step: updates made.
          values: what was measured at `step`, by the names of the log; may be empty.

        Raises:
          ConfigError: the evaluation ran and did not measure the metric.
        """
        if self.metric not in values:
            there = [name for name in values if name.rpartition("/")[0] == self.metric.rpartition("/")[0]]
            require(
                not there,
                f"the evaluation measured no {self.metric!r}{near_names(self.metric, there)}",
                where="BestCheckpoint.metric",
                fix=f"Use one of {', '.join(there)}.",
            )
            return best
        value = values[self.metric]
        if not math.isfinite(value):
            return best
        # Strictly better: equal values select the earlier step.
        if best is not None and not (value > best.value if self.mode == "max" else value < best.value):
            return best
        return Selected(step, value, self.metric, self.mode)
