"""Writes the manifest of a job: a JobSet with one Job per slice and one Pod per machine, as xpk does.

JobSet (https://jobset.sigs.k8s.io) restarts all Jobs when one fails, gives the Pods DNS names through a headless
service, and places each Job on one node pool. GKE sets TPU_WORKER_ID, TPU_WORKER_HOSTNAMES and MEGASCALE_* in the Pods,
from which `jax.distributed` finds the other processes.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from diffusion_lm.core.errors import ConfigError, require
from diffusion_lm.planning.accelerators import Accelerator

LABELS = {
    "v3": "tpu-v3-slice",
    "v4": "tpu-v4-podslice",
    "v5e": "tpu-v5-lite-podslice",
    "v5p": "tpu-v5p-slice",
    "v6e": "tpu-v6e-slice",
    "tpu7x": "tpu7x",
}
"""Node pool label of each generation (https://cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus)."""

CONTAINER = "diffusion-lm"
SLICES = "slice-job"
WRONG_INPUT = 2
"""Exit code of `diffusion-lm` for invalid input; restarts do not help."""


def manifest(
    name: str,
    accelerator: Accelerator,
    command: Sequence[str],
    *,
    image: str,
    environment: Mapping[str, str],
    spot: bool = False,
    max_restarts: int = 100,
    grace_seconds: int = 300,
    queue: str | None = None,
    service_account: str | None = None,
    node_selector: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Returns the JobSet of a `diffusion-lm` command.

    Args:
      name: name of the JobSet.
      accelerator: type, shape and number of slices.
      command: verb and flags.
      image: container image with `diffusion-lm` on the PATH.
      environment: environment variables of the command.
      spot: use Spot node pools only.
      max_restarts: maximum restarts of all Pods, including those after preemptions.
      grace_seconds: seconds between SIGTERM, on which a run saves a checkpoint, and SIGKILL.
      queue: local queue of Kueue; clusters made by xpk have one.
      service_account: Kubernetes service account that can read and write the bucket.
      node_selector: additional labels of the node pool, e.g. of a reservation.

    Raises:
      ConfigError: GKE does not offer these slices.
    """
    kind = accelerator.generation.name
    if kind not in LABELS:
        raise ConfigError(f"GKE does not offer {kind}", where="--accelerator", fix=f"Use one of {', '.join(LABELS)}.")
    require(
        accelerator.slices == 1 or accelerator.hosts > 1,
        f"slices={accelerator.slices}: GKE only connects slices of several machines, not {accelerator.topology}",
        where="--slices",
        fix="Use one larger slice.",
    )
    labels = {"kueue.x-k8s.io/queue-name": queue} if queue else {}
    pod = {
        "restartPolicy": "Never",
        "hostNetwork": True,
        "dnsPolicy": "ClusterFirstWithHostNet",
        "terminationGracePeriodSeconds": grace_seconds,
        "nodeSelector": {
            "cloud.google.com/gke-tpu-accelerator": LABELS[kind],
            "cloud.google.com/gke-tpu-topology": "x".join(map(str, accelerator.shape)),
            **({"cloud.google.com/gke-spot": "true"} if spot else {}),
            **(node_selector or {}),
        },
        **({"tolerations": [_SPOT]} if spot else {}),
        **({"serviceAccountName": service_account} if service_account else {}),
        "containers": [_container(accelerator, command, image, environment)],
        # Grain's worker processes pass batches through shared memory, which is limited to 64 MiB in a Pod by default.
        "volumes": [{"name": "shared-memory", "emptyDir": {"medium": "Memory"}}],
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": name,
            "labels": labels,
            "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"},
        },
        "spec": {
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "failurePolicy": {
                "maxRestarts": max_restarts,
                "rules": [{"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
            },
            "replicatedJobs": [
                {
                    "name": SLICES,
                    "replicas": accelerator.slices,
                    "template": {
                        "spec": {
                            "parallelism": accelerator.hosts,
                            "completions": accelerator.hosts,
                            "completionMode": "Indexed",
                            "backoffLimit": 0,
                            "podFailurePolicy": {"rules": [_GIVE_UP]},
                            "template": {"spec": pod},
                        }
                    },
                }
            ],
        },
    }


_SPOT = {"key": "cloud.google.com/gke-spot", "operator": "Equal", "value": "true", "effect": "NoSchedule"}
_GIVE_UP = {
    "action": "FailJob",
    "onExitCodes": {"containerName": CONTAINER, "operator": "In", "values": [WRONG_INPUT]},
}


def _container(
    accelerator: Accelerator, command: Sequence[str], image: str, environment: Mapping[str, str]
) -> dict[str, Any]:
    several = {"DIFFUSION_LM_MULTIHOST": "1"} if accelerator.hosts * accelerator.slices > 1 else {}
    chips = str(accelerator.chips_per_host)
    return {
        "name": CONTAINER,
        "image": image,
        # No shell in between, because it would have to forward SIGTERM.
        "command": [_literal(word) for word in ["diffusion-lm", *command]],
        "env": [{"name": key, "value": _literal(value)} for key, value in (several | dict(environment)).items()],
        "ports": [{"containerPort": port} for port in (8471, 8080)],
        "securityContext": {"privileged": True},
        "resources": {"requests": {"google.com/tpu": chips}, "limits": {"google.com/tpu": chips}},
        "volumeMounts": [{"name": "shared-memory", "mountPath": "/dev/shm"}],
    }


def _literal(word: str) -> str:
    """Escapes `$(NAME)`, which Kubernetes would replace by a variable, as `$$(NAME)`."""
    return word.replace("$(", "$$(")
