"""launch.slurm: the batch script, run by bash with a fake srun, and the calls of a fake sbatch."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from launch import slurm

TRAIN = [
    "train",
    "--gin_file",
    "a.gin",
    '--gin.NOTE="it\'s $HOME `x` {y}"',
    '--gin.NAME="x y"',
    "--workdir",
    "runs/a b",
]
SRUN = """\
import json, os, pathlib, signal, sys, time
folder = pathlib.Path(os.environ["FAKE_FOLDER"])
given = {name: value for name, value in os.environ.items() if name.startswith(("DIFFUSION_LM", "MY_"))}
(folder / "srun").write_text(json.dumps({"arguments": sys.argv[1:], "environment": given}))
if os.environ["ENDS"] == "saves":
    signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.5), os._exit(75)))
    (folder / "ready").touch()
    time.sleep(60)
sys.exit(int(os.environ["ENDS"]))
"""


def _script(*more, command=TRAIN):
    return slurm._script(slurm.job.parse(slurm._parser(), ["script", "--name", "n", *more, "--", *command]))


def _options(text):
    return dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(.*))?$", text, re.MULTILINE))


def _start(fake, tmp_path, text, ends, **variables):
    (fake.folder / "bin" / "srun").write_text(f"#!{sys.executable} -IS\n{SRUN}")
    (fake.folder / "bin" / "scontrol").write_text('#!/bin/sh\necho "$@" >> $FAKE_FOLDER/scontrol\n')
    for name in ("srun", "scontrol"):
        (fake.folder / "bin" / name).chmod(0o755)
    path = tmp_path / "script"
    path.write_text(text)
    environment = {
        "PATH": f"{fake.folder / 'bin'}:/usr/bin:/bin",
        "FAKE_FOLDER": str(fake.folder),
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_ID": "17",
        "ENDS": str(ends),
    }
    return subprocess.Popen(["bash", str(path)], env=environment | variables)


def test_the_script_requests_one_task_per_gpu():
    options = _options(
        _script("--nodes", "2", "--gpus", "4", "--time", "1-12", "--cpus", "6", "--sbatch_flag=--partition=gpu")
    )
    assert (options["nodes"], options["ntasks-per-node"], options["gres"]) == ("2", "4", "gpu:4")
    assert (options["time"], options["cpus-per-task"], options["partition"]) == ("1-12", "6", "gpu")
    assert options["signal"] == "TERM@300", "to the tasks and not to the shell, in time to save"
    assert "requeue" in options
    assert "gpus-per-task" not in options


def test_srun_gets_the_exact_command(fake, tmp_path):
    text = _script("--env", "MY_NOTE=it's two", "--setup", "export MY_SETUP=1", "--nodes", "2")
    assert _start(fake, tmp_path, text, 0).wait(timeout=30) == 0
    found = json.loads((fake.folder / "srun").read_text())
    assert found["arguments"] == ["--kill-on-bad-exit=0", "diffusion-lm", *TRAIN]
    assert found["environment"] == {"MY_NOTE": "it's two", "MY_SETUP": "1", "DIFFUSION_LM_MULTIHOST": "1"}
    assert not (fake.folder / "scontrol").exists()


def test_one_task_is_one_process(fake, tmp_path):
    assert _start(fake, tmp_path, _script("--gpus", "1"), 0).wait(timeout=30) == 0
    assert json.loads((fake.folder / "srun").read_text())["environment"] == {}


@pytest.mark.parametrize(
    ("ends", "count", "code", "requeued"),
    [(75, "0", 0, True), (75, "100", 75, False), (2, "0", 2, False), (134, "0", 134, False)],
)
def test_only_a_run_that_saved_a_checkpoint_is_requeued(fake, tmp_path, ends, count, code, requeued):
    process = _start(fake, tmp_path, _script(), ends, SLURM_RESTART_COUNT=count)
    assert process.wait(timeout=30) == code
    assert (fake.folder / "scontrol").exists() == requeued
    if requeued:
        assert (fake.folder / "scontrol").read_text() == "requeue 17\n"


def test_the_shell_outlives_a_sigterm_while_the_tasks_save(fake, tmp_path):
    process = _start(fake, tmp_path, _script(), "saves")
    deadline = time.monotonic() + 30
    while not (fake.folder / "ready").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True).stdout
    os.kill(process.pid, signal.SIGTERM)
    os.kill(int(children), signal.SIGTERM)
    assert process.wait(timeout=30) == 0
    assert (fake.folder / "scontrol").read_text() == "requeue 17\n"


def test_submit_passes_the_script_to_sbatch(fake, capfd):
    fake.plan({"^$": [{"stdout": "Submitted batch job 17\n"}]})
    assert slurm.main(["submit", "--name", "n", "--", *TRAIN]) == 0
    (call,) = fake.calls
    assert (call["program"], call["arguments"]) == ("sbatch", [])
    assert call["stdin"] == _script()
    assert "17" in capfd.readouterr().out


def test_dry_run_submits_nothing(fake, capsys):
    assert slurm.main(["submit", "--name", "n", "--dry_run", "--", *TRAIN]) == 0
    assert capsys.readouterr().out == f"sbatch <<'END'\n{_script()}END\n"
    assert fake.calls == []


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        (["--time", "soon"], "HOURS:MINUTES"),
        (["--gpus", "0"], "gpus=0: both must"),
        (["--name", "a b"], "lower-case"),
    ],
)
def test_errors_of_invalid_input_say_what_to_do(fake, capfd, changed, says):
    assert slurm.main(["submit", "--name", "n", *changed, "--", *TRAIN]) == 2
    assert says in capfd.readouterr().err
    assert fake.calls == []
