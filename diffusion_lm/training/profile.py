"""A profiler trace of some steps of a run."""

from pathlib import Path

import jax

from diffusion_lm.core.errors import ConfigError, require
from diffusion_lm.training.state import TrainState


def check_profile(window: tuple[int, int] | None, steps: int) -> None:
    """Raises `ConfigError` unless `window` is None, or (first step, number of steps) in a run of `steps` steps."""
    if window is None:
        return
    integers = isinstance(window, tuple | list) and all(type(number) is int for number in window)
    if not integers or len(window) != 2 or window[0] < 0 or window[1] < 1:
        raise ConfigError(
            f"profile={window!r}: must be a step and a number of steps",
            where="TrainRun.profile",
            fix="Use e.g. (100, 5), or None.",
        )
    require(
        window[0] < steps,
        f"profile={window!r}: begins after the last of {steps} steps",
        where="TrainRun.profile",
        fix="Use an earlier step, or None.",
    )


class Profile:
    """Traces the steps of a window on every process; if the run stops inside the window, the trace ends there."""

    def __init__(self, workdir: Path, window: tuple[int, int] | None):
        """Takes the run directory and `TrainRun.profile`."""
        self._folder, self._tracing = str(workdir / "profile"), False
        self._first, self._end = (-1, -1) if window is None else (window[0], sum(window))

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *error) -> None:
        self._stop()

    def before(self, step: int, state: TrainState) -> None:
        """Starts or stops the trace; must be called before each step, with the state before that step."""
        if self._tracing and step >= self._end:
            jax.block_until_ready(state)  # the devices may still run the last traced step
            self._stop()
        # Started when the devices are idle, so that the trace has no part of earlier steps.
        if step == self._first:
            jax.block_until_ready(state)
            jax.profiler.start_trace(self._folder)
            self._tracing = True

    def _stop(self) -> None:
        if self._tracing:
            self._tracing = False
            jax.profiler.stop_trace()
