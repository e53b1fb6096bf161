"""launch.tpu_vm with a fake gcloud that runs the remote commands in local directories."""

import json
import shlex

import pytest

from launch import tpu_vm, watch
from launch.watch import Verdict

pytestmark = pytest.mark.thorough

READY = {"stdout": '{"state": "READY"}'}
ABSENT = {
    "code": 1,
    "stderr": "ERROR: (gcloud.x) NOT_FOUND: Resource 'projects/p/locations/z/nodes/n' was not found\n",
}
AWKWARD = ['--gin.NOTE="it\'s a $HOME `test` \\ of x y"', "--gin.TrainRun.steps=100", '--gin.NAME="x y"']
TRAIN = ["train", "--gin_file", "gin/runs/train.gin", *AWKWARD]


@pytest.fixture
def wheel(tmp_path):
    path = tmp_path / "diffusion_lm-0.1.0-py3-none-any.whl"
    path.write_bytes(b"a wheel")
    return path


def _flags(wheel, accelerator="v5e-4", *more):
    return ["--name", "n", "--zone", "us-west4-a", "--accelerator", accelerator, "--wheel", str(wheel), *more]


def _state(*names):
    return [{"stdout": json.dumps({"state": name})} for name in names]


def test_a_job_creates_installs_runs_and_deletes(fake, wheel, capfd):
    fake.plan({"describe": [ABSENT, *_state("CREATING", "READY", "READY")]})
    workdir = ["--workdir", "gs://bucket/a run"]
    code = tpu_vm.main(["job", *_flags(wheel), "--env", "MY_NOTE=two words", "--", *TRAIN, *workdir])
    assert code == 0
    assert fake.verbs() == ["create", "ssh", "scp", "ssh", "ssh", "ssh", "ssh", "delete", "delete"]
    create = fake.calls[1]["arguments"]
    assert create[:5] == ["compute", "tpus", "tpu-vm", "create", "n"]
    assert {"--accelerator-type=v5litepod-4", "--version=v2-alpha-tpuv5-lite", "--zone=us-west4-a"} <= set(create)
    (run,) = fake.runs()
    assert run["arguments"] == [*TRAIN, *workdir], "not one character may change between here and the worker"
    assert run["environment"]["MY_NOTE"] == "two words"
    assert "DIFFUSION_LM_MULTIHOST" not in run["environment"], "one machine"
    installed = (fake.folder / "uv.log").read_text()
    assert "pip install" in installed
    assert "-c constraints.txt" in installed
    assert f"workers/0/diffusion_lm/{wheel.name}" in installed
    assert "step 1 of worker 0" in capfd.readouterr().out


def test_all_workers_of_several_slices_run_the_command(fake, wheel, monkeypatch):
    monkeypatch.setenv("FAKE_WORKERS", "8")
    fake.plan({"describe": [ABSENT, {"stdout": '{"state": {"state": "WAITING_FOR_RESOURCES"}}'}]})
    flags = _flags(wheel, "2xv5e-16", "--queued", "--spot")
    assert tpu_vm.main(["job", *flags, "--", *TRAIN, "--workdir", "gs://b/run"]) == 0
    create = fake.calls[1]["arguments"]
    assert create[2:4] == ["queued-resources", "create"]
    assert {"--node-count=2", "--node-prefix=n", "--accelerator-type=v5litepod-16", "--spot"} <= set(create)
    assert [len(fake.runs(number)) for number in range(8)] == [1] * 8
    assert fake.runs(7)[0]["environment"]["DIFFUSION_LM_MULTIHOST"] == "1"
    deletes = [call["arguments"] for call in fake.calls if call["arguments"][3] == "delete"]
    assert [argument[2] for argument in deletes] == ["queued-resources"]
    assert "--force" in deletes[0]


def test_a_preempted_tpu_is_recreated_and_runs_the_same_command(fake, wheel):
    fake.plan(
        {
            "describe": [
                ABSENT,
                *_state("READY", "PREEMPTED", "PREEMPTED", "PREEMPTED"),
                ABSENT,
                *_state("READY", "READY"),
            ]
        }
    )
    code = tpu_vm.main(["job", *_flags(wheel, "v5e-4", "--spot"), "--", *TRAIN, "--workdir", "gs://b/run"])
    assert code == 0
    verbs = [verb for verb in fake.verbs() if verb in ("create", "delete", "scp")]
    assert verbs == ["create", "scp", "delete", "delete", "create", "scp", "delete", "delete"]
    first, second = fake.runs()
    assert first == second


