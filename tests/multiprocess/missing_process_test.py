"""A process that never starts is named within the time limit by all that did, by the command that users run."""

import os
import socket
import subprocess
import sys
import time

import pytest

pytestmark = pytest.mark.thorough


def _start(port: int, number: int, count: int, workdir) -> subprocess.Popen:
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "diffusion_lm.cli.main",
            "train",
            "--gin_file",
            "gin/runs/train.gin",
            "--workdir",
            workdir,
        ],
        env=os.environ
        | {
            "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
            "JAX_NUM_PROCESSES": str(count),
            "JAX_PROCESS_ID": str(number),
            "DIFFUSION_LM_START_TIMEOUT": "12",
        },
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(("started", "count", "missing"), [((0,), 2, "process 1 of 2"), ((1,), 2, "process 0,")])
def test_the_missing_process_is_named(tmp_path, started, count, missing):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    begin = time.monotonic()
    processes = [_start(port, number, count, tmp_path / "run") for number in started]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 1, errors
        (line,) = [line for line in errors.splitlines() if line.startswith("error:")]
        assert missing in line
        assert "within 12 s" in line
        assert "Check failure stack trace" not in errors
    assert time.monotonic() - begin < 100
    assert not (tmp_path / "run").exists(), "nothing is written on failure"
