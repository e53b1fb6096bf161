"""A side in a child process that stays alive: one JSON object a line, a question down, an answer up."""

import base64
import json
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusion_lm
from diffusion_lm.bench.sides import Side
from diffusion_lm.core.errors import ConfigError

TORCH_SIDE = Path(__file__).with_name("torch_side.py")
"""A script for another interpreter: it imports nothing of this package."""


class ChildSide:
    """The parent's end. Use it as a context manager: the child ends with it.

    Attributes:
      labels: what the child can be asked to measure.
      facts: what the child says of itself once it has started.
    """

    def __init__(self, command: Sequence[str], greeting: Mapping[str, Any], *, where: str, fix: str):
        """Starts `command` and waits until it has answered `greeting`.

        Args:
          command: the child.
          greeting: plain data that says what it is to do.
          where: what an error of the child is blamed on.
          fix: what the user can do where it does not start.

        Raises:
          ConfigError: it does not start; with its own words.
        """
        self._where, self._fix = where, fix
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (as long as the child lives)
        # Two sides share a GPU, so neither may take all of its memory at the start.
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

    def prepare(self, export: str | None = None) -> Mapping[str, Any]:
        """Asks the child to prepare; see `Side`."""
        return self._ask(do="prepare", export=export)

    def measure(self, label: str, number: int) -> float:
        """Asks the child for a round; see `Side`."""
        return float(self._ask(do="measure", label=label, number=number)["seconds"])

    def finish(self) -> Mapping[str, Any]:
        """Asks the child what it knows after the rounds; see `Side`."""
        return self._ask(do="finish")

    def close(self) -> None:
        """Ends the child, which ends by itself when nobody asks it any more."""
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

    def __enter__(self) -> "ChildSide":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _ask(self, **question: Any) -> dict[str, Any]:
        pipe, answers = self._process.stdin, self._process.stdout
        assert pipe is not None
        assert answers is not None
        try:
            pipe.write(json.dumps(question, allow_nan=False).encode() + b"\n")
            pipe.flush()
            line = answers.readline()
        except BrokenPipeError:
            line = b""
        if not line:
            self._process.wait()
            raise ConfigError(f"the child ended: {self._last_words()}", where=self._where, fix=self._fix)
        answer = json.loads(line)
        if "error" in answer:
            where, fix = answer.get("where") or self._where, answer.get("fix") or self._fix
            raise ConfigError(answer["error"], where=where, fix=fix)
        return answer

    def _last_words(self) -> str:
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"exit code {self._process.returncode}"


def our_child(side: Side) -> ChildSide:
    """Starts a child of this interpreter that prepares and measures `side`."""
    packed = base64.b64encode(pickle.dumps(side)).decode()
    command = [sys.executable, "-m", "diffusion_lm.bench.child"]
    return ChildSide(command, {"side": packed}, where="diffusion_lm.bench.child", fix="Run again without --against.")


def torch_child(python: str | None, task: str) -> ChildSide:
    """Starts the PyTorch side for `task`, "train" or "decode", in the interpreter `python` (None = this one).

    Raises:
      ConfigError: the interpreter is not there, or torch or transformers are not installed in it.
    """
    where = "--against torch" if python is None else f"--torch_python {python}"
    fix = "Install torch and transformers there, or name an interpreter that has them with --torch_python."
    return ChildSide([python or sys.executable, str(TORCH_SIDE)], {"task": task}, where=where, fix=fix)


def child_environment(**more: str) -> dict[str, str]:
    """Returns the environment of a child that finds this package, wherever this process found it, and `more`."""
    here = str(Path(diffusion_lm.__file__).parents[1])
    found = os.environ.get("PYTHONPATH")
    return os.environ | {"PYTHONPATH": os.pathsep.join([here, found] if found else [here]), **more}
