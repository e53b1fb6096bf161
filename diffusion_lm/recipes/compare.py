"""Runs a comparison: stages, evaluations, speed study, results, report.

All state is in the run directory. Every stage, every scored task and the speed study is written atomically to its own
file. An interrupted comparison therefore resumes where it stopped and gives the same numbers:

    WORKDIR/comparison.json                 fingerprint of the configuration; another configuration is an error
    WORKDIR/stages/STAGE/                   one training run per stage (checkpoints, metrics.jsonl, run_card.json)
    WORKDIR/evaluations/ARM/TASK.json       predictions and per-example statistics
    WORKDIR/speed.json  playback.json       decoding times and recorded denoising steps; not part of results.json
    WORKDIR/samples.json                    the completions that the report shows
    WORKDIR/replicate_I/                    stages and evaluations of replicate I = 1, 2, ...; replicate 0 is above
    WORKDIR/results.json  results.md  report/index.html
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_lm.core.errors import ConfigError
from diffusion_lm.core.files import as_path, read_json, write_json, write_text
from diffusion_lm.core.memory_maps import free_programs
from diffusion_lm.core.types import Params
from diffusion_lm.data.iterator import DataPipeline
from diffusion_lm.data.target_window import TargetWindow
from diffusion_lm.evaluation import generation, likelihood
from diffusion_lm.evaluation.generation import GenerationTask
from diffusion_lm.evaluation.speed import measure
from diffusion_lm.recipes import report, summary, tables
from diffusion_lm.recipes.comparison import Arm, Comparison
from diffusion_lm.recipes.playback import record_playback
from diffusion_lm.recipes.records import Evaluation, JsonObject, Playback, Results, Speed
from diffusion_lm.recipes.results import Evaluations, assemble, cuts, shown_samples
from diffusion_lm.recipes.stage import Stage
from diffusion_lm.training.checkpoint import selected
from diffusion_lm.training.loop import train
from diffusion_lm.training.run import fingerprint
from diffusion_lm.training.trained import trained_model

Log = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class ComparisonResult:
    """The results of a finished comparison and the paths of its outputs.

    Attributes:
      results: content of `results.json`.
      report: path of the HTML report.
      table: path of the Markdown table.
    """

    results: Results
    report: Path
    table: Path


def compare(comparison: Comparison, workdir: str | Path, *, log: Log = print) -> ComparisonResult:
    """Runs the parts of `comparison` that `workdir` does not have yet, and writes results and report.

    Raises:
      ConfigError: `workdir` belongs to another comparison.
    """
    workdir = as_path(workdir)
    _check_workdir(comparison, workdir)
    for sentence in summary.cut_sentences({"cuts": cuts(comparison)}):
        log(f"warning: {sentence}")
    replicates = [_run_replicate(comparison, index, workdir, log) for index in range(comparison.replicates)]
    timing = _cached(workdir / "speed.json", lambda: _speed(comparison, log)) if comparison.speed else None
    _cached(workdir / "playback.json", lambda: _playback(comparison, workdir, log))
    results = assemble(comparison, replicates)
    write_json(workdir / "results.json", results)
    write_text(workdir / "results.md", tables.markdown(results, timing))
    write_json(workdir / "samples.json", shown_samples(comparison, replicates[0]))
    return ComparisonResult(results, report.from_folder(workdir), workdir / "results.md")


def _run_replicate(comparison: Comparison, index: int, workdir: Path, log: Log) -> Evaluations:
    """Trains and scores all arms under the seeds of replicate `index`."""
    replicate = comparison.replicate(index)
    if index:
        workdir = workdir / f"replicate_{index}"
    if comparison.replicates > 1:
        log(f"replicate {index + 1}/{comparison.replicates}")
    stages = replicate.stages
    for number, stage in enumerate(stages, 1):
        log(f"stage {number}/{len(stages)}  {stage.name}  ({stage.run.steps:,} steps)")
        run_stage(stage, workdir)
    return {
        (arm.name, task.name): _evaluate(replicate, arm, task, workdir, log)
        for arm in replicate.arms
        for task in replicate.tasks
    }


def stage_folder(stage: Stage, workdir: Path) -> Path:
    """Returns the run directory of a stage."""
    return workdir / "stages" / stage.name


def run_stage(stage: Stage, workdir: Path) -> Params:
    """Trains a stage unless it is finished, and returns its final parameters. Its ancestors must be finished."""
    free_programs()
    initial = stage_folder(stage.initial, workdir) if isinstance(stage.initial, Stage) else stage.initial
    return train(stage.run, stage_folder(stage, workdir), init_params=initial).params


def _check_workdir(comparison: Comparison, workdir: Path) -> None:
    """Writes `comparison.json`, or raises `ConfigError` if `workdir` belongs to another configuration."""
    card = {"name": comparison.name, "fingerprint": fingerprint(comparison)}
    path = workdir / "comparison.json"
    if path.exists() and read_json(path) != card:
        raise ConfigError(
            f"{workdir} contains a comparison with another configuration",
            where=f"{path}: {read_json(path)['name']}, fingerprint {read_json(path)['fingerprint'][:12]}",
            fix="Choose another --workdir, or delete the directory if its results are not needed.",
        )
    write_json(path, card)


def _evaluate(comparison: Comparison, arm: Arm, task: GenerationTask, workdir: Path, log: Log) -> Evaluation:
    def run() -> Evaluation:
        # Each arm compiles its own programs; those of the previous arm are not needed any more.
        free_programs()
        log(f"evaluate  {arm.name} on {task.name}")
        if getattr(task.data, "vocabulary_note", None):
            log(str(task.data.vocabulary_note))
        stage, sampler = arm.stage_for(task.name), arm.sampler_for(task.name)
        best = selected(stage_folder(stage, workdir)) if stage.run.checkpoint.best else None
        model = trained_model(stage.run, stage_folder(stage, workdir))
        result = generation.generate(model, sampler, task, seed=comparison.seed)
        value, per_example, secondary = generation.score(task, result)
        bound = None
        if comparison.bound_limit:
            # The stage may train only a length head, whose loss does not bound the likelihood of the text.
            network = stage.network_stage.run
            bound = likelihood.evaluate_bound(
                model,
                network.objective,
                _teacher_forced(task.data, network.data.converter.target_window),
                batch_size=task.batch_size,
                limit=comparison.bound_limit,
                seed=comparison.seed,
            )
        return {
            "value": value,
            "statistics": np.asarray(per_example, np.float64).tolist(),
            "secondary": secondary,
            "bound": bound,
            **({} if best is None else {"selected_step": best.step, "selected_by": best.metric}),
            "forward_passes": float(result.forward_passes.mean()),
            "generated_tokens": float(result.lengths.mean()),
            "predictions": [list(samples) for samples in result.predictions],
            "inputs": [record.inputs_text for record in result.records],
            "references": [record.targets_text for record in result.records],
        }

    return _cached(workdir / "evaluations" / arm.name / f"{task.name}.json", run)


def _teacher_forced(prompts: DataPipeline, window: TargetWindow) -> DataPipeline:
    """Returns a task's data with the target window of the stage's training; the lengths stay those of the task."""
    converter: Any = prompts.converter  # the protocol does not require a dataclass
    return dataclasses.replace(prompts, converter=dataclasses.replace(converter, target_window=window))


def _playback(comparison: Comparison, workdir: Path, log: Log) -> Mapping[str, Playback]:
    """Records the denoising steps of one example per task, decoded by the last diffusion arm."""
    arms = [arm for arm in comparison.arms if arm.family == "diffusion"]
    if not arms:
        return {}
    log("playback")
    played = {}
    for task in comparison.tasks:
        stage = arms[-1].stage_for(task.name)
        model = trained_model(stage.run, stage_folder(stage, workdir))
        frames = record_playback(model, arms[-1].sampler_for(task.name), task, seed=comparison.seed)
        played[task.name] = {"arm": arms[-1].name, **frames}
    return played


def _speed(comparison: Comparison, log: Log) -> Speed:
    log("speed by output length")
    assert comparison.speed is not None
    return measure(comparison.speed, seed=comparison.seed)


def _cached(path: Path, compute: Callable[[], JsonObject]) -> JsonObject:
    if not path.exists():
        write_json(path, compute())
    return read_json(path)