def test_connection_lost_to_a_preempted_tpu_is_a_preemption(fake, wheel):
    """ssh fails before Cloud reports the preemption: the state is polled again; the job continues on another TPU."""
    broken = {
        "code": 1,
        "stderr": "ERROR: (gcloud.compute.tpus.tpu-vm.ssh) [/usr/bin/ssh] exited with return code [255].\n",
    }
    fake.plan(
        {
            "describe": [
                ABSENT,
                *_state("READY", "READY", "PREEMPTED", "PREEMPTED", "PREEMPTED"),
                ABSENT,
                *_state("READY", "READY"),
            ],
            "ssh .*mkdir": [broken] * 5,
        }
    )
    assert tpu_vm.main(["job", *_flags(wheel, "v5e-4", "--spot"), "--", *TRAIN, "--workdir", "gs://b/run"]) == 0
    assert [seconds for seconds in fake.slept if 1 < seconds < 60][:4] == [5.0, 10.0, 20.0, 40.0]
    assert watch.STATE_LAG_SECONDS in fake.slept
    assert len(fake.runs()) == 1


def test_a_run_that_saved_a_checkpoint_is_restarted_on_the_same_tpu(fake, wheel):
    fake.plan({"describe": [ABSENT, *_state("READY", "READY", "READY", "READY", "READY")]})
    fake.exit_codes(75, 0)
    assert tpu_vm.main(["job", *_flags(wheel), "--", *TRAIN, "--workdir", "gs://b/run"]) == 0
    assert len(fake.runs()) == 2
    assert fake.verbs().count("create") == 1
    assert (fake.folder / "uv.log").read_text().count("pip install") == 1, "what is installed is not installed again"


def test_a_failing_command_is_not_restarted_and_names_the_worker(fake, wheel, capfd):
    fake.plan({"describe": [ABSENT, *_state(*["READY"] * 4)]})
    fake.exit_codes(2)
    assert tpu_vm.main(["job", *_flags(wheel), "--", *TRAIN, "--workdir", "gs://b/run"]) == 2
    assert len(fake.runs()) == 1
    errors = capfd.readouterr().err
    assert "failed on host-0 (2)" in errors
    assert "step 1 of worker 0" in errors
    assert fake.verbs()[-1] == "delete", "an idle TPU costs as much as a busy one"


def test_a_tpu_on_which_nothing_can_be_installed_is_deleted(fake, wheel, capfd):
    fake.plan({"describe": [ABSENT, *_state(*["READY"] * 3)]})
    (fake.folder / "bin" / "uv").write_text("#!/bin/sh\necho no such version >&2\nexit 1\n")
    assert tpu_vm.main(["job", *_flags(wheel), "--", *TRAIN, "--workdir", "gs://b/run"]) == 2
    assert "no such version" in capfd.readouterr().err.splitlines()[-1]
    assert fake.verbs()[-1] == "delete"
    assert fake.runs() == []


def test_keep_keeps_the_tpu(fake, wheel):
    fake.plan({"describe": [ABSENT, *_state(*["READY"] * 2)]})
    assert tpu_vm.main(["job", *_flags(wheel), "--keep", "--", *TRAIN, "--workdir", "gs://b/run"]) == 0
    assert "delete" not in fake.verbs()


def test_a_lost_slice_deletes_all_slices(fake, wheel, monkeypatch):
    monkeypatch.setenv("FAKE_WORKERS", "8")
    fake.plan({"describe n-1": _state("PREEMPTED", "PREEMPTED")})
    for worker in range(8):
        fake.exit_codes(134, 0, worker=worker)
    flags = _flags(wheel, "2xv5e-16", "--queued", "--spot")
    assert tpu_vm.main(["job", *flags, "--", *TRAIN, "--workdir", "gs://b/run"]) == 0
    verbs = [verb for verb in fake.verbs() if verb in ("create", "delete")]
    assert verbs == ["create", "delete", "create", "delete"]


