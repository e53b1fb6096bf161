"""How long the command takes to start: what a user waits for, so each measurement is a process of its own."""

import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from diffusion_lm.bench.children import child_environment
from diffusion_lm.core.errors import ConfigError
from diffusion_lm.evaluation.timing import alternate, timed

COMMAND = (sys.executable, "-m", "diffusion_lm.cli.main")

IMPORT, HELP, COLD, WARM = "import diffusion_lm", "--help", "first step, cold", "first step, warm"


def measure_startup(first_step: Sequence[str], rounds: int) -> dict[str, list[float]]:
    """Returns the seconds of each round by what was started, from the start of a process to its end.

    Cold and warm are the same command, once with an empty compile cache and then with what that left there.

    Args:
      first_step: arguments of the command that ends after one training step; empty leaves it out.
      rounds: processes of each kind.

    Raises:
      ConfigError: a process failed; with its own words.
    """
    with tempfile.TemporaryDirectory(prefix="diffusion_lm_bench_") as folder:

        def step(number: int) -> float:
            return timed(lambda: _run([*COMMAND, *first_step], str(Path(folder) / f"cache{number}")))

        calls: dict[str, Callable[[int], float]] = {
            IMPORT: lambda number: timed(lambda: _run([sys.executable, "-c", "import diffusion_lm"])),
            HELP: lambda number: timed(lambda: _run([*COMMAND, "--help"])),
        }
        if first_step:
            calls |= {COLD: step, WARM: step}
        seconds = alternate(list(calls.values()), rounds)
    return dict(zip(calls, seconds, strict=True))


def _run(command: Sequence[str], cache: str | None = None) -> None:
    """Runs a child to its end, in the current folder, with a compile cache of its own where one is given."""
    environment = child_environment(**({} if cache is None else {"JAX_COMPILATION_CACHE_DIR": cache}))
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        raise ConfigError(
            f"{' '.join(command)} failed: {lines[-1] if lines else done.returncode}",
            where="bench startup",
            fix="Run that command by itself.",
        )
