"""The training loop. `train` is one screen of code; its parts are in the other modules of this package."""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path, PurePath
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from diffusion_lm.architectures.base import BoundModel
from diffusion_lm.architectures.surgery import vocabulary_rows
from diffusion_lm.core.errors import ConfigError, require
from diffusion_lm.core.files import as_path
from diffusion_lm.core.rng import StreamKeys
from diffusion_lm.core.types import Params
from diffusion_lm.data.iterator import BatchIterator
from diffusion_lm.data.vocabulary_map import read_map
from diffusion_lm.parallel.shardings import Placement, place_batch
from diffusion_lm.parallel.xla_options import xla_options
from diffusion_lm.training import metrics, writers
from diffusion_lm.training.card import claim_folder
from diffusion_lm.training.checkpoint import Checkpointer, Progress, restore_params, selected
from diffusion_lm.training.finite import require_finite
from diffusion_lm.training.hooks import Adjusting, Log, Preempted, Preemption, evaluation_due
from diffusion_lm.training.imported import check_mask
from diffusion_lm.training.profile import Profile
from diffusion_lm.training.run import TrainRun
from diffusion_lm.training.selection import Selected
from diffusion_lm.training.state import TrainState
from diffusion_lm.training.step import TrainStep
from diffusion_lm.training.transfer import TransferReport, transfer

Source = Params | str | Path | None
InitialParams = Source | Callable[[], Source]
"""Parameters, the directory of a run or checkpoint, or a function that returns one of them."""


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """The result of a finished run.

    Attributes:
      params: the final parameters, or those of the selected checkpoint; the moving average if the run has one.
      step: number of updates, equal to `TrainRun.steps`.
      metrics: the last row of the log without times, and every evaluation's last values as `name/value`.
      report: how initial parameters were transferred, if this call did that; else None.
      selected: the checkpoint that `CheckpointPolicy.best` selected; None if the run returns the last one.
    """

    params: Params
    step: int
    metrics: dict[str, float]
    report: TransferReport | None = None
    selected: Selected | None = None


def train(
    run: TrainRun,
    workdir: str | Path,
    init_params: InitialParams = None,
) -> TrainResult:
    """Starts or resumes a run; returns immediately, without compiling anything, if it is finished.

    Args:
      run: the run.
      workdir: the run directory.
      init_params: overrides `run.initial`: parameters in the vocabulary of the run's data, or the directory of a run or
        checkpoint; or a function that returns one of these, which is called only if they are needed.

    Raises:
      ConfigError: the run does not fit its data, devices or directory, or its loss or parameters are not finite.
      Preempted: SIGTERM was received; the state is saved, and the process exits with `hooks.RESTART_EXIT_CODE`.
    """
    run.validate()
    workdir = as_path(workdir)
    cut = run.cuts()
    claim_folder(workdir, run.identity(), xla_options=xla_options(run.xla_options, jax.default_backend()), cuts=cut)
    pruned = getattr(run.data, "pruned", None)
    # The directory must name the tokens of its rows before there are checkpoints.
    if pruned is not None and jax.process_index() == 0:
        pruned.save(workdir)
    train_step = run.train_step()
    with Checkpointer(workdir, run.checkpoint) as checkpoints:
        if _is_finished(run, checkpoints, workdir):
            return _result(run, workdir, train_step)
        state, start, report = _start(run, train_step, checkpoints, init_params)
        best, adjustments = start.best, start.adjustments
        train_step = _adjusted(run, adjustments).train_step()
        resumed, root = checkpoints.latest_step, jax.random.key(run.seed)
        with (
            _log(run, workdir, start, resumed) as log,
            _batches(run, start.step) as batches,
            Preemption() as preemption,
            Profile(workdir, run.profile) as profile,
        ):
            for note in (getattr(run.data, "vocabulary_note", None), report, *map(cut_sentence, cut)):
                if note is not None:
                    log.note(str(note))
            # DO NOT CHANGE THE ORDER: everything at `step` uses the state after `step` updates, before batch number
            # `step` is consumed. So a checkpoint of `step` resumes with batch number `step`.
            for step in range(start.step, run.steps + 1):
                stop = preemption.reached(step)
                profile.before(step, state)
                evaluated, measured = _evaluate(
                    run, train_step, state, step, log, stop, start.evaluated and step == resumed
                )
                if found := _adjustments(run, step, measured):
                    adjustments = adjustments | found
                    train_step = _adjusted(run, adjustments).train_step()
                best = _best(run, best, step, measured)
                better = best is not None and best.step == step
                # The checkpoint that the run resumed from is on disk already.
                if step != resumed and (step == run.steps or stop or better or checkpoints.due(step)):
                    log.drain()  # so that the saved log window has all updates up to this step
                    progress = Progress(step, run.seed, evaluated, log.window, best, adjustments)
                    _save(state, progress, log, checkpoints)
                if stop and step < run.steps:
                    checkpoints.wait()
                    raise Preempted(step)
                if step < run.steps:
                    with log.waiting():
                        batch = place_batch(next(batches), run.rules, train_step.mesh)
                    # Computed on the host, so that no schedule is compiled into the step.
                    rate = np.float32(run.optimizer.schedule.value(step, run.steps))
                    with jax.profiler.StepTraceAnnotation("train", step_num=step):
                        state, stats = train_step(state, batch, root, rate)
                    log.push(step + 1, stats)
    return _result(run, workdir, train_step, state, report)