@pytest.mark.parametrize(
    ("stderr", "tries", "says"),
    [
        ("ERROR: (x) UNAVAILABLE: The service is currently unavailable.", 5, "All retries failed"),
        ("ERROR: (x) INTERNAL: Internal error encountered.", 5, "All retries failed"),
        ("ERROR: (x) RESOURCE_EXHAUSTED: Quota exceeded for quota metric 'Requests' per minute", 5, "All retries"),
        (
            "ERROR: (x) RESOURCE_EXHAUSTED: Quota limit 'TPUV5' has been exceeded.",
            1,
            "IAM & Admin > Quotas",
        ),
        ("ERROR: (x) PERMISSION_DENIED: Permission 'tpu.nodes.create' denied on 'projects/p'", 1, "accelerator-types"),
        (
            "ERROR: (x) NOT_FOUND: Resource 'projects/p/locations/z/acceleratorTypes/v5litepod-4' was not found",
            1,
            "list --zone",
        ),
        ("ERROR: (x) You do not currently have an active account selected.", 1, "active account"),
    ],
)
def test_only_transient_failures_are_retried(fake, wheel, capfd, stderr, tries, says):
    fake.plan({" create ": [{"code": 1, "stderr": stderr + "\n"}] * 9})
    assert tpu_vm.main(["create", *_flags(wheel)]) == 2
    assert fake.verbs() == ["create"] * tries
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ")
    assert says in last


def test_transient_errors_are_forgotten(fake, wheel):
    passing = {"code": 1, "stderr": "ERROR: (x) UNAVAILABLE: 503\n"}
    fake.plan({" create ": [passing, passing, {}]})
    assert tpu_vm.main(["create", *_flags(wheel)]) == 0
    assert fake.slept == [5.0, 10.0]


def test_no_capacity_is_retried_until_the_time_limit(fake, wheel, capfd):
    none = {
        "code": 1,
        "stderr": 'ERROR: (x) {\n  "code": 8,\n  "message": "There is no more capacity in the zone \\"z\\""\n}\n',
    }
    fake.plan({"describe": [ABSENT] * 20, " create ": [none] * 20})
    flags = _flags(wheel, "v5e-4", "--wait", "0.5")
    assert tpu_vm.main(["job", *flags, "--", *TRAIN, "--workdir", "gs://b/run"]) == 2
    assert fake.verbs() == ["create"] * 7 + ["delete"] * 2
    assert "no TPU available within 0.5 hours" in capfd.readouterr().err


def test_a_queued_request_without_quota_ends_the_job(fake, wheel, capfd):
    failed = {
        "state": {"state": "FAILED", "failedData": {"error": {"message": "Quota limit 'TPUV5' has been exceeded."}}}
    }
    fake.plan({"describe": [{"stdout": json.dumps(failed)}]})
    assert tpu_vm.main(["job", *_flags(wheel, "v5e-4", "--queued"), "--", *TRAIN, "--workdir", "gs://b/run"]) == 2
    assert "TPUV5" in capfd.readouterr().err
    assert fake.verbs() == ["delete"], "a request that stays in the list may still be granted"


def test_delete_is_idempotent(fake, wheel):
    missing = {"code": 1, "stderr": "ERROR: (x) NOT_FOUND: Resource 'projects/p/locations/z/nodes/n' was not found\n"}
    fake.plan({"delete": [missing] * 2})
    assert tpu_vm.main(["delete", "--name", "n", "--zone", "z"]) == 0
    assert fake.verbs() == ["delete", "delete"]
    assert fake.slept == []


def test_a_running_command_is_not_started_twice(fake, wheel):
    (fake.folder / "bin" / "diffusion-lm").write_text(
        '#!/bin/bash\necho started >> "$FAKE_FOLDER/started"\nsleep 300\n'
    )
    fake.plan({"describe": [READY] * 2})
    assert tpu_vm.main(["install", *_flags(wheel)]) == 0
    from launch import cloud_tpu, commands, workers

    tpu = cloud_tpu.CloudTpu(commands.Shell(), "n", "z")
    assert "already" not in tpu.ssh(workers.start(["train"], {}))
    try:
        while not (fake.folder / "started").exists():
            pass
        assert "already running" in tpu.ssh(workers.start(["train"], {}))
        assert workers.read_outcomes(tpu.ssh(workers.outcome())) == {"host-0": "running"}
    finally:
        tpu.ssh(workers.stop(grace=5))
    assert (fake.folder / "started").read_text() == "started\n"
    assert workers.read_outcomes(tpu.ssh(workers.outcome())) == {"host-0": "143"}, "ended by SIGTERM"


