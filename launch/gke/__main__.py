"""Runs a `diffusion-lm` command on TPU node pools of a GKE cluster.

  python -m launch.gke apply --name ar2diff --accelerator v5e-16 --image IMAGE \\
    -- compare --gin_file gin/recipes/ar2diff_base.gin --workdir gs://BUCKET/ar2diff_base

The cluster needs JobSet (clusters made by xpk have it) and node pools of that TPU; `kubectl` must point at it. The
JobSet starts all Pods again when one is preempted, and the command goes on from its run folder. `manifest` prints
what `apply` applies; launch/gke/Dockerfile makes the image.
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
    parser = job.parser_of("gke", __doc__, _VERBS, of="of the JobSet")
    parser.add_argument("--namespace", help="default: that of kubectl's configuration")
    parser.add_argument("--context", help="cluster, as kubectl calls it (default: its current one)")
    parser.add_argument("--accelerator", help="as for `diffusion-lm plan --topology`: v5e-16, v5p:4x4x8, 2xv5e-256")
    parser.add_argument("--slices", type=int, default=1, metavar="N", help="slices of that size, each a node pool")
    parser.add_argument("--image", help="container image")
    parser.add_argument("--spot", action="store_true", help="only on Spot node pools")
    parser.add_argument("--queue", metavar="NAME", help="Kueue's local queue (xpk's is multislice-queue)")
    parser.add_argument("--service_account", metavar="NAME", help="Kubernetes service account that may use the bucket")
    parser.add_argument(
        "--node_selector", action="append", default=[], metavar="LABEL=VALUE", help="of the nodes; may be repeated"
    )
    parser.add_argument("--max_restarts", type=int, default=100, metavar="N", help="of all Pods (default 100)")
    parser.add_argument("--grace", type=int, default=300, metavar="SECONDS", help="to save after SIGTERM (default 300)")
    parser.add_argument("--all", action="store_true", help="logs: of all Pods, not only of the first")
    return parser


def _manifest(arguments: argparse.Namespace) -> dict[str, Any]:
    require(arguments.accelerator, "it is not said which TPU to use", where="--accelerator", fix="Give e.g. v5e-16.")
    require(
        arguments.image,
        "it is not said which image to run",
        where="--image",
        fix="Build one: docker build -f launch/gke/Dockerfile.",
    )
    selectors = [text.partition("=") for text in arguments.node_selector]
    require(
        all(label and equals for label, equals, _ in selectors),
        "a node selector is no LABEL=VALUE",
        where="--node_selector",
        fix="Write e.g. cloud.google.com/reservation-name=NAME.",
    )
    return manifest(
        arguments.name,
        parse(arguments.accelerator, arguments.slices),
        # A Pod's own disk does not outlive it, so this holds for one machine too.
        job.command_of(arguments, why_shared="Pods come and go"),
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
    fix = "A JobSet cannot be changed: `delete` it first; the run goes on from its run folder. Is JobSet installed?"
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
    # JSON is YAML; kubectl takes both, and nothing has to be quoted twice.
    return json.dumps(value, indent=2) + "\n"


def _kubectl(arguments: argparse.Namespace, *words: str) -> list[str]:
    context = [f"--context={arguments.context}"] if arguments.context else []
    namespace = [f"--namespace={arguments.namespace}"] if arguments.namespace else []
    return ["kubectl", *words, *context, *namespace]


_Verb = Callable[[Shell, argparse.Namespace], int]
_VERBS: dict[str, tuple[str, _Verb]] = {
    "apply": ("start the job", _apply),
    "manifest": ("print what `apply` applies", _print),
    "logs": ("follow the log", _logs),
    "status": ("show the JobSet and its Pods", _status),
    "delete": ("end the job, if there is one; a run saves itself first", _delete),
}

if __name__ == "__main__":
    sys.exit(main())
