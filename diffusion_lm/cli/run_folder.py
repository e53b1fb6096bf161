"""Opens a run directory of `train`, `compare` or `import`: its configuration, checkpoint and evaluations."""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from diffusion_lm.architectures.base import BoundModel
from diffusion_lm.cli import config
from diffusion_lm.cli.arguments import RESOLVED, build_root
from diffusion_lm.cli.search_path import split_search_path
from diffusion_lm.core.errors import ConfigError
from diffusion_lm.core.files import as_path
from diffusion_lm.evaluation.compatibility import check_sampler, sampler_differences
from diffusion_lm.evaluation.generation import GenerationEvaluation
from diffusion_lm.evaluation.likelihood import BoundEvaluation
from diffusion_lm.noise.contract import Contract
from diffusion_lm.recipes.comparison import Comparison
from diffusion_lm.samplers.sampler import Sampler
from diffusion_lm.training.checkpoint import chosen_step, finished_steps, selected
from diffusion_lm.training.hooks import Evaluation
from diffusion_lm.training.run import TrainRun
from diffusion_lm.training.selection import Selected
from diffusion_lm.training.trained import trained_model


@dataclasses.dataclass(frozen=True)
class OpenRun:
    """A run directory.

    Attributes:
      folder: its path.
      run: the training configuration.
      evaluations: the evaluations of the run, or those of the comparison that it is a stage of.
      step: step of the checkpoint to use.
      trained: noise processes that the network was trained for; empty if unknown.
      lineage: what the parameters were initialised from: earlier stages of the comparison, or `TrainRun.initial`.
      selected: the metric that selected the checkpoint; None if `--step` names it or it is the newest.
    """

    folder: Path
    run: TrainRun
    evaluations: tuple[Evaluation, ...]
    step: int
    trained: tuple[Contract, ...] = ()
    lineage: tuple[str, ...] = ()
    selected: Selected | None = None

    def load(self) -> BoundModel:
        """Returns the model with its parameters on the mesh of the run."""
        return trained_model(self.run, self.folder, step=self.step)

    def mismatches(self, sampler: Sampler | None, *, force: bool) -> tuple[str, ...]:
        """Returns descriptions of how a sampler differs from the training (noise, visibility, alignment, outputs).

        Raises:
          ConfigError: there is a difference, and `force` is False.
        """
        if not force:
            check_sampler(
                self.trained,
                sampler,
                where=f"--workdir {self.folder}",
                fix="Choose a matching sampler with --sampler (diffusion-lm list samplers), or pass --force to decode "
                "anyway; results then list the differences.",
            )
        return sampler_differences(self.trained, sampler)

    @property
    def generation(self) -> tuple[GenerationEvaluation, ...]:
        """The evaluations that decode completions."""
        return tuple(one for one in self.evaluations if isinstance(one, GenerationEvaluation))


def open_run(arguments: argparse.Namespace, *, bindings: Sequence[str]) -> OpenRun:
    """Returns the run of `--workdir`, configured by `--gin_file` or by default by its resolved.gin.

    Raises:
      ConfigError: the directory has no configuration or no checkpoint.
    """
    folder = as_path(arguments.workdir)
    files = arguments.gin_file or [str(_resolved_file(folder))]
    root = build_root(config.load(files, bindings, split_search_path(arguments.gin_search_path)))
    steps = finished_steps(folder)
    if not steps or arguments.step not in (None, *steps):
        which = f" of step {arguments.step}" if steps else ""
        raise ConfigError(
            f"no checkpoint{which} in {folder}",
            where="--step" if steps else "--workdir",
            fix=f"Use one of {', '.join(map(str, steps))}." if steps else "Train first, or pass another run directory.",
        )
    if arguments.step is None:
        step, best = chosen_step(folder), selected(folder)
    else:
        step, best = arguments.step, None
    assert step is not None, "there are checkpoints"
    if isinstance(root, Comparison):
        return dataclasses.replace(_stage(root, folder, step), selected=best)
    lineage = () if root.initial is None else (root.initial,)
    return OpenRun(folder, root, root.evaluations, step, root.objective.needs().contracts, lineage, best)


def _resolved_file(folder: Path) -> Path:
    if (folder / "comparison.json").exists():
        stages = sorted(path.name for path in (folder / "stages").glob("*"))
        raise ConfigError(
            f"{folder} is a comparison of several runs",
            where="--workdir",
            fix=f"Pass one of its runs: {folder}/stages/NAME with NAME one of {', '.join(stages)}.",
        )
    # A stage of a comparison (WORKDIR/stages/STAGE) uses the configuration of the comparison.
    for candidate in (folder / RESOLVED, folder.parent.parent / RESOLVED):
        if candidate.is_file():
            return candidate
    raise ConfigError(
        f"{folder} is not a run directory: it has no {RESOLVED}",
        where="--workdir",
        fix="Pass a directory that train or compare wrote, or add --gin_file.",
    )


def _stage(comparison: Comparison, folder: Path, step: int) -> OpenRun:
    """Returns a stage of a comparison, with the evaluations of the arms whose last stage it is."""
    stages = {stage.name: stage for stage in comparison.stages}
    if folder.name not in stages:
        raise ConfigError(
            f"comparison {comparison.name!r} has no stage {folder.name!r}",
            where="--workdir",
            fix=f"Its stages are {', '.join(stages)}.",
        )
    run, path = stages[folder.name].run, stages[folder.name].path
    network = stages[folder.name].network_stage.run
    given = (path[0].initial,) if isinstance(path[0].initial, str) else ()
    evaluations: list[Evaluation] = []
    for arm in comparison.arms:
        for task in comparison.tasks:
            if arm.stage_for(task.name).name != folder.name:
                continue
            evaluations.append(GenerationEvaluation(task, arm.sampler_for(task.name), seed=comparison.seed))
            if comparison.bound_limit:
                evaluations.append(
                    BoundEvaluation(
                        # Lay out the examples as in the training of the network.
                        data=dataclasses.replace(task.data, converter=network.data.converter),
                        objective=network.objective,
                        name=f"bound/{task.name}",
                        limit=comparison.bound_limit,
                        batch_size=task.batch_size,
                        seed=comparison.seed,
                    )
                )
    trained = network.objective.needs().contracts
    return OpenRun(folder, run, tuple(evaluations), step, trained, (*given, *(stage.name for stage in path[:-1])))
