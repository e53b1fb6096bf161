"""Kills, signals and damaged run folders: a run goes on where it was, bit for bit, or says in one sentence why not."""

import dataclasses
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from train_process import run

from diffusion_lm.core.errors import ConfigError
from diffusion_lm.training.checkpoint import FOLDER, finished_steps, restore_params
from diffusion_lm.training.hooks import RESTART_EXIT_CODE
from diffusion_lm.training.loop import train

pytestmark = pytest.mark.thorough

SCRIPT = pathlib.Path(__file__).parent / "train_process.py"


def _start(workdir, cache, seconds=0.0) -> subprocess.Popen:
    command = [sys.executable, str(SCRIPT), str(workdir), str(cache), str(seconds)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})


def _finish(process: subprocess.Popen) -> int:
    _, errors = process.communicate(timeout=500)
    assert process.returncode in (0, RESTART_EXIT_CODE), errors
    return process.returncode


def _lines(workdir) -> list[str]:
    log = workdir / "metrics.jsonl"
    return log.read_text().splitlines() if log.exists() else []


def _rows(workdir):
    return [{k: v for k, v in json.loads(line).items() if k != "timing"} for line in _lines(workdir)]


def _signal_after(process: subprocess.Popen, workdir, lines: int, number: signal.Signals) -> None:
    deadline = time.time() + 500
    while len(_lines(workdir)) < lines and process.poll() is None and time.time() < deadline:
        time.sleep(0.02)
    assert process.poll() is None, "the run ended before it could be disturbed"
    process.send_signal(number)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, cache):
    workdir = tmp_path_factory.mktemp("undisturbed")
    assert _finish(_start(workdir, cache)) == 0
    assert any(cache.iterdir()), "enable_compile_cache kept nothing"
    return workdir


def _assert_as_undisturbed(workdir, undisturbed):
    assert _rows(workdir) == _rows(undisturbed)
    ours, theirs = restore_params(workdir), restore_params(undisturbed)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_T29_kill_9_and_start_again(tmp_path, cache, undisturbed):
    process = _start(tmp_path, cache, seconds=0.3)
    _signal_after(process, tmp_path, 6, signal.SIGKILL)
    process.communicate()
    reached = len(_rows(tmp_path))
    assert 0 < reached < len(_rows(undisturbed))
    with open(tmp_path / "metrics.jsonl", "a") as log:
        log.write('{"step": 9, "kind": "tra')  # a kill inside a write
    assert _finish(_start(tmp_path, cache)) == 0
    _assert_as_undisturbed(tmp_path, undisturbed)


def test_sigterm_saves_and_asks_for_a_restart(tmp_path, cache, undisturbed):
    process = _start(tmp_path, cache, seconds=0.3)
    _signal_after(process, tmp_path, 3, signal.SIGTERM)
    assert _finish(process) == RESTART_EXIT_CODE
    reached = finished_steps(tmp_path)[-1]
    assert 3 <= reached < 12
    assert _rows(tmp_path)[-1]["step"] == reached, "what was trained must be in the log"
    assert _finish(_start(tmp_path, cache)) == 0
    _assert_as_undisturbed(tmp_path, undisturbed)


def test_a_half_written_checkpoint_is_not_a_checkpoint(tmp_path, cache, undisturbed):
    """The newest folder lacks Orbax's commit mark: the run goes on from the one before it and writes it anew."""
    workdir = tmp_path / "run"
    shutil.copytree(undisturbed, workdir)
    newest = workdir / FOLDER / "12"
    (newest / "commit_success.txt").unlink()
    shutil.rmtree(newest / "params")
    (workdir / FOLDER / "14.orbax-checkpoint-tmp-1").mkdir()
    assert finished_steps(workdir) == [10]
    assert _finish(_start(workdir, cache)) == 0
    assert finished_steps(workdir) == [10, 12]
    assert sorted(entry.name for entry in (workdir / FOLDER).iterdir()) == ["10", "12"]
    _assert_as_undisturbed(workdir, undisturbed)


def test_a_run_folder_of_another_configuration_is_refused(undisturbed):
    before = (undisturbed / "metrics.jsonl").read_bytes()
    with pytest.raises(ConfigError, match=r"another configuration: TrainRun.batch_size is 4 there and 8 here"):
        train(dataclasses.replace(run(), batch_size=8), undisturbed)
    with pytest.raises(ConfigError, match=r"TrainRun.seed is 0 there and 1 here.*Use another --workdir"):
        train(dataclasses.replace(run(), seed=1), undisturbed)
    assert (undisturbed / "metrics.jsonl").read_bytes() == before


def test_a_checkpoint_that_is_not_there_is_named(undisturbed, tmp_path):
    with pytest.raises(ConfigError, match=f"no checkpoint in {tmp_path}"):
        restore_params(tmp_path)
    with pytest.raises(ConfigError, match=r"no checkpoint of step 3 in .*Use one of 10, 12"):
        restore_params(undisturbed, step=3)


def test_a_checkpoint_can_be_named_by_run_by_folder_and_by_step(undisturbed):
    ways = [
        restore_params(undisturbed),
        restore_params(undisturbed / FOLDER),
        restore_params(undisturbed / FOLDER / "12"),
        restore_params(str(undisturbed), step=12),
    ]
    for other in ways[1:]:
        for a, b in zip(jax.tree.leaves(ways[0]), jax.tree.leaves(other), strict=True):
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
