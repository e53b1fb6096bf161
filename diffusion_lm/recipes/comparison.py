"""Configuration of a comparison: arms that share data, network and budget, and the held-out tasks that score them."""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from diffusion_lm.core.errors import require
from diffusion_lm.data.grain_source import GrainSource
from diffusion_lm.evaluation.compatibility import check_sampler, sampler_differences
from diffusion_lm.evaluation.generation import GenerationTask
from diffusion_lm.evaluation.speed import SpeedStudy
from diffusion_lm.recipes.stage import Stage, stage_graph
from diffusion_lm.samplers.sampler import Sampler

FAMILIES = ("none", "ar", "diffusion")
_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True)
class Arm:
    """One arm of a comparison: a chain of training stages, and the sampler that decodes the trained model.

    Attributes:
      name: key of the arm in result files.
      stage: the last stage of the chain. `{task name: stage}` if each task is fine-tuned separately.
      sampler: the sampler that decodes the completions. `{task name: sampler}` for one per task.
      label: name of the arm in reports; default `name`.
      family: "ar", "diffusion", or "none" (untrained).
      force: if True, a sampler or target window that does not match the training is allowed. The results list the
        differences in `unlike_training`.
    """

    name: str
    stage: Stage | Mapping[str, Stage]
    sampler: Sampler | Mapping[str, Sampler]
    label: str = ""
    family: str = "diffusion"
    force: bool = False

    def __post_init__(self):
        require(
            self.family in FAMILIES,
            f"family={self.family!r}: must be one of {', '.join(FAMILIES)}",
            where=f"Arm.family of '{self.name}'",
        )

    def stage_for(self, task: str) -> Stage:
        """Returns the stage whose parameters are evaluated on `task`."""
        return _per_task(self.stage, task, f"Arm.stage of '{self.name}'")

    def sampler_for(self, task: str) -> Sampler:
        """Returns the sampler that decodes `task`."""
        return _per_task(self.sampler, task, f"Arm.sampler of '{self.name}'")

    def mismatches(self, task: str) -> tuple[str, ...]:
        """Returns a description of each difference between the sampler of `task` and the training of the network."""
        trained = self.stage_for(task).network_stage.run.objective.needs().contracts
        return sampler_differences(trained, self.sampler_for(task))

    def check(self, task: str) -> None:
        """Raises `ConfigError` if the sampler or the target windows do not match the training, unless `force`."""
        if self.force or self.family == "none":
            return
        run = self.stage_for(task).network_stage.run
        check_sampler(
            run.objective.needs().contracts,
            self.sampler_for(task),
            where=f"Arm.sampler of '{self.name}'",
            fix="Use a sampler that matches (diffusion-lm list samplers), or set Arm.force = True to decode anyway.",
        )
        run.check_window()


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A comparison of arms on held-out tasks.

    Attributes:
      name: short name, also the key in result files.
      arms: the arms.
      tasks: the tasks that score every arm. The converter of a task's data sets the target window that is decoded.
      title: headline of the report.
      notes: sentences that the report prints next to the numbers, for what readers need to interpret them.
      bound_limit: number of examples per task for the teacher-forced bound; 0 = no bound.
      resamples: number of bootstrap resamples for each 95% interval.
      speed: the speed study, or None.
      shown: number of examples per task whose completions the report shows.
      seed: seed of the decoding noise and of the bootstrap.
      replicates: number of times that all arms are trained and decoded, each time with different seeds for
        initialisation, data order, noise and decoding. Scores are means over replicates, and intervals include them.
    """

    name: str
    arms: tuple[Arm, ...]
    tasks: tuple[GenerationTask, ...]
    title: str = ""
    notes: tuple[str, ...] = ()
    bound_limit: int = 128
    resamples: int = 1000
    speed: SpeedStudy | None = None
    shown: int = 6
    seed: int = 0
    replicates: int = 1

    def __post_init__(self):
        require(
            isinstance(self.replicates, int) and self.replicates >= 1,
            f"replicates={self.replicates!r}: must be an integer >= 1",
            where="Comparison.replicates",
            fix="Use 1 for a single seed, or 3 to estimate the variance over seeds.",
        )
        for field in ("arms", "tasks", "notes"):
            object.__setattr__(self, field, tuple(getattr(self, field)))
        for field in ("arms", "tasks"):
            names = [item.name for item in getattr(self, field)]
            require(bool(names), f"{field}=(): must not be empty", where=f"Comparison.{field}", fix="Add at least one.")
            repeated = sorted({name for name in names if names.count(name) > 1})
            require(
                not repeated,
                f"several {field} have the same name: {', '.join(repeated)}",
                where=f"Comparison.{field}",
                fix="Use unique names.",
            )
        _check_selection(self)
        for arm in self.arms:
            for task in self.tasks:
                arm.check(task.name)

    @property
    def stages(self) -> tuple[Stage, ...]:
        """All stages of all arms, without duplicates, ancestors first."""
        return stage_graph(arm.stage_for(task.name) for arm in self.arms for task in self.tasks)

    def replicate(self, index: int) -> "Comparison":
        """Returns this comparison with the seeds of replicate `index`; replicate 0 has the configured seeds."""
        if index == 0:
            return self
        shift = index * _SEED_STRIDE

        def reseeded(stage: Stage) -> Stage:
            data = dataclasses.replace(stage.run.data, seed=stage.run.data.seed + shift)
            return Stage(
                name=stage.name,
                run=dataclasses.replace(stage.run, seed=stage.run.seed + shift, data=data),
                initial=reseeded(stage.initial) if isinstance(stage.initial, Stage) else stage.initial,
            )

        arms = tuple(
            dataclasses.replace(
                arm,
                stage={task: reseeded(stage) for task, stage in arm.stage.items()}
                if isinstance(arm.stage, Mapping)
                else reseeded(arm.stage),
            )
            for arm in self.arms
        )
        return dataclasses.replace(self, arms=arms, seed=self.seed + shift)


def _check_selection(comparison: Comparison) -> None:
    """Raises `ConfigError` if a stage selects its checkpoint on data that a task scores: scores must be held-out."""
    scored = {_place(source): task for task in comparison.tasks for source in getattr(task.data, "sources", ())}
    for stage in comparison.stages:
        best = stage.run.checkpoint.best
        if best is None:
            continue
        evaluation: Any = best.evaluation(stage.run.evaluations)
        data = getattr(evaluation, "task", evaluation)
        for source in getattr(getattr(data, "data", None), "sources", ()):
            task = scored.get(_place(source))
            require(
                task is None,
                f"stage '{stage.name}' selects its checkpoint by {best.metric} on {source.task}/{source.split}, "
                f"which the task '{task and task.name}' scores",
                where="CheckpointPolicy.best",
                fix="Select on another split that no task of the comparison scores.",
            )


def _place(source: GrainSource) -> tuple[str, str, str]:
    return source.task, source.split, str(source.folder)


_SEED_STRIDE = 1000
"""Difference between the seeds of two replicates; larger than any difference between seeds within a recipe."""


def _per_task(value: _T | Mapping[str, _T], task: str, where: str) -> _T:
    if not isinstance(value, Mapping):
        return value
    require(task in value, f"no entry for task '{task}'", where=where, fix="Add an entry for this task.")
    return value[task]
