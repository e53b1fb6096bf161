"""A stage is one training run and the source of its initial parameters. An arm of a comparison is a chain of stages."""

import dataclasses
import re
from collections.abc import Iterable, Mapping

from diffusion_lm.core.errors import ConfigError, require
from diffusion_lm.training.run import TrainRun


@dataclasses.dataclass(frozen=True)
class Stage:
    """One training run of a comparison.

    Attributes:
      name: name of the run directory in `WORKDIR/stages`. Stages with the same name must be equal.
      run: the training run; `run.steps` may be 0 for an untrained network.
      initial: source of the initial parameters: a stage (its final parameters, or their EMA if the run keeps one), the
        path of a checkpoint, or None for random initialisation from `run.seed`. Optimizer state is never copied.
    """

    name: str
    run: TrainRun
    initial: "Stage | str | None" = None

    def __post_init__(self):
        require(
            re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.\-]*", self.name) is not None,
            f"name={self.name!r}: not a valid directory name",
            where="Stage.name",
            fix="Use letters, digits, '_', '-' and '.'; start with a letter or digit.",
        )

    @property
    def path(self) -> tuple["Stage", ...]:
        """All stages from the first to this one."""
        before = self.initial.path if isinstance(self.initial, Stage) else ()
        return (*before, self)

    @property
    def network_stage(self) -> "Stage":
        """The last stage of the path that trains the network, as opposed to a head on a frozen network."""
        return next((one for one in reversed(self.path) if one.run.objective.needs().contracts), self)

    @property
    def train_tokens(self) -> int:
        """Number of token slots in this stage's training: steps x batch size x slots of both streams, with padding."""
        slots = self.run.data.row_length + (self.run.data.encoder_length or 0)
        return self.run.steps * self.run.batch_size * slots


def per_task(arm: str, runs: Mapping[str, TrainRun], initial: Stage | str | None = None) -> dict[str, Stage]:
    """Returns one fine-tuning stage per task for `Arm.stage`, all from the same initial parameters.

    Args:
      arm: name of the arm; the stages are called `tune_TASK_ARM`.
      runs: the training run of each task.
      initial: see `Stage.initial`.
    """
    return {task: Stage(f"tune_{task}_{arm}", run, initial) for task, run in runs.items()}


def stage_graph(finals: Iterable[Stage]) -> tuple[Stage, ...]:
    """Returns the given stages and all their ancestors, without duplicates, ancestors first.

    Raises:
      ConfigError: two different stages have the same name.
    """
    ordered: dict[str, Stage] = {}
    for final in finals:
        for stage in final.path:
            other = ordered.setdefault(stage.name, stage)
            if other != stage:
                raise ConfigError(
                    f"two different stages have the name '{stage.name}'",
                    where="Stage.name",
                    fix=f"They differ in {', '.join(_differences(other, stage))}; use different names.",
                )
    return tuple(ordered.values())


def _differences(a: Stage, b: Stage) -> list[str]:
    names = [f"run.{f.name}" for f in dataclasses.fields(TrainRun) if getattr(a.run, f.name) != getattr(b.run, f.name)]
    return [*names, *(["initial"] if a.initial != b.initial else [])]
