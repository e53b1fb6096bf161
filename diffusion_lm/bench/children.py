"""Runs a benchmark in a child process. Requests and answers are JSON objects, one per line, over stdin and stdout."""

import base64
import json
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusion_lm
from diffusion_lm.bench.benchmark import Benchmark, Facts
from diffusion_lm.core.errors import ConfigError

TORCH_BASELINE = Path(__file__).with_name("torch_baseline.py")
"""Script for another Python interpreter; it does not import this package."""


class ChildBenchmark:
    """A `Benchmark` in a child process. Use it as a context manager, which terminates the child at the end.

    Attributes:
      labels: names of what the child can measure.
      facts: the child's answer to the greeting.
    """

    def __init__(self, command: Sequence[str], greeting: Facts, *, where: str, fix: str):
        """Starts `command`, sends `greeting` and waits for the answer.

        Args:
          command: command line of the child.
          greeting: plain data that tells the child what to run.
          where: the flag or module to name in errors of the child.
          fix: the advice in errors of the child.

        Raises:
          ConfigError: the child does not start; the message contains its last line of stderr.
        """
        self._where, self._fix = where, fix
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (open while the child runs)
        # Both sides share one GPU, so JAX must not preallocate most of its memory.
        shared = os.environ.get("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        try:
            self._process = subprocess.Popen(
                list(command),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                env=child_environment(XLA_PYTHON_CLIENT_PREALLOCATE=shared),
            )
        except OSError as error:
            self._errors.close()
            raise ConfigError(f"cannot run {command[0]}: {error.strerror}", where=where, fix=fix) from error
        try:
            self.facts = self._ask(do="greet", **greeting)
            self.labels: Sequence[str] = tuple(self.facts["labels"])
        except BaseException:
            self.close()
            raise

    def prepare(self, export: str | None = None) -> Facts:
        """Calls `prepare` in the child."""
        return self._ask(do="prepare", export=export)

    def measure(self, label: str, number: int) -> float:
        """Calls `measure` in the child."""
        return float(self._ask(do="measure", label=label, number=number)["seconds"])

    def finish(self) -> Facts:
        """Calls `finish` in the child."""
        return self._ask(do="finish")

    def close(self) -> None:
        """Closes the pipes, on which the child exits, and kills it if it does not."""
        process = self._process
        for stream in (process.stdin, process.stdout):
            assert stream is not None
            try:
                stream.close()
            except BrokenPipeError:
                continue
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        self._errors.close()

    def __enter__(self) -> "ChildBenchmark":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _ask(self, **question: object) -> dict[str, Any]:
        pipe, answers = self._process.stdin, self._process.stdout
        assert pipe is not None
        assert answers is not None
        try:
            pipe.write(json.dumps(question, allow_nan=False).encode() + b"\n")
            pipe.flush()
            line = answers.readline()
        except BrokenPipeError:  # the child exited before it read the request
            line = b""
        if not line:
            self._process.wait()
            raise ConfigError(f"the child process exited: {self._last_error()}", where=self._where, fix=self._fix)
        answer = json.loads(line)
        if "error" in answer:
            where, fix = answer.get("where") or self._where, answer.get("fix") or self._fix
            raise ConfigError(answer["error"], where=where, fix=fix)
        return answer

    def _last_error(self) -> str:
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"exit code {self._process.returncode}"


def our_child(side: Benchmark) -> ChildBenchmark:
    """Starts a child process of this interpreter that runs `side`."""
    packed = base64.b64encode(pickle.dumps(side)).decode()
    command = [sys.executable, "-m", "diffusion_lm.bench.child"]
    return ChildBenchmark(
        command, {"side": packed}, where="diffusion_lm.bench.child", fix="Run again without --against."
    )


def torch_child(python: str | None, task: str) -> ChildBenchmark:
    """Starts the PyTorch side for `task` ("train" or "decode") in the interpreter `python` (None = this one).

    Raises:
      ConfigError: the interpreter does not exist, or lacks torch or transformers.
    """
    where = "--against torch" if python is None else f"--torch_python {python}"
    fix = "Install torch and transformers there, or pass an interpreter that has them with --torch_python."
    return ChildBenchmark([python or sys.executable, str(TORCH_BASELINE)], {"task": task}, where=where, fix=fix)


def child_environment(**more: str) -> dict[str, str]:
    """Returns the environment for a child process that can import this package, with the variables `more`."""
    here = str(Path(diffusion_lm.__file__).parents[1])
    found = os.environ.get("PYTHONPATH")
    return os.environ | {"PYTHONPATH": os.pathsep.join([here, found] if found else [here]), **more}