def cut_sentence(cut: Mapping[str, Any]) -> str:
    """Returns one entry of `TrainRun.cuts` as a line of the log."""
    return f"{cut['used_by']}  {cut['text']}"


def final_metrics(workdir: str | Path, step: int) -> dict[str, float]:
    """Returns the last training row of a run's log without times, and each evaluation of `step` as `name/value`."""
    found: dict[str, float] = {}
    for row in writers.read_rows(as_path(workdir) / "metrics.jsonl"):
        if row["kind"] == "train" or row["step"] == step:
            # JSON has no NaN: the log has null for values that are not finite.
            values = {key: math.nan if value is None else value for key, value in row.items()}
            found |= {key: value for key, value in values.items() if key not in ("step", "kind", "timing")}
    return found


def _result(
    run: TrainRun,
    workdir: Path,
    train_step: TrainStep,
    state: TrainState | None = None,
    report: TransferReport | None = None,
) -> TrainResult:
    """Returns the result of a finished run: from memory if it is the last state, else from the run directory."""
    selection = run.checkpoint.best
    best = None if selection is None else selected(workdir)
    require(
        best is not None or selection is None,
        f"metric={selection and selection.metric!r}: was never finite, so no checkpoint is selected",
        where="BestCheckpoint.metric",
        fix="Select by another metric; the last checkpoint of the run was saved.",
    )
    step = run.steps if best is None else best.step
    if state is not None and step == run.steps:
        params = state.final_params
    else:
        params = restore_params(workdir, step=step, like=train_step.abstract_state.params)
    return TrainResult(params, run.steps, final_metrics(workdir, run.steps), report, best)


def _is_finished(run: TrainRun, checkpoints: Checkpointer, workdir: Path) -> bool:
    latest = checkpoints.latest_step
    if latest is not None and latest > run.steps:
        raise ConfigError(
            f"steps={run.steps}: the run in {workdir} has already been trained for {latest} steps",
            where="TrainRun.steps",
            fix="Use another --workdir, or more steps.",
        )
    return latest == run.steps


def _start(
    run: TrainRun, train_step: TrainStep, checkpoints: Checkpointer, init_params: InitialParams
) -> tuple[TrainState, Progress, TransferReport | None]:
    """Returns the first state: the newest checkpoint, else given parameters, else a fresh initialisation."""
    if checkpoints.latest_step is not None:
        return *checkpoints.restore(train_step.abstract_state), None
    key, fresh = StreamKeys.create(run.seed).key("init"), Progress(seed=run.seed)
    source = init_params() if callable(init_params) else init_params
    rows, source = None, run.initial if source is None else source
    if isinstance(source, str | PurePath):
        folder = as_path(source)
        rows = _vocabulary_rows(run, folder)
        if rows is None:  # a pruned vocabulary has ids of its own
            check_mask(folder, getattr(run.data, "specials", None))
        source = restore_params(folder, like=train_step.abstract_state.params)
    elif source is not None:
        require_finite(source, "the initial parameters hold", where="init_params", fix="Start from other parameters.")
    # Fresh values remain in every array that the source does not have.
    state = train_step.init(key)
    if source is None:
        return state, fresh, None
    params, report = transfer(source, state.params, run.model.logical_axes(), rows)
    return train_step.adopt(params), fresh, report


def _vocabulary_rows(run: TrainRun, folder: str | Path) -> np.ndarray | None:
    """Returns the rows of the data's tokens in the vocabulary of another run; None if the vocabularies are equal."""
    pruned: Any = getattr(run.data, "pruned", None)
    stored = read_map(folder)
    if pruned is None and stored is None:
        return None
    if stored is None:
        return vocabulary_rows(range(pruned.full.size), pruned.kept)
    if pruned is None:
        return vocabulary_rows(stored["kept"], range(stored["full_size"]))
    require(
        stored["full_sha256"] == pruned.full.sha256,
        f"the run {folder} was trained with another vocabulary than that of the data",
        where="DataPipeline.vocabulary_map",
        fix="Use data with the vocabulary of that run.",
    )
    return None if tuple(stored["kept"]) == pruned.kept else vocabulary_rows(stored["kept"], pruned.kept)


