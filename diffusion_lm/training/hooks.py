"""Code that runs between training steps: the log, the progress line, evaluations, the preemption signal."""

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, Protocol, runtime_checkable

import jax
from jax.experimental import multihost_utils
from rich import progress as rich_progress
from rich.console import Console

from diffusion_lm.architectures.base import BoundModel
from diffusion_lm.objectives.objective import Objective
from diffusion_lm.training.metrics import Clock, MetricWindow, row_summary
from diffusion_lm.training.step import StepStats
from diffusion_lm.training.writers import Row, open_writers

RESTART_EXIT_CODE = 75
"""Exit code of a preempted run (`EX_TEMPFAIL`); the same command resumes it."""


class Preempted(SystemExit):
    """The run received SIGTERM, has saved its state and exits with `RESTART_EXIT_CODE`."""

    def __init__(self, step: int):
        super().__init__(RESTART_EXIT_CODE)
        self.step = step


class Preemption:
    """A context manager that watches for SIGTERM.

    With several processes JAX's preemption service does so instead: a signal to one process is enough, and all of them
    stop at the same step.
    """

    def __init__(self):
        self._signalled = False
        self._previous: Callable[[int, FrameType | None], Any] | int | None = None

    def __enter__(self) -> "Preemption":
        # Python allows signal handlers in the main thread only.
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *error) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)

    def _note(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self._signalled = True

    def reached(self, step: int) -> bool:
        """Returns whether to save and stop before the next step; every process must call this at every step."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._signalled


class Evaluation(Protocol):
    """A measurement during training."""

    @property
    def name(self) -> str:
        """Name in the log; unique in a run."""

    @property
    def every(self) -> int:
        """Period in steps; 0 = only after the last step, when every evaluation runs."""

    def run(self, model: BoundModel, step: int) -> Mapping[str, float]:
        """Returns named values for the parameters after `step` updates."""


@runtime_checkable
class Adjusting(Protocol):
    """An evaluation whose values adjust the objective of the following steps."""

    def adjusted(self, objective: Objective, values: Mapping[str, float]) -> Objective:
        """Returns the adjusted objective; only settings that affect neither shapes nor parameters may change."""


def evaluation_due(evaluation: Evaluation, step: int, steps: int) -> bool:
    """Returns whether an evaluation runs after `step` of `steps` updates."""
    return step == steps or (evaluation.every > 0 and step > 0 and step % evaluation.every == 0)


class Log:
    """Turns step statistics into log rows and a progress line, one step later than the devices.

    The statistics of a step are fetched only after the next step is dispatched, so the devices never wait for the host.

    Args:
      workdir: the run directory.
      steps: number of updates of the whole run.
      batch_size: rows per update.
      every: steps per log row.
      learning_rate: step (from 0) -> learning rate.
      flops_per_token: training FLOPs per token.
      peak_flops: of all devices together, or None.
      step: number of updates before this log opens.
      window: the open window of a restored run.
      keep: whether a row of an earlier part of this run stays in the log.
      identity: the run's configuration as plain data, for writers that display it.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        steps: int,
        batch_size: int,
        every: int,
        learning_rate: Callable[[int], float],
        flops_per_token: float,
        peak_flops: float | None,
        step: int,
        window: MetricWindow,
        keep: Callable[[Row], bool],
        identity: Mapping[str, Any] | None = None,
    ):
        self._steps, self._batch_size, self._every = steps, batch_size, every
        self._learning_rate = learning_rate
        self._flops, self._peak = flops_per_token, peak_flops
        self.window = window
        # All processes have the same statistics; one of them writes.
        primary = jax.process_index() == 0
        self._writers = open_writers(workdir, keep, step, identity) if primary else []
        self._display = _display(steps, step) if primary else _Silent()
        self._clock = Clock(step, window.tokens)
        self._pending: tuple[int, StepStats] | None = None
        self._first = True

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *error) -> None:
        for writer in self._writers:
            writer.close()
        self._display.close()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Measures how long a step waits for its batch."""
        start = time.perf_counter()
        yield
        self._clock.waited(time.perf_counter() - start)

    def push(self, step: int, stats: StepStats) -> None:
        """Stores the statistics of the update that was just dispatched, and fetches those of the previous one."""
        if self._first:  # the first dispatch includes compilation, which must not count for the speed (trap T55)
            self._clock, self._first = Clock(step - 1, self.window.tokens), False
        self.drain()
        self._pending = (step, stats)

    def drain(self) -> None:
        """Fetches pending statistics from the devices and writes the row that they complete."""
        if self._pending is None:
            return
        # Waits for the devices; when `push` calls this, they already run the next step.
        (step, stats), self._pending = self._pending, None
        self.window.add(step, jax.device_get(stats))
        if step % self._every == 0 or step == self._steps:
            row = {
                "step": step,
                "kind": "train",
                "examples": step * self._batch_size,
                "tokens": self.window.tokens,
                # Update number `step`, counted from 1, used the rate of `step` - 1.
                "learning_rate": self._learning_rate(step - 1),
                **self.window.means(),
                "timing": self._clock.read(step, self.window.tokens, self._flops, self._peak),
            }
            self._write(row)
            self._display.show(row)

    def flush(self) -> None:
        """Writes the rows so far to durable storage: a checkpoint must not be newer than its log."""
        for writer in self._writers:
            writer.flush()

    def evaluation(self, name: str, step: int, values: Mapping[str, float], seconds: float) -> None:
        """Writes the row of one evaluation."""
        named = {f"{name}/{key}": value for key, value in values.items()}
        self._write({"step": step, "kind": "evaluation", **named, "timing": {f"{name}/seconds": seconds}})
        shown = list(values.items())[:4]  # the log has all values, the terminal only the first ones
        numbers = "  ".join(f"{key} {value:.4g}" for key, value in shown)
        self._display.note(f"step {step}/{self._steps}  {name}  {numbers}")

    @contextlib.contextmanager
    def pause(self, *, saving: bool = False) -> Iterator[None]:
        """Excludes the time of evaluations and saving from the speed."""
        start = time.perf_counter()
        yield
        self._clock.paused(time.perf_counter() - start, saving=saving)

    def note(self, text: str) -> None:
        """Shows a line above the progress line."""
        self._display.note(text)

    def _write(self, row: Mapping[str, Any]) -> None:
        for writer in self._writers:
            writer.write(row)


class _Silent:
    """The display of processes other than the primary one."""

    def show(self, row: Mapping[str, Any]) -> None:
        """Shows nothing."""

    def note(self, text: str) -> None:
        """Shows nothing."""

    def close(self) -> None:
        """Does nothing."""


class _PlainLines(_Silent):
    """One line per row on stderr, for logs and pipes."""

    def __init__(self, steps: int):
        self._steps = steps

    def show(self, row: Mapping[str, Any]) -> None:
        """Prints the row's line."""
        self.note(row_summary(row, self._steps))

    def note(self, text: str) -> None:
        """Prints a line."""
        print(text, file=sys.stderr, flush=True)


class _Bar(_Silent):
    """A progress bar on a terminal."""

    def __init__(self, steps: int, done: int):
        self._progress = rich_progress.Progress(
            rich_progress.TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
            rich_progress.BarColumn(bar_width=24),
            rich_progress.TextColumn("{task.fields[status]}"),
            console=Console(stderr=True),
        )
        self._steps = steps
        self._task = self._progress.add_task("train", total=steps, completed=done, status="compiling")
        self._progress.start()

    def show(self, row: Mapping[str, Any]) -> None:
        """Moves the bar to the row's step."""
        status = row_summary(row, self._steps).split("  ", 1)[1]
        self._progress.update(self._task, completed=row["step"], status=status)

    def note(self, text: str) -> None:
        """Prints a line above the bar."""
        self._progress.console.print(text, highlight=False, markup=False)

    def close(self) -> None:
        """Stops updating the bar."""
        self._progress.stop()


def _display(steps: int, done: int) -> _Silent:
    return _Bar(steps, done) if sys.stderr.isatty() and steps > done else _PlainLines(steps)