def test_dry_run_prints_commands_that_a_shell_parses_and_runs_none(fake, wheel, capsys):
    flags = _flags(wheel, "v5e-16", "--spot", "--dry_run")
    assert tpu_vm.main(["job", *flags, "--", *TRAIN, "--workdir", "gs://b/a run"]) == 0
    assert fake.calls == []
    commands = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert [command[4] for command in commands] == [
        "create",
        "describe",
        "ssh",
        "scp",
        "ssh",
        "ssh",
        "ssh",
        "describe",
        "ssh",
        "delete",
        "delete",
    ]
    (start,) = [part for command in commands for part in command if "setsid" in part]
    inner = shlex.split(start)
    (script,) = [part for part in inner if "bin/diffusion-lm" in part]
    words = shlex.split(script.split("bin/diffusion-lm ")[1].split("; code=$?")[0])
    assert words == [*TRAIN, "--workdir", "gs://b/a run"]


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        (["--accelerator", "v5f-16"], "did you mean"),
        (["--zone", ""], "locations list"),
        (["--name", "Bad_Name"], "lower-case"),
        (["--wheel", "no.whl"], "make wheel"),
        (["--slices", "2"], "--queued"),
        (["--accelerator", "tpu7x-8"], "GKE"),
        (["--env", "1=2"], "NAME=VALUE"),
    ],
)
def test_errors_of_invalid_input_say_what_to_do(fake, wheel, capfd, changed, says):
    fake.plan({"describe": [ABSENT, READY]})
    assert tpu_vm.main(["job", *_flags(wheel), *changed, "--", *TRAIN, "--workdir", "gs://b/r"]) == 2
    assert says in capfd.readouterr().err
    assert fake.calls == []


@pytest.mark.parametrize(
    ("flags", "command", "says"),
    [
        (["v5e-16"], ["train", "--workdir", "runs/x"], "4 machines"),
        (["v5e-4", "--spot"], ["compare", "--workdir=/data/x"], "may be preempted"),
        (["v5e-4"], ["trian", "--workdir", "gs://b/x"], "did you mean train"),
        (["v5e-4"], ["train", "--workdri", "gs://b/x"], "--workdir"),
        (["v5e-4"], [], "no command"),
    ],
)
def test_the_command_is_checked_before_machines_are_requested(fake, wheel, capfd, flags, command, says):
    assert tpu_vm.main(["job", *_flags(wheel, *flags), "--", *command]) == 2
    assert says in capfd.readouterr().err
    assert fake.calls == []


def test_a_shared_file_system_is_accepted(fake, wheel):
    flags = _flags(wheel, "v5e-16", "--shared_folder", "--dry_run")
    assert tpu_vm.main(["job", *flags, "--", "train", "--workdir", "/mnt/filestore/x"]) == 0


@pytest.mark.parametrize(
    ("codes", "count", "verdict"),
    [
        ({"a": "0", "b": "0"}, 2, Verdict.DONE),
        ({"a": "0"}, 2, Verdict.RESTART),
        ({"a": "0", "b": "running"}, 2, Verdict.ENDING),
        ({"a": "running", "b": "running"}, 2, Verdict.RUNNING),
        ({"a": "75", "b": "75"}, 2, Verdict.RESTART),
        ({"a": "134", "b": "gone"}, 2, Verdict.RESTART),
        ({"a": "2", "b": "gone"}, 2, Verdict.FAILED),
        ({"a": "1", "b": "134"}, 2, Verdict.FAILED),
    ],
)
def test_verdicts_of_exit_codes(codes, count, verdict):
    assert watch.judge(codes, count) is verdict


def test_unusual_shapes_are_requested_by_shape(fake, wheel, capsys):
    assert tpu_vm.main(["create", *_flags(wheel, "v5p:4x4x12"), "--dry_run"]) == 0
    assert "--type=v5p --topology=4x4x12" in capsys.readouterr().out


def test_copied_files_are_in_the_working_directory(fake, wheel, tmp_path):
    mine = tmp_path / "mine.gin"
    mine.write_text("TrainRun.steps = 3\n")
    fake.plan({"describe": [READY, READY, READY]})
    assert tpu_vm.main(["job", *_flags(wheel), "--copy", str(mine), "--", *TRAIN, "--workdir", "gs://b/r"]) == 0
    assert fake.runs()[0]["files"] == ["mine.gin"]
