"""The training loop. `train` reads as one screen; what each part does is in the module it comes from."""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path, PurePath
from typing import Any

import jax
import numpy as np

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
from diffusion_lm.training.checkpoint import Checkpointer, Progress, restore_params
from diffusion_lm.training.hooks import Adjusting, Log, Preempted, Preemption, evaluation_due
from diffusion_lm.training.profile import Profile
from diffusion_lm.training.program import run_program
from diffusion_lm.training.run import TrainRun
from diffusion_lm.training.state import TrainState
from diffusion_lm.training.step import Program
from diffusion_lm.training.transfer import TransferReport, transfer


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """What a finished run leaves.

    Attributes:
      params: the final parameters; the moving average where the run keeps one.
      step: updates made, equal to `TrainRun.steps`.
      metrics: the last row of the log without times, and every evaluation's last values as `name/value`.
      report: how the initial parameters were taken over, if this call took any over; else None.
    """

    params: Params
    step: int
    metrics: dict[str, float]
    report: TransferReport | None = None


def train(
    run: TrainRun,
    workdir: str | Path,
    init_params: Params | str | Path | Callable[[], Params | str | Path | None] | None = None,
) -> TrainResult:
    """Trains, or goes on training, or finds the run finished and returns at once without compiling anything.

    Args:
      run: what to train.
      workdir: the run folder.
      init_params: what to start from, instead of `run.initial`: parameters in the vocabulary of the run's data, or the
        folder of a run or checkpoint; a function that returns one of them is only called if they are needed.

    Raises:
      ConfigError: the run does not fit its data, its devices or its folder, or its loss is no longer finite.
      Preempted: SIGTERM came; the state is saved and the process exits with `hooks.RESTART_EXIT_CODE`.
    """
    run.validate()
    workdir = as_path(workdir)
    claim_folder(workdir, run.identity(), xla_options=xla_options(run.xla_options, jax.default_backend()))
    pruned = getattr(run.data, "pruned", None)
    if pruned is not None and jax.process_index() == 0:
        pruned.save(workdir)
    program = run_program(run)
    with Checkpointer(workdir, run.checkpoint) as checkpoints:
        if _is_finished(run, checkpoints, workdir):
            params = restore_params(workdir, step=run.steps, like=program.abstract_state.params)
            return TrainResult(params, run.steps, final_metrics(workdir, run.steps))
        state, start, report = _start(run, program, checkpoints, init_params)
        adjustments = start.adjustments
        program = run_program(_adjusted(run, adjustments))
        resumed, root = checkpoints.latest_step, jax.random.key(run.seed)
        with (
            _log(run, workdir, start, resumed) as log,
            _batches(run, start.step) as batches,
            Preemption() as preemption,
            Profile(workdir, run.profile) as profile,
        ):
            for note in (getattr(run.data, "vocabulary_note", None), report):
                if note is not None:
                    log.note(str(note))
            # DO NOT CHANGE THE ORDER: what happens at `step` sees the state after `step` updates and before batch
            # number `step` is taken, so a checkpoint of `step` means "go on with batch number `step`".
            for step in range(start.step, run.steps + 1):
                stop = preemption.reached(step)
                profile.before(step, state)
                evaluated, found = _evaluate(run, program, state, step, log, stop, start.evaluated and step == resumed)
                if found:
                    adjustments = adjustments | found
                    program = run_program(_adjusted(run, adjustments))
                if step != resumed and (step == run.steps or stop or checkpoints.due(step)):
                    _save(run, state, step, log, evaluated, adjustments, checkpoints)
                if stop and step < run.steps:
                    checkpoints.wait()
                    raise Preempted(step)
                if step < run.steps:
                    with log.waiting():
                        batch = place_batch(next(batches), run.rules, program.mesh)
                    rate = np.float32(run.optimizer.schedule.value(step, run.steps))
                    with jax.profiler.StepTraceAnnotation("train", step_num=step):
                        state, stats = program.step(state, batch, root, rate)
                    log.push(step + 1, stats)
    return TrainResult(state.final_params, run.steps, final_metrics(workdir, run.steps), report)


def final_metrics(workdir: str | Path, step: int) -> dict[str, float]:
    """Returns the last training row of a run's log without times, and each evaluation of `step` as `name/value`."""
    found: dict[str, float] = {}
    for row in writers.read_rows(as_path(workdir) / "metrics.jsonl"):
        if row["kind"] == "train" or row["step"] == step:
            found |= {key: value for key, value in row.items() if key not in ("step", "kind", "timing")}
    return found


