"""Sets up the process for a verb: environment variables, compilation cache, user modules, signals and exit codes."""

import contextlib
import importlib
import os
import re
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from diffusion_lm.core.errors import ConfigError
from diffusion_lm.core.files import as_path

EXIT_OK = 0
EXIT_FAILED = 1
"""A check of `doctor` failed, or a bug in this package (the traceback is printed)."""
EXIT_CONFIG = 2
"""Invalid input; one line on stderr says what is wrong, where, and what to do."""
EXIT_DOES_NOT_FIT = 3
"""A planned program exceeds the memory of the devices (`plan`)."""
EXIT_PREEMPTED = 75
"""Stopped by SIGTERM with a checkpoint saved (`EX_TEMPFAIL`). Launchers run the same command again to resume."""
EXIT_INTERRUPTED = 130
"""Stopped by Ctrl-C; the same command resumes from the last checkpoint."""
EXIT_OUTPUT_CLOSED = 141
"""stdout was closed before all results were written: the exit code of a process killed by SIGPIPE."""


_STDERR = 2
_NOISE = re.compile(
    rb"WARNING: All log messages before absl|[IW]\d{4} .*(tensorflow|tsl|xla|cudart|port\.cc|cpu_feature)"
)


class Terminated(BaseException):
    """SIGTERM arrived while no other handler was installed."""


def prepare() -> None:
    """Sets environment variables that JAX and TensorFlow read on import; existing values are kept."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    absl_logging = importlib.import_module("absl.logging")  # Orbax and SeqIO log through it
    absl_logging.set_verbosity(absl_logging.ERROR)
    folder = compile_cache_folder()
    if folder is not None:
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder))
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")


def compile_cache_folder() -> Path | None:
    """Returns the directory of JAX's persistent compilation cache, or None if the cache is off.

    It is `$DIFFUSION_LM_COMPILE_CACHE` ("off" disables the cache), else `$DIFFUSION_LM_CACHE/jax`, else
    `~/.cache/diffusion_lm/jax`.
    """
    given = os.environ.get("DIFFUSION_LM_COMPILE_CACHE")
    if given is None:
        cache = os.environ.get("DIFFUSION_LM_CACHE")
        return (Path(cache).expanduser() if cache else Path.home() / ".cache" / "diffusion_lm") / "jax"
    return None if given.lower() in ("", "0", "off", "none") else as_path(given)


def import_modules(names: Sequence[str]) -> tuple[str, ...]:
    """Imports user modules, e.g. ones that register SeqIO tasks, from the Python path or the current directory.

    Raises:
      ConfigError: a module does not exist.
    """
    if names and "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    for name in names:
        try:
            import_quietly(name)
        except ModuleNotFoundError as error:
            missing = "" if error.name == name else f", which imports {error.name}"
            raise ConfigError(
                f"no module named {error.name or name} (requested: {name}{missing})",
                where="--module",
                fix="Pass the dotted name of a module that can be imported from the current directory.",
            ) from error
    return tuple(names)


def import_quietly(name: str) -> None:
    """Imports a module and drops what TensorFlow logs before it reads `TF_CPP_MIN_LOG_LEVEL`.

    The log lines come from C++, so the file descriptor of stderr is captured. All other lines are written to stderr.
    """
    sys.stderr.flush()
    with tempfile.TemporaryFile() as captured:
        original = os.dup(_STDERR)
        os.dup2(captured.fileno(), _STDERR)
        try:
            importlib.import_module(name)
        finally:
            sys.stderr.flush()
            os.dup2(original, _STDERR)
            os.close(original)
            captured.seek(0)
            lines = captured.read().splitlines(keepends=True)
            os.write(_STDERR, b"".join(line for line in lines if not _NOISE.match(line)))


@contextlib.contextmanager
def sigterm_raises() -> Iterator[None]:
    """Raises `Terminated` on SIGTERM while a verb runs, so that temporary files are cleaned up."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(signum: int, frame: object) -> None:
        raise Terminated

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
