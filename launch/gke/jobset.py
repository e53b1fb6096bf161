"""The manifest of a job: a JobSet with one Job a slice and one Pod a machine, as xpk makes them.

JobSet (https://jobset.sigs.k8s.io) restarts all Jobs when one fails, gives the Pods names in DNS by a headless
service, and places each Job on one node pool. GKE tells the Pods who they are (TPU_WORKER_ID, TPU_WORKER_HOSTNAMES,
MEGASCALE_*), from which `jax.distributed` finds the others.
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
"""What node pools call each generation (https://cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus)."""

CONTAINER = "diffusion-lm"
SLICES = "slice-job"
WRONG_INPUT = 2
"""The exit code of `diffusion-lm` after which no restart helps."""


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
      name: of the JobSet.
      accelerator: which slices, and how many.
      command: verb and flags.
      image: whose entry point is `diffusion-lm`, or that has it on the path.
      environment: variables of the command.
      spot: only on Spot node pools.
      max_restarts: how often all Pods may be started again, preemptions included.
      grace_seconds: between SIGTERM, on which a run saves itself, and SIGKILL.
      queue: Kueue's local queue, as xpk's clusters have one.
      service_account: Kubernetes' one, which may read and write the bucket.
      node_selector: more labels of the node pool, e.g. of a reservation.

    Raises:
      ConfigError: GKE has no such slices.
    """
    kind = accelerator.generation.name
    if kind not in LABELS:
        raise ConfigError(f"GKE has no {kind}", where="--accelerator", fix=f"Use one of {', '.join(LABELS)}.")
    require(
        accelerator.slices == 1 or accelerator.hosts > 1,
        f"GKE joins only slices of several machines, and {accelerator.topology} is one",
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
        # Grain's reader processes hand batches over in shared memory, of which a Pod has 64 MiB by default.
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
        # Started without a shell: it would have to hand SIGTERM on.
        "command": [_literal(word) for word in ["diffusion-lm", *command]],
        "env": [{"name": key, "value": _literal(value)} for key, value in (several | dict(environment)).items()],
        "ports": [{"containerPort": port} for port in (8471, 8080)],
        "securityContext": {"privileged": True},
        "resources": {"requests": {"google.com/tpu": chips}, "limits": {"google.com/tpu": chips}},
        "volumeMounts": [{"name": "shared-memory", "mountPath": "/dev/shm"}],
    }


def _literal(word: str) -> str:
    """Kubernetes puts variables in place of `$(NAME)`, unless the dollar is doubled."""
    return word.replace("$(", "$$(")
