"""Times how long the command takes to start; each measurement is a separate process."""

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
    """Returns the seconds from start to exit of each process, by kind of process.

    The cold and warm first step are the same command, first with an empty compilation cache and then with a filled one.

    Args:
      first_step: arguments of a command that ends after one training step; empty = do not measure a first step.
      rounds: number of processes of each kind.

    Raises:
      ConfigError: a process failed; the message contains its last line of stderr.
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
    """Runs a command to its end; `cache` is the directory of its compilation cache (None = the default)."""
    environment = child_environment(**({} if cache is None else {"JAX_COMPILATION_CACHE_DIR": cache}))
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        raise ConfigError(
            f"{' '.join(command)} failed: {lines[-1] if lines else done.returncode}",
            where="bench startup",
            fix="Run this command by itself to see its output.",
        )
