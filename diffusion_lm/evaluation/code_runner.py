"""Runs untrusted Python programs in forked child processes with resource limits, many per second.

Each worker is one interpreter (`python -I -S`: no environment variables, no user site, no installed packages) that
forks once per program. The child has its own session, an empty temporary directory as working directory, no standard
input and discarded output. CPU time, address space, file size and core dumps are limited. If the kernel allows
unprivileged namespaces, the child also has a network namespace without interfaces. After the result or the timeout, its
process group is killed.

Security: this contains accidents (infinite loops, excessive memory or disk use, stray children). It is **not** a
sandbox. A program can read all files that the user can read, can leave its process group on purpose, and has network
access if the namespace is not available. Run models that may generate malicious code in a container or virtual machine.
"""

import concurrent.futures
import contextlib
import dataclasses
import json
import os
import queue
import signal
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence

from diffusion_lm.core.errors import require

# The program of a worker. Requests and answers are frames: u32 length (network byte order) + JSON. The result is
# written to a pipe after the last statement, so neither `os._exit(0)` nor `sys.exit()` counts as success.
_WORKER = r"""
import ctypes, json, os, random, resource, select, shutil, signal, struct, sys, tempfile, time

limits = json.loads(sys.argv[1])
commands, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
devnull = os.open(os.devnull, os.O_RDWR)
for fd in (0, 1, 2):
    os.dup2(devnull, fd)
try:
    CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
    ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWUSER | CLONE_NEWNET)
except Exception:
    pass

def limit(kind, value):
    try:
        resource.setrlimit(kind, (value, value))
    except (ValueError, OSError):
        pass

def child(program, verdict_fd, folder):
    os.setsid()
    os.chdir(folder)
    os.closerange(3, verdict_fd)
    os.closerange(verdict_fd + 1, 256)
    try:  # exceeding the soft limit sends SIGXCPU, which is reported as a timeout
        resource.setrlimit(resource.RLIMIT_CPU, (limits["cpu_s"], limits["cpu_s"] + 1))
    except (ValueError, OSError):
        pass
    limit(resource.RLIMIT_AS, limits["memory_bytes"])
    limit(resource.RLIMIT_FSIZE, limits["file_bytes"])
    limit(resource.RLIMIT_CORE, 0)
    sys.setrecursionlimit(10000)
    try:
        exec(compile(program, "<program>", "exec"), {"__name__": "__main__"})
        report = "passed"
    except BaseException as error:
        report = type(error).__name__ + ": " + str(error)[:200]
    os.write(verdict_fd, report.encode("utf-8", "replace"))
    os._exit(0)

def run(program, timeout_s):
    folder = tempfile.mkdtemp(dir=limits["folder"])
    read_fd, write_fd = os.pipe()
    started = time.monotonic()
    pid = os.fork()
    if pid == 0:
        os.close(read_fd)
        try:
            child(program, write_fd, folder)
        finally:
            os._exit(1)
    os.close(write_fd)
    report, status = b"", "timeout"
    while True:
        left = started + timeout_s - time.monotonic()
        if left <= 0 or not select.select([read_fd], [], [], left)[0]:
            break
        piece = os.read(read_fd, 4096)
        report += piece
        if not piece or report:
            status = "passed" if report == b"passed" else "failed" if report else "crashed"
            break
    try:
        os.killpg(pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    _, death = os.waitpid(pid, 0)
    if status == "crashed" and os.WIFSIGNALED(death) and os.WTERMSIG(death) == signal.SIGXCPU:
        status = "timeout"
    os.close(read_fd)
    shutil.rmtree(folder, ignore_errors=True)
    error = "" if status in ("passed", "timeout") else report.decode("utf-8", "replace")
    return {"status": status, "error": error, "seconds": time.monotonic() - started}

while True:
    head = commands.read(4)
    if len(head) < 4:
        break
    request = json.loads(commands.read(struct.unpack("!I", head)[0]))
    answer = json.dumps(run(request["program"], request["timeout_s"])).encode()
    answers.write(struct.pack("!I", len(answer)) + answer)
    answers.flush()
"""


