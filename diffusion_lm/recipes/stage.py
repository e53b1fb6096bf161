"""A stage: one training run and where its initial parameters come from. Arms of a comparison are chains of stages."""

import dataclasses
import re
from collections.abc import Iterable

from diffusion_lm.core.errors import ConfigError, require
from diffusion_lm.training.run import TrainRun


@dataclasses.dataclass(frozen=True)
class Stage:
    """One training run of a graph of runs.

    Attributes:
      name: folder of the stage below `WORKDIR/stages`; equal names must mean equal stages.
      run: the training run; `run.steps` may be 0 for a network that is left as it was initialised.
      initial: the stage whose final parameters (EMA where the run keeps one) this one starts from; a path of a
        checkpoint; or None for a fresh initialisation from `run.seed`. Optimizer state never carries over.
    """

    name: str
    run: TrainRun
    initial: "Stage | str | None" = None

    def __post_init__(self):
        require(
            re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.\-]*", self.name) is not None,
            f"stage name '{self.name}' cannot be a folder name",
            where="Stage.name",
            fix="Use letters, digits, '_', '-' and '.'.",
        )

    @property
    def path(self) -> tuple["Stage", ...]:
        """All stages from the first to this one: what has to be paid for to get this stage's parameters."""
        before = self.initial.path if isinstance(self.initial, Stage) else ()
        return (*before, self)

    @property
    def network_stage(self) -> "Stage":
        """The last stage of the path that trains the network; heads on a frozen one say nothing about its noise."""
        return next((one for one in reversed(self.path) if one.run.objective.needs().contracts), self)

    @property
    def train_tokens(self) -> int:
        """Token slots that this stage alone trains on (steps x batch x slots of both streams, filler included)."""
        slots = self.run.data.row_length + (self.run.data.encoder_length or 0)
        return self.run.steps * self.run.batch_size * slots


def stage_graph(finals: Iterable[Stage]) -> tuple[Stage, ...]:
    """Returns every stage that the given ones need, each once, ancestors first.

    Raises:
      ConfigError: two different stages have one name.
    """
    ordered: dict[str, Stage] = {}
    for final in finals:
        for stage in final.path:
            known = ordered.setdefault(stage.name, stage)
            if known != stage:
                raise ConfigError(
                    f"two different stages are called '{stage.name}'",
                    where="Stage.name",
                    fix=f"They differ in {', '.join(_differences(known, stage))}; give them names of their own.",
                )
    return tuple(ordered.values())


def _differences(a: Stage, b: Stage) -> list[str]:
    names = [f"run.{f.name}" for f in dataclasses.fields(TrainRun) if getattr(a.run, f.name) != getattr(b.run, f.name)]
    return [*names, *(["initial"] if a.initial != b.initial else [])]