def _is_finished(run: TrainRun, checkpoints: Checkpointer, workdir: Path) -> bool:
    latest = checkpoints.latest_step
    if latest is not None and latest > run.steps:
        raise ConfigError(
            f"{workdir} has been trained for {latest} steps, more than the {run.steps} of this run",
            where="TrainRun.steps",
            fix="Choose another --workdir, or more steps.",
        )
    return latest == run.steps


def _start(
    run: TrainRun, program: Program, checkpoints: Checkpointer, init_params: Any
) -> tuple[TrainState, Progress, TransferReport | None]:
    """Returns the state to go on from: the newest checkpoint, given parameters, or a fresh initialisation."""
    if checkpoints.latest_step is not None:
        return *checkpoints.restore(program.abstract_state), None
    key, fresh = StreamKeys.create(run.seed).key("init"), Progress(seed=run.seed)
    source = init_params() if callable(init_params) else init_params
    rows, source = None, run.initial if source is None else source
    if isinstance(source, str | PurePath):
        folder = as_path(source)
        rows = _vocabulary_rows(run, folder)
        source = restore_params(folder, like=program.abstract_state.params)
    state = program.init(key)
    if source is None:
        return state, fresh, None
    params, report = transfer(source, state.params, run.model.logical_axes(), rows)
    return program.adopt(params), fresh, report


def _vocabulary_rows(run: TrainRun, folder: str | Path) -> np.ndarray | None:
    """Returns where the tokens of the run's data stand in the vocabulary of another run; None where both are one."""
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
        f"{folder} was trained with a part of another vocabulary than that of the data",
        where="DataPipeline.vocabulary_map",
        fix="Use data of the vocabulary that it was trained with.",
    )
    return None if tuple(stored["kept"]) == pruned.kept else vocabulary_rows(stored["kept"], pruned.kept)


def _batches(run: TrainRun, position: int) -> BatchIterator:
    return run.data.iterator(
        run.batch_size, position=position, process_index=jax.process_index(), process_count=jax.process_count()
    )


def _log(run: TrainRun, workdir: Path, start: Progress, resumed: int | None) -> Log:
    def keep(row: writers.Row) -> bool:
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
    )


def _adjusted(run: TrainRun, adjustments: dict[str, dict[str, float]]) -> TrainRun:
    """Returns the run with the objective that its evaluations have set."""
    objective = run.objective
    for evaluation in run.evaluations:
        if isinstance(evaluation, Adjusting) and evaluation.name in adjustments:
            objective = evaluation.adjusted(objective, adjustments[evaluation.name])
    return run if objective is run.objective else dataclasses.replace(run, objective=objective)


def _evaluate(
    run: TrainRun, program: Program, state: TrainState, step: int, log: Log, stop: bool, done: bool
) -> tuple[bool, dict[str, dict[str, float]]]:
    """Runs the evaluations that are due at `step` and returns whether none is left to do, and new adjustments.

    A preempted run has no time for them: they are left to the run that continues it.
    """
    due = [evaluation for evaluation in run.evaluations if evaluation_due(evaluation, step, run.steps)]
    adjustments: dict[str, dict[str, float]] = {}
    if done or not due:
        return True, adjustments
    if stop and step < run.steps:
        return False, adjustments
    log.drain()
    model = BoundModel(run.model, state.final_params, Placement(program.mesh, run.rules))
    with log.pause():
        for evaluation in due:
            start = time.perf_counter()
            values = {name: float(value) for name, value in evaluation.run(model, step).items()}
            log.evaluation(evaluation.name, step, values, time.perf_counter() - start)
            # What runs only because the run ends here would not have run in a longer one, which must be the same run.
            if isinstance(evaluation, Adjusting) and evaluation.every > 0 and step % evaluation.every == 0:
                adjustments[evaluation.name] = values
    return True, adjustments


def _save(
    run: TrainRun,
    state: TrainState,
    step: int,
    log: Log,
    evaluated: bool,
    adjustments: dict[str, dict[str, float]],
    checkpoints: Checkpointer,
) -> None:
    log.drain()
    with log.pause(saving=True):
        log.flush()
        checkpoints.save(state, Progress(step, run.seed, evaluated, log.window, adjustments))