def _batches(run: TrainRun, position: int) -> BatchIterator:
    return run.data.iterator(
        run.batch_size, position=position, process_index=jax.process_index(), process_count=jax.process_count()
    )


def _log(run: TrainRun, workdir: Path, start: Progress, resumed: int | None) -> Log:
    def keep(row: writers.Row) -> bool:
        # Rows of steps that will run again are dropped, so that the log has each row once.
        if resumed is None or row["step"] > resumed:
            return False
        return row["step"] < resumed or row["kind"] == "train" or start.evaluated

    return Log(
        workdir,
        steps=run.steps,
        batch_size=run.batch_size,
        every=run.log_every,
        learning_rate=lambda step: run.optimizer.schedule.value(step, run.steps),
        flops_per_token=metrics.train_flops_per_token(
            run.model, run.objective, run.data.row_length, run.data.encoder_length
        ),
        peak_flops=metrics.peak_flops(),
        step=start.step,
        window=start.window,
        keep=keep,
        identity=run.identity(),
    )


def _adjusted(run: TrainRun, adjustments: dict[str, dict[str, float]]) -> TrainRun:
    """Returns the run with the objective as adjusted by its evaluations."""
    objective = run.objective
    for evaluation in run.evaluations:
        if isinstance(evaluation, Adjusting) and evaluation.name in adjustments:
            objective = evaluation.adjusted(objective, adjustments[evaluation.name])
    return run if objective is run.objective else dataclasses.replace(run, objective=objective)


def _adjustments(run: TrainRun, step: int, measured: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Returns the values measured at `step` by which the objective is adjusted from this step on."""
    # Not those that run only because this is the last step: a longer run must have the same objective at this step.
    return {
        evaluation.name: measured[evaluation.name]
        for evaluation in run.evaluations
        if isinstance(evaluation, Adjusting)
        and evaluation.name in measured
        and evaluation.every > 0
        and step % evaluation.every == 0
    }


def _best(run: TrainRun, best: Selected | None, step: int, measured: dict[str, dict[str, float]]) -> Selected | None:
    """Returns the selected checkpoint after the evaluations of `step`."""
    selection = run.checkpoint.best
    if selection is None:
        return None
    values = {f"{name}/{metric}": value for name, row in measured.items() for metric, value in row.items()}
    if selection.metric in values and jax.process_count() > 1:
        # A metric that executes programs can time out on a single host, but all hosts must save the same steps.
        value = multihost_utils.broadcast_one_to_all(np.float32(values[selection.metric]))
        values[selection.metric] = float(value)
    return selection.update(best, step, values)


def _evaluate(
    run: TrainRun, train_step: TrainStep, state: TrainState, step: int, log: Log, stop: bool, done: bool
) -> tuple[bool, dict[str, dict[str, float]]]:
    """Runs the evaluations that are due at `step`; returns whether all of them are done, and the values of each.

    A preempted run has no time for evaluations; they run when it resumes.
    """
    due = [evaluation for evaluation in run.evaluations if evaluation_due(evaluation, step, run.steps)]
    measured: dict[str, dict[str, float]] = {}
    if done or not due:
        return True, measured
    if stop and step < run.steps:
        return False, measured
    # The log gets its training row before the rows of the evaluations.
    log.drain()
    _require_finite(state, step)
    model = BoundModel(run.model, state.final_params, Placement(train_step.mesh, run.rules))
    with log.pause():
        for evaluation in due:
            start = time.perf_counter()
            values = {name: float(value) for name, value in evaluation.run(model, step).items()}
            log.evaluation(evaluation.name, step, values, time.perf_counter() - start)
            measured[evaluation.name] = values
    return True, measured


def _save(state: TrainState, progress: Progress, log: Log, checkpoints: Checkpointer) -> None:
    with log.pause(saving=True):
        _require_finite(state, progress.step)
        # The log first: a run that resumes from this checkpoint must find all rows up to it.
        log.flush()
        checkpoints.save(state, progress)


def _require_finite(state: TrainState, step: int) -> None:
    """Raises `ConfigError` if the last update made parameters NaN or Inf; its loss, computed before, was finite."""
    for params in (state.params, state.ema):
        require_finite(
            params,
            f"the network after step {step} holds",
            where="TrainRun.optimizer",
            fix="Lower the learning rate or lengthen its warmup; earlier checkpoints of the run are intact.",
        )
