"""What is compared: arms that share data, network and budget, and the held-out tasks that score all of them alike."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from diffusion_lm.core.errors import require
from diffusion_lm.evaluation.compatibility import check_sampler, sampler_differences
from diffusion_lm.evaluation.generation import GenerationTask
from diffusion_lm.evaluation.speed import SpeedStudy
from diffusion_lm.recipes.stage import Stage, stage_graph
from diffusion_lm.samplers.base import Sampler

FAMILIES = ("none", "ar", "diffusion")


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to get a model: a chain of stages, and the sampler that decodes it.

    Attributes:
      name: key of the arm in result files.
      stage: the last stage of the chain; or one per task, `{task name: stage}`, where tasks are fine-tuned apart.
      sampler: how its completions are decoded; or one per task.
      label: how reports call the arm.
      family: "ar", "diffusion", or "none" (untrained).
      force: decode although the sampler or the target window does not fit the training; the results then say in what
        (`unlike_training`).
    """

    name: str
    stage: Stage | Mapping[str, Stage]
    sampler: Sampler | Mapping[str, Sampler]
    label: str = ""
    family: str = "diffusion"
    force: bool = False

    def __post_init__(self):
        require(self.family in FAMILIES, f"family '{self.family}'", where="Arm.family", fix=f"Use one of {FAMILIES}.")

    def stage_for(self, task: str) -> Stage:
        """Returns the stage whose parameters are evaluated on `task`."""
        return _per_task(self.stage, task, f"Arm.stage of '{self.name}'")

    def sampler_for(self, task: str) -> Sampler:
        """Returns the sampler that decodes `task`."""
        return _per_task(self.sampler, task, f"Arm.sampler of '{self.name}'")

    def mismatches(self, task: str) -> tuple[str, ...]:
        """Returns in words what the sampler of `task` takes otherwise than the training of the network."""
        trained = self.stage_for(task).network_stage.run.objective.needs().contracts
        return sampler_differences(trained, self.sampler_for(task))

    def check(self, task: str) -> None:
        """Raises `ConfigError` where the network, its target windows and the sampler do not belong together."""
        if self.force or self.family == "none":
            return
        run = self.stage_for(task).network_stage.run
        check_sampler(
            run.objective.needs().contracts,
            self.sampler_for(task),
            where=f"Arm.sampler of '{self.name}'",
            fix="Use a sampler for that training (diffusion-lm list samplers); Arm.force = True decodes all the same.",
        )
        run.check_window()


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What is compared.

    Attributes:
      name: short name, also the key in result files.
      arms: the ways to get a model.
      tasks: what they are scored on; the converter of each task's data fixes the window that is decoded.
      title: headline of the report.
      notes: sentences that the report prints beside the numbers: what a reader must know to read them rightly.
      bound_limit: examples per task for the teacher-forced bound; 0 = no bound.
      resamples: bootstrap resamples behind each 95 % interval.
      speed: the speed study, or None.
      shown: examples per task whose completions the report shows side by side.
      seed: root of decoding noise and bootstrap.
      replicates: how often all arms are trained and decoded, each time with other seeds (initialisation, order of the
        data, noise, decoding). Scores are means over the replicates, and intervals cover them too.
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
            f"replicates = {self.replicates!r} is no number of repetitions",
            where="Comparison.replicates",
            fix="Use 1 for one seed, 3 to see how far seeds move the scores.",
        )
        for field in ("arms", "tasks", "notes"):
            object.__setattr__(self, field, tuple(getattr(self, field)))
        for field in ("arms", "tasks"):
            names = [item.name for item in getattr(self, field)]
            require(bool(names), f"a comparison needs {field}", where=f"Comparison.{field}", fix="Give at least one.")
            twice = sorted({name for name in names if names.count(name) > 1})
            require(not twice, f"{field} named twice: {', '.join(twice)}", where=f"Comparison.{field}", fix="Rename.")
        _check_selection(self)
        for arm in self.arms:
            for task in self.tasks:
                arm.check(task.name)

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Every stage of every arm, each once, in an order in which they can run."""
        return stage_graph(arm.stage_for(task.name) for arm in self.arms for task in self.tasks)

    def replicate(self, index: int) -> "Comparison":
        """Returns this comparison under the seeds of its replicate number `index`; number 0 has those it was given."""
        if index == 0:
            return self
        shift = index * _SEED_STRIDE

        def moved(stage: Stage) -> Stage:
            data = dataclasses.replace(stage.run.data, seed=stage.run.data.seed + shift)
            return Stage(
                name=stage.name,
                run=dataclasses.replace(stage.run, seed=stage.run.seed + shift, data=data),
                initial=moved(stage.initial) if isinstance(stage.initial, Stage) else stage.initial,
            )

        arms = tuple(
            dataclasses.replace(
                arm,
                stage={task: moved(stage) for task, stage in arm.stage.items()}
                if isinstance(arm.stage, Mapping)
                else moved(arm.stage),
            )
            for arm in self.arms
        )
        return dataclasses.replace(self, arms=arms, seed=self.seed + shift)


def _check_selection(comparison: Comparison) -> None:
    """Refuses stages that select their checkpoint on data which a task scores: such a score is no held-out result."""
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
                f"{stage.name} selects its checkpoint by {best.metric} on {source.task}/{source.split}, "
                f"which the task '{task and task.name}' scores",
                where="CheckpointPolicy.best",
                fix="Select on another split, which no task of the comparison scores.",
            )


def _place(source: Any) -> tuple[str, str, str]:
    return source.task, source.split, str(source.folder)


_SEED_STRIDE = 1000
"""Between the seeds of two replicates, so that a recipe's own small seeds (adaptation's, say) never meet another's."""


def _per_task(value: Any, task: str, where: str) -> Any:
    if not isinstance(value, Mapping):
        return value
    require(task in value, f"nothing is given for task '{task}'", where=where, fix="Add an entry for it.")
    return value[task]
