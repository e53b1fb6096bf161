"""Training by two processes of two devices equals training by one process of four, and survives a lost host."""

import importlib.util
import json
import pathlib
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest

from diffusion_lm.training.checkpoint import restore_params

pytestmark = pytest.mark.thorough

HERE = pathlib.Path(__file__).parent
SCRIPT = HERE / "train_process.py"


def _local_processes():
    path = HERE.parents[1] / "launch" / "local_processes.py"
    spec = importlib.util.spec_from_file_location("local_processes", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


local_processes = _local_processes()


def _train(workdir: pathlib.Path, processes: int, objective: str = "ar", seconds: float = 0.0) -> int:
    command = [sys.executable, str(SCRIPT), str(workdir), str(seconds), objective]
    return local_processes.run(command, processes=processes, devices=4 // processes)


def _rows(workdir: pathlib.Path, kind: str = "train") -> list[dict]:
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == kind]


@pytest.mark.parametrize("objective", ["ar", "diffusion"])
def test_two_processes_train_as_one(tmp_path, objective):
    """To 1e-6, not bit for bit: gloo adds the parts of a sum in another order than one process does."""
    for processes in (1, 2):
        assert _train(tmp_path / str(processes), processes, objective) == 0
    one, two = _rows(tmp_path / "1"), _rows(tmp_path / "2")
    assert [row["step"] for row in one] == [row["step"] for row in two] == list(range(1, 13))
    np.testing.assert_allclose([row["loss"] for row in one], [row["loss"] for row in two], rtol=1e-6)
    (found,), (expected,) = _rows(tmp_path / "2", "evaluation"), _rows(tmp_path / "1", "evaluation")
    assert found["probe/tokens"] == expected["probe/tokens"]
    np.testing.assert_allclose(found["probe/bound"], expected["probe/bound"], rtol=1e-5)
    for a, b in zip(*(_leaves(tmp_path / name) for name in ("1", "2")), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    card = json.loads((tmp_path / "2" / "run_card.json").read_text())
    assert "'processes': 2" in str(card)


def _leaves(workdir: pathlib.Path) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(restore_params(workdir, step=12))]


def test_sigterm_to_one_process_saves_on_all_and_the_run_goes_on(tmp_path):
    """A preempted host takes the others with it at the same step; the next start ends with the undisturbed numbers."""
    assert _train(tmp_path / "whole", 2) == 0
    command = [sys.executable, str(SCRIPT), str(tmp_path / "cut"), "0.3", "ar"]
    workers = []
    real = subprocess.Popen

    def remember(*given, **named):
        workers.append(real(*given, **named))
        return workers[-1]

    def preempt():
        while not (tmp_path / "cut" / "metrics.jsonl").exists() or len(_rows(tmp_path / "cut")) < 3:
            time.sleep(0.05)
        workers[1].terminate()

    thread = threading.Thread(target=preempt)
    local_processes.subprocess.Popen = remember
    try:
        thread.start()
        code = local_processes.run(command, processes=2, devices=2)
    finally:
        local_processes.subprocess.Popen = real
        thread.join()
    assert code == 75, "the code that says: start me again"
    assert len(_rows(tmp_path / "cut")) < 12
    assert _train(tmp_path / "cut", 2) == 0
    assert [row["loss"] for row in _rows(tmp_path / "cut")] == [row["loss"] for row in _rows(tmp_path / "whole")]


def test_a_process_that_fails_stops_the_others(tmp_path):
    program = "import os, sys, time; sys.exit(3) if os.environ['JAX_PROCESS_ID'] == '1' else time.sleep(600)"
    local_processes.GRACE_SECONDS, kept = 0.5, local_processes.GRACE_SECONDS
    try:
        started = time.monotonic()
        assert local_processes.run([sys.executable, "-c", program], processes=2) == 3
    finally:
        local_processes.GRACE_SECONDS = kept
    assert time.monotonic() - started < 60
