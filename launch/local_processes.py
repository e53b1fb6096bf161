"""Runs one `diffusion-lm` command as N processes on this machine, which simulates N hosts.

  python -m launch.local_processes --processes 2 train --gin_file gin/runs/train.gin --workdir runs/two

Each process has `--devices` CPU devices and reads its part of the data. Output lines are prefixed with the number of
their process. If one process fails, the others would wait for it forever, so they are stopped. The exit code is that of
the first process that failed.
"""

import argparse
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import IO

GRACE_SECONDS = 20.0
"""Time for the other processes to exit after one has failed, and for all after SIGTERM."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2, metavar="N", help="number of processes (default: 2)")
    parser.add_argument("--devices", type=int, default=1, metavar="N", help="CPU devices per process (default: 1)")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="a verb of diffusion-lm and its flags")
    given = parser.parse_args(argv)
    if not given.command or given.processes < 1 or given.devices < 1:
        parser.error("pass a verb of diffusion-lm; --processes and --devices must be >= 1")
    command = [sys.executable, "-m", "diffusion_lm.cli.main", *given.command]
    return run(command, processes=given.processes, devices=given.devices)


def run(command: Sequence[str], *, processes: int, devices: int = 1) -> int:
    """Runs `command` as connected JAX processes; returns 0 or the exit code of the first process that failed."""
    address = f"localhost:{_free_port()}"
    workers = [
        subprocess.Popen(
            command,
            env=environment(address, processes, number, devices),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for number in range(processes)
    ]
    threads = [
        threading.Thread(target=_forward, args=(worker.stdout, number), daemon=True)
        for number, worker in enumerate(workers)
    ]
    for thread in threads:
        thread.start()
    previous = signal.signal(
        signal.SIGTERM, lambda *_: workers[0].terminate()
    )  # one is enough: all of them learn of it
    try:
        code = _wait(workers)
    finally:
        signal.signal(signal.SIGTERM, previous)
        _stop(workers)
    for thread in threads:
        thread.join(timeout=5)
    return code


def environment(address: str, processes: int, number: int, devices: int) -> dict[str, str]:
    """Returns the environment of one process: the variables that `parallel.multihost` reads, and its CPU devices."""
    flags = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if "host_platform_device_count" not in flag]
    return os.environ | {
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": str(processes),
        "JAX_PROCESS_ID": str(number),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": " ".join([*flags, f"--xla_force_host_platform_device_count={devices}"]),
        # A device that waits in a collective occupies a thread. With only one thread per core, devices that wait in two
        # different collectives can deadlock.
        "PJRT_NPROC": str(max(4 * devices, os.cpu_count() or 1)),
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def _forward(stream: IO[bytes] | None, number: int) -> None:
    assert stream is not None
    for line in stream:
        # Keep reading even if our own stdout is closed: a worker whose pipe is full would block forever.
        with contextlib.suppress(OSError):
            sys.stdout.write(f"[{number}] {line.decode(errors='replace')}")
            sys.stdout.flush()


def _wait(workers: Sequence[subprocess.Popen]) -> int:
    """Waits until all processes have ended, or until one has failed and the grace period of the others is over."""
    failed, since = 0, 0.0
    while any(worker.poll() is None for worker in workers):
        for worker in workers:
            if worker.poll() not in (None, 0) and not failed:
                failed, since = int(worker.returncode), time.monotonic()
        if failed and time.monotonic() - since > GRACE_SECONDS:
            break
        time.sleep(0.05)
    return failed or next((worker.returncode for worker in workers if worker.returncode), 0)


def _stop(workers: Sequence[subprocess.Popen]) -> None:
    for worker in workers:
        if worker.poll() is None:
            worker.terminate()
    deadline = time.monotonic() + GRACE_SECONDS
    for worker in workers:
        try:
            worker.wait(timeout=max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()


if __name__ == "__main__":
    sys.exit(main())
