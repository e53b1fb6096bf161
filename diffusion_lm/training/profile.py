"""A trace of some steps of a run: what the devices did, by the names of the network's parts."""

from pathlib import Path
from typing import Any

import jax

from diffusion_lm.core.errors import require


def check_profile(window: Any, steps: int) -> None:
    """Raises `ConfigError` unless a window is None or (step, number of steps), and begins in a run of `steps` steps."""
    whole = isinstance(window, tuple | list) and all(type(number) is int for number in window)
    require(
        window is None or (whole and len(window) == 2 and window[0] >= 0 and window[1] >= 1),
        f"profile = {window!r} is no step with a number of steps",
        where="TrainRun.profile",
        fix="Give e.g. (100, 5), or None.",
    )
    require(
        window is None or window[0] < steps,
        f"a profile from step {window and window[0]} on would find nothing in a run of {steps} steps",
        where="TrainRun.profile",
        fix="Begin earlier, or give None.",
    )


class Profile:
    """Traces the steps of a window, on every process; a run that stops inside of it keeps what there is."""

    def __init__(self, workdir: Path, window: tuple[int, int] | None):
        """Takes the run folder and `TrainRun.profile`."""
        self._folder, self._tracing = str(workdir / "profile"), False
        self._first, self._end = (-1, -1) if window is None else (window[0], sum(window))

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *error) -> None:
        self._stop()

    def before(self, step: int, state: Any) -> None:
        """Begins or ends the trace; to be called before each step, with the state that it starts from."""
        if self._tracing and step >= self._end:
            jax.block_until_ready(state)  # the devices are behind the host
            self._stop()
        if step == self._first:
            jax.block_until_ready(state)
            jax.profiler.start_trace(self._folder)
            self._tracing = True

    def _stop(self) -> None:
        if self._tracing:
            self._tracing = False
            jax.profiler.stop_trace()
