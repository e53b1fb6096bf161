"""Runs a `diffusion-lm` command on TPU node pools of a GKE cluster.

  python -m launch.gke apply --name ar2diff --accelerator v5e-16 --image IMAGE \\
    -- compare --gin_file gin/recipes/ar2diff_base.gin --workdir gs://BUCKET/ar2diff_base

The cluster needs JobSet (clusters made by xpk have it) and node pools with these TPUs, and must be the current cluster
of `kubectl`. When a Pod is preempted, the JobSet restarts all Pods, and the command resumes from its run directory.
`manifest` prints the manifest that `apply` applies. launch/gke/Dockerfile builds the image.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

from diffusion_lm.core.errors import require
from diffusion_lm.planning.accelerators import parse
from launch import job
from launch.commands import Shell
from launch.gke.jobset import CONTAINER, manifest


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a verb and returns the exit code."""
    return job.run(_parser(), argv, lambda shell, arguments: _VERBS[arguments.verb][1](shell, arguments))


def _parser() -> argparse.ArgumentParser:
    parser = job.parser_of("gke", __doc__, _VERBS, of="name of the JobSet")
    parser.add_argument("--namespace", help="Kubernetes namespace (default: that of the kubectl configuration)")
    parser.add_argument("--context", help="kubectl context of the cluster (default: the current one)")
    parser.add_argument("--accelerator", help="type and size as in `plan --topology`: v5e-16, v5p:4x4x8, 2xv5e-256")
    parser.add_argument("--slices", type=int, default=1, metavar="N", help="number of slices, one node pool each")
    parser.add_argument("--image", help="container image")
    parser.add_argument("--spot", action="store_true", help="use Spot node pools only")
    parser.add_argument("--queue", metavar="NAME", help="local queue of Kueue (multislice-queue in xpk clusters)")
    parser.add_argument("--service_account", metavar="NAME", help="Kubernetes service account with bucket access")
    parser.add_argument(
        "--node_selector",
        action="append",
        default=[],
        metavar="LABEL=VALUE",
        help="additional label of the nodes; may be repeated",
    )
    parser.add_argument(
        "--max_restarts", type=int, default=100, metavar="N", help="maximum restarts of all Pods (default: 100)"
    )
    parser.add_argument(
        "--grace", type=int, default=300, metavar="SECONDS", help="time to save after SIGTERM (default: 300)"
    )
    parser.add_argument("--all", action="store_true", help="logs: show all Pods, not only the first")
    return parser


def _manifest(arguments: argparse.Namespace) -> dict[str, Any]:
    require(arguments.accelerator, "no accelerator given", where="--accelerator", fix="Pass e.g. v5e-16.")
    require(
        arguments.image,
        "no container image given",
        where="--image",
        fix="Build one: docker build -f launch/gke/Dockerfile.",
    )
    selectors = [text.partition("=") for text in arguments.node_selector]
    require(
        all(label and equals for label, equals, _ in selectors),
        f"{arguments.node_selector}: node selectors must be LABEL=VALUE",
        where="--node_selector",
        fix="Write e.g. cloud.google.com/reservation-name=NAME.",
    )
    return manifest(
        arguments.name,
        parse(arguments.accelerator, arguments.slices),
        # The disk of a Pod is deleted with it, so one machine needs shared storage too.
        job.command_of(arguments, why_shared="the disk of a Pod is deleted with it"),
        image=arguments.image,
        environment=job.environment_of(arguments),
        spot=arguments.spot,
        max_restarts=arguments.max_restarts,
        grace_seconds=arguments.grace,
        queue=arguments.queue,
        service_account=arguments.service_account,
        node_selector={label: value for label, _, value in selectors},
    )


def _print(shell: Shell, arguments: argparse.Namespace) -> int:
    print(_text(_manifest(arguments)), end="")
    return 0


def _apply(shell: Shell, arguments: argparse.Namespace) -> int:
    text = _text(_manifest(arguments))
    fix = "Check that JobSet is installed. A JobSet cannot be changed: `delete` it first; the run then resumes."
    print(shell.run(_kubectl(arguments, "apply", "--filename=-"), stdin=text, fix=fix), end="")
    return 0


def _logs(shell: Shell, arguments: argparse.Namespace) -> int:
    labels = [f"jobset.sigs.k8s.io/jobset-name={arguments.name}"]
    if not arguments.all:
        labels += ["jobset.sigs.k8s.io/job-index=0", "batch.kubernetes.io/job-completion-index=0"]
    flags = [f"--selector={','.join(labels)}", f"--container={CONTAINER}", "--tail=-1", "--follow"]
    return shell.follow(
        _kubectl(arguments, "logs", *flags, *(["--prefix", "--max-log-requests=1000"] if arguments.all else []))
    )


def _status(shell: Shell, arguments: argparse.Namespace) -> int:
    selector = f"--selector=jobset.sigs.k8s.io/jobset-name={arguments.name}"
    print(shell.run(_kubectl(arguments, "get", "jobset", arguments.name)), end="")
    print(shell.run(_kubectl(arguments, "get", "pods", selector, "--output=wide")), end="")
    return 0


def _delete(shell: Shell, arguments: argparse.Namespace) -> int:
    print(shell.run(_kubectl(arguments, "delete", "jobset", arguments.name, "--ignore-not-found")), end="")
    return 0


def _text(value: dict[str, Any]) -> str:
    # kubectl accepts JSON, which needs no YAML quoting.
    return json.dumps(value, indent=2) + "\n"


def _kubectl(arguments: argparse.Namespace, *words: str) -> list[str]:
    context = [f"--context={arguments.context}"] if arguments.context else []
    namespace = [f"--namespace={arguments.namespace}"] if arguments.namespace else []
    return ["kubectl", *words, *context, *namespace]


_Verb = Callable[[Shell, argparse.Namespace], int]
_VERBS: dict[str, tuple[str, _Verb]] = {
    "apply": ("start the job", _apply),
    "manifest": ("print the manifest", _print),
    "logs": ("follow the log", _logs),
    "status": ("show the JobSet and its Pods", _status),
    "delete": ("delete the job if it exists; a run saves a checkpoint first", _delete),
}

if __name__ == "__main__":
    sys.exit(main())