@dataclasses.dataclass(frozen=True)
class RunResult:
    """The result of one program.

    Attributes:
      status: "passed" (ran to the end), "failed" (raised an exception), "timeout", or "crashed" (ended without a
        result: killed by a limit, a signal or its own `os._exit`).
      error: for "failed", the type of the exception and the start of its message.
      seconds: wall time.
    """

    status: str
    error: str = ""
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether the program ran to the end without an exception."""
        return self.status == "passed"


class _Worker:
    """One forking interpreter; it is restarted if it dies."""

    def __init__(self, limits: dict):
        self._arguments = [sys.executable, "-I", "-S", "-c", _WORKER, json.dumps(limits, allow_nan=False)]
        self._process: subprocess.Popen | None = None

    def run(self, program: str, timeout_s: float) -> RunResult:
        request = json.dumps({"program": program, "timeout_s": timeout_s}, allow_nan=False).encode()
        try:
            process = self._started()
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(struct.pack("!I", len(request)) + request)
            process.stdin.flush()
            head = process.stdout.read(4)
            if len(head) < 4:
                raise BrokenPipeError
            return RunResult(**json.loads(process.stdout.read(struct.unpack("!I", head)[0])))
        except (BrokenPipeError, ConnectionError, ValueError):
            self.close()
            return RunResult("crashed", "the worker died")

    def _started(self) -> subprocess.Popen:
        if self._process is None or self._process.poll() is not None:
            self._process = subprocess.Popen(
                self._arguments,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={"PYTHONHASHSEED": "0"},
                start_new_session=True,
            )
        return self._process

    def close(self) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            for stream in (self._process.stdin, self._process.stdout):
                if stream is not None:
                    with contextlib.suppress(OSError):
                        stream.close()
            self._process = None


def run_programs(
    programs: Sequence[str],
    timeout_s: float = 30.0,
    workers: int | None = None,
    *,
    cpu_s: int = 3,
    memory_bytes: int = 1 << 30,
    file_bytes: int = 1 << 20,
) -> list[RunResult]:
    """Runs all programs and returns their results in the same order.

    Args:
      programs: Python source texts; identical texts run once.
      timeout_s: wall-clock limit per program in seconds, for programs that sleep. It should be generous, so that
        results do not depend on the load of the machine.
      workers: number of programs that run in parallel; None = number of CPUs.
      cpu_s: CPU-time limit per program in seconds, for programs that loop.
      memory_bytes: limit of the address space per program.
      file_bytes: maximum size of a file that a program writes.

    Raises:
      ConfigError: `timeout_s` or `workers` is not positive.
    """
    require(timeout_s > 0, f"timeout_s={timeout_s}: must be > 0", where="run_programs.timeout_s")
    workers = min(workers if workers is not None else os.cpu_count() or 1, max(len(programs), 1))
    require(workers > 0, f"workers={workers}: must be >= 1", where="run_programs.workers")
    distinct = list(dict.fromkeys(programs))
    results: dict[str, RunResult] = {}
    pending: queue.SimpleQueue[str] = queue.SimpleQueue()
    for program in distinct:
        pending.put(program)
    lock = threading.Lock()
    with tempfile.TemporaryDirectory(prefix="diffusion_lm_code_", ignore_cleanup_errors=True) as folder:
        limits = {
            "cpu_s": cpu_s,
            "memory_bytes": memory_bytes,
            "file_bytes": file_bytes,
            "folder": folder,
        }

        def drain() -> None:
            worker = _Worker(limits)
            try:
                while True:
                    try:
                        program = pending.get_nowait()
                    except queue.Empty:
                        return
                    result = worker.run(program, timeout_s)
                    with lock:
                        results[program] = result
            finally:
                worker.close()

        with concurrent.futures.ThreadPoolExecutor(workers) as pool:
            for done in [pool.submit(drain) for _ in range(workers)]:
                done.result()
    return [results[program] for program in programs]
