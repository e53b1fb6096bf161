"""The process around a verb: environment variables, the compile cache, the user's modules, signals and exit codes."""

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
"""A check of `doctor` failed, or an error that is ours: the traceback is printed."""
EXIT_CONFIG = 2
"""A wrong input: one line on stderr says what, where, and what to do."""
EXIT_DOES_NOT_FIT = 3
"""Kept for plans that exceed the memory of the devices."""
EXIT_PREEMPTED = 75
"""SIGTERM (`EX_TEMPFAIL`): what was done is saved; the same command goes on. Launchers restart on it."""
EXIT_INTERRUPTED = 130
"""Ctrl-C; the same command goes on from the last checkpoint."""
EXIT_OUTPUT_CLOSED = 141
"""The reader of stdout went away before all results were written: the code of a process that SIGPIPE ended."""


_STDERR = 2
_NOISE = re.compile(
    rb"WARNING: All log messages before absl|[IW]\d{4} .*(tensorflow|tsl|xla|cudart|port\.cc|cpu_feature)"
)


class Terminated(BaseException):
    """SIGTERM arrived while nothing else was watching for it."""


def prepare() -> None:
    """Sets what must be set before JAX and TensorFlow are imported; environment variables that are set stay."""
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
    """Returns where compiled programs are kept, or None.

    `$DIFFUSION_LM_COMPILE_CACHE` says where ("off" = nowhere); else `$DIFFUSION_LM_CACHE/jax`, else the user's cache.
    """
    given = os.environ.get("DIFFUSION_LM_COMPILE_CACHE")
    if given is None:
        cache = os.environ.get("DIFFUSION_LM_CACHE")
        return (Path(cache).expanduser() if cache else Path.home() / ".cache" / "diffusion_lm") / "jax"
    return None if given.lower() in ("", "0", "off", "none") else as_path(given)


def import_modules(names: Sequence[str]) -> tuple[str, ...]:
    """Imports the user's modules (which register SeqIO tasks); the current folder counts as a place to find them.

    Raises:
      ConfigError: there is no such module.
    """
    if names and "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    for name in names:
        try:
            import_quietly(name)
        except ModuleNotFoundError as error:
            missing = "" if error.name == name else f", which needs {error.name}"
            raise ConfigError(
                f"there is no module {error.name or name} (wanted: {name}{missing})",
                where="--module",
                fix="Give the dotted name of a module that can be imported from the current folder.",
            ) from error
    return tuple(names)


def import_quietly(name: str) -> None:
    """Imports a module without what TensorFlow logs before it heeds `TF_CPP_MIN_LOG_LEVEL`; the rest is passed on."""
    sys.stderr.flush()
    with tempfile.TemporaryFile() as captured:
        kept = os.dup(_STDERR)
        os.dup2(captured.fileno(), _STDERR)
        try:
            importlib.import_module(name)
        finally:
            sys.stderr.flush()
            os.dup2(kept, _STDERR)
            os.close(kept)
            captured.seek(0)
            lines = captured.read().splitlines(keepends=True)
            os.write(_STDERR, b"".join(line for line in lines if not _NOISE.match(line)))


@contextlib.contextmanager
def sigterm_raises() -> Iterator[None]:
    """Turns SIGTERM into `Terminated` for the length of a verb, so that temporary files are cleaned up."""
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
