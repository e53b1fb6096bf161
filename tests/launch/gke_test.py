"""launch.gke: the manifest as Kubernetes parses it, and the calls of a fake kubectl."""

import json
import shlex

import pytest
import yaml

from diffusion_lm.planning.accelerators import parse
from launch.gke import __main__ as gke
from launch.gke.jobset import manifest

TRAIN = [
    "train",
    "--gin_file",
    "a.gin",
    '--gin.NOTE="it\'s $(HOME) $HOME"',
    '--gin.NAME="x y"',
    "--workdir",
    "gs://b/r",
]
FLAGS = ["--name", "job-1", "--accelerator", "2xv5e-16", "--image", "r/i:1"]


def _applied(fake):
    (call,) = fake.calls
    assert call["program"] == "kubectl"
    return call


def test_apply_passes_the_manifest_to_kubectl(fake):
    assert gke.main(["apply", *FLAGS, "--env", "A=b c", "--context", "c", "--", *TRAIN]) == 0
    call = _applied(fake)
    assert call["arguments"] == ["apply", "--filename=-", "--context=c"]
    found = yaml.safe_load(call["stdin"])
    assert (found["apiVersion"], found["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (slices,) = found["spec"]["replicatedJobs"]
    template = slices["template"]["spec"]
    assert (slices["replicas"], template["parallelism"], template["completions"]) == (2, 4, 4)
    assert template["backoffLimit"] == 0, "JobSet restarts, not the Job"
    pod = template["template"]["spec"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "4x4",
    }
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == {"google.com/tpu": "4"}
    assert container["env"] == [{"name": "DIFFUSION_LM_MULTIHOST", "value": "1"}, {"name": "A", "value": "b c"}]
    assert [_expanded(word) for word in container["command"]] == ["diffusion-lm", *TRAIN]
    assert "$$(HOME)" in container["command"][4]


def _expanded(word):
    """Unescapes `$$(` as Kubernetes does; a single `$(NAME)` would be replaced by a variable."""
    assert "$(" not in word.replace("$$(", "")
    return word.replace("$$(", "$(")


@pytest.mark.parametrize(
    ("name", "label", "topology", "hosts", "chips"),
    [
        ("v5e-256", "tpu-v5-lite-podslice", "16x16", 64, 4),
        ("v5e-8", "tpu-v5-lite-podslice", "2x4", 2, 4),
        ("v4-16", "tpu-v4-podslice", "2x2x2", 2, 4),
        ("v5p-128", "tpu-v5p-slice", "4x4x4", 16, 4),
        ("v6e-32", "tpu-v6e-slice", "4x8", 8, 4),
        ("v6e-1", "tpu-v6e-slice", "1x1", 1, 1),
        ("tpu7x-8", "tpu7x", "2x2x1", 1, 4),
        ("v5p:4x4x12", "tpu-v5p-slice", "4x4x12", 48, 4),
    ],
)
def test_slices_as_in_the_tables_of_gke_and_xpk(name, label, topology, hosts, chips):
    spec = manifest("n", parse(name), ["doctor"], image="i", environment={})["spec"]["replicatedJobs"][0]["template"][
        "spec"
    ]
    pod = spec["template"]["spec"]
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-accelerator"] == label
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == topology
    assert spec["parallelism"] == hosts
    assert pod["containers"][0]["resources"]["limits"]["google.com/tpu"] == str(chips)
    alone = not any(variable["name"] == "DIFFUSION_LM_MULTIHOST" for variable in pod["containers"][0]["env"])
    assert alone == (hosts == 1)


def test_invalid_input_is_not_restarted():
    spec = manifest("n", parse("v5e-16"), ["doctor"], image="i", environment={}, max_restarts=7)["spec"]
    assert spec["failurePolicy"]["maxRestarts"] == 7
    (rule,) = spec["failurePolicy"]["rules"]
    assert rule == {"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    job = spec["replicatedJobs"][0]["template"]["spec"]
    (policy,) = job["podFailurePolicy"]["rules"]
    assert policy["onExitCodes"]["values"] == [2]
    names = [container["name"] for container in job["template"]["spec"]["containers"]]
    assert policy["onExitCodes"]["containerName"] in names
    assert job["template"]["spec"]["restartPolicy"] == "Never", "Kubernetes wants it with a podFailurePolicy"


def test_spot_queue_and_accounts(fake, capsys):
    more = ["--spot", "--queue", "q", "--service_account", "s", "--node_selector", "a/b=c", "--grace", "60"]
    assert gke.main(["manifest", *FLAGS, *more, "--", *TRAIN]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "q"}
    pod = found["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    assert pod["nodeSelector"]["a/b"] == "c"
    assert pod["tolerations"][0]["key"] == "cloud.google.com/gke-spot"
    assert (pod["serviceAccountName"], pod["terminationGracePeriodSeconds"]) == ("s", 60)
    assert fake.calls == []


def test_dry_run_prints_commands_that_a_shell_parses(fake, capsys):
    assert gke.main(["apply", *FLAGS, "--dry_run", "--", *TRAIN]) == 0
    first, *rest = capsys.readouterr().out.splitlines()
    assert shlex.split(first.split(" <<")[0]) == ["kubectl", "apply", "--filename=-"]
    assert rest[-1] == "END"
    assert json.loads("\n".join(rest[:-1]))["kind"] == "JobSet"
    assert fake.calls == []


def test_logs_status_and_delete(fake):
    for verb in ("logs", "status", "delete"):
        assert gke.main([verb, "--name", "job-1", "--namespace", "n"]) == 0
    logs, _, pods, delete = [call["arguments"] for call in fake.calls]
    assert "jobset.sigs.k8s.io/jobset-name=job-1" in logs[1]
    assert "--follow" in logs
    assert pods[:2] == ["get", "pods"]
    assert delete == ["delete", "jobset", "job-1", "--ignore-not-found", "--namespace=n"], "again and again"


def test_an_existing_job_is_not_changed(fake, capfd):
    stderr = 'The JobSet "job-1" is invalid: spec.replicatedJobs: Invalid value: []: field is immutable\n'
    fake.plan({"apply": [{"code": 1, "stderr": stderr}]})
    assert gke.main(["apply", *FLAGS, "--", *TRAIN]) == 2
    assert "`delete` it first" in capfd.readouterr().err
    assert len(fake.calls) == 1


def test_an_unreachable_server_is_retried(fake):
    fake.plan({"apply": [{"code": 1, "stderr": "Unable to connect to the server: net/http: TLS handshake timeout\n"}]})
    assert gke.main(["apply", *FLAGS, "--", *TRAIN]) == 0
    assert len(fake.calls) == 2


@pytest.mark.parametrize(
    ("changed", "command", "says"),
    [
        (["--accelerator", "v5f-16"], TRAIN, "did you mean"),
        (["--accelerator", "v5e-4", "--slices", "2"], TRAIN, "larger slice"),
        (["--image", ""], TRAIN, "Dockerfile"),
        (["--name", "A"], TRAIN, "lower-case"),
        (["--node_selector", "x"], TRAIN, "LABEL=VALUE"),
        (["--accelerator", "v5e-4"], ["train", "--workdir", "runs/x"], "the disk of a Pod is deleted"),
    ],
)
def test_errors_of_invalid_input_say_what_to_do(fake, capfd, changed, command, says):
    assert gke.main(["apply", *FLAGS, *changed, "--", *command]) == 2
    assert says in capfd.readouterr().err
    assert fake.calls == []
