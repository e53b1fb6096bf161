"""Manages one Cloud TPU, or several slices of one request, with `gcloud compute tpus`.

`tpu-vm create` requests a TPU immediately and fails without capacity. `queued-resources create` waits for capacity and
is the only way to get several slices. Flags: https://cloud.google.com/sdk/gcloud/reference/compute/tpus
"""

import dataclasses
import enum
import json
from collections.abc import Sequence
from typing import Any

from diffusion_lm.core.errors import ConfigError
from diffusion_lm.planning.accelerators import Accelerator, parse
from launch.commands import Cause, CommandError, Shell

RUNTIMES = {
    "v3": "tpu-ubuntu2204-base",
    "v4": "tpu-ubuntu2204-base",
    "v5e": "v2-alpha-tpuv5-lite",
    "v5p": "v2-alpha-tpuv5",
    "v6e": "v2-alpha-tpuv6e",
}
"""TPU software version for JAX of each generation (https://cloud.google.com/tpu/docs/runtimes); TPU7x needs GKE."""

# Without these timeouts, ssh would wait for hours for a host that no longer exists.
_SSH = ("--ssh-flag=-oConnectTimeout=30", "--ssh-flag=-oServerAliveInterval=30", "--ssh-flag=-oServerAliveCountMax=4")
_SCP = tuple(flag.replace("--ssh-flag", "--scp-flag") for flag in _SSH)


class Phase(enum.Enum):
    """The phases of a TPU that a job distinguishes; several states of Cloud map to one phase."""

    ABSENT = "absent"
    PENDING = "pending"
    READY = "ready"
    LOST = "lost"
    DELETING = "deleting"


# Unknown states count as PENDING. If the service adds a state, the job waits instead of deleting the TPU.
_PHASES = {
    "READY": Phase.READY,
    "ACTIVE": Phase.READY,
    "PREEMPTED": Phase.LOST,
    "TERMINATED": Phase.LOST,
    "STOPPED": Phase.LOST,
    "SUSPENDED": Phase.LOST,
    "FAILED": Phase.LOST,
    "DELETING": Phase.DELETING,
    "SUSPENDING": Phase.DELETING,
    "STOPPING": Phase.DELETING,
}


@dataclasses.dataclass(frozen=True)
class State:
    """State of a TPU: its phase, Cloud's name of the state, and the reason of a failure."""

    phase: Phase
    name: str
    reason: str = ""

    def __str__(self) -> str:
        return self.name + (f" ({self.reason})" if self.reason else "")


@dataclasses.dataclass(frozen=True)
class CloudTpu:
    """A Cloud TPU, identified by its name.

    Attributes:
      shell: runs gcloud.
      name: name of the node, or of the queued resource and the prefix of its node names.
      zone: Cloud zone.
      project: Cloud project; None = that of the gcloud configuration.
      queued: whether to use queued resources.
    """

    shell: Shell
    name: str
    zone: str
    project: str | None = None
    queued: bool = False

    def create(
        self,
        accelerator: Accelerator,
        *,
        spot: bool = False,
        runtime: str | None = None,
        extra: Sequence[str] = (),
    ) -> None:
        """Requests the TPU; does nothing if it exists already.

        Raises:
          ConfigError: Cloud's TPU API does not offer these slices, or refuses the request.
        """
        self.require_offered(accelerator)
        kind = accelerator.generation.name
        if self.queued:
            nodes = (
                [f"--node-count={accelerator.slices}", f"--node-prefix={self.name}"]
                if accelerator.slices > 1
                else [f"--node-id={self.name}"]
            )
            image = f"--runtime-version={runtime or RUNTIMES[kind]}"
        else:
            nodes, image = [], f"--version={runtime or RUNTIMES[kind]}"
        flags = [*nodes, *_slice_flags(accelerator), image, *(["--spot"] if spot else []), *extra]
        try:
            self.shell.run(self._gcloud("create", self.name, *flags), fix=self._fix_request())
        except CommandError as error:
            if error.cause is not Cause.EXISTS:
                raise

    def require_offered(self, accelerator: Accelerator) -> None:
        """Raises `ConfigError` if Cloud's TPU API does not offer these slices."""
        kind = accelerator.generation.name
        if accelerator.slices > 1 and not self.queued:
            raise ConfigError(
                f"slices={accelerator.slices}: several slices need a queued request",
                where="--slices",
                fix="Add --queued.",
            )
        if kind not in RUNTIMES:
            raise ConfigError(f"{kind} is only available through GKE", where="--accelerator", fix="Use launch.gke.")

    def describe(self, node: str | None = None) -> State:
        """Returns the state of the TPU, or of one of its nodes."""
        group = None if node is None else "tpu-vm"
        expected = '{"state": "ACTIVE"}' if self.queued else '{"state": "READY"}'
        try:
            argv = self._gcloud("describe", node or self.name, "--format=json", group=group)
            answer = self.shell.run(argv, expect=expected)
        except CommandError as error:
            if error.cause is Cause.MISSING:
                return State(Phase.ABSENT, "absent")
            raise
        return _state(json.loads(answer))

    def lost_node(self, slices: int) -> State | None:
        """Returns the state of the first lost node, or None. A queued resource can stay ACTIVE when a node is lost."""
        if not self.queued or self.shell.dry_run:
            return None
        names = [f"{self.name}-{index}" for index in range(slices)] if slices > 1 else [self.name]
        states = (self.describe(name) for name in names)
        return next((state for state in states if state.phase not in (Phase.READY, Phase.PENDING)), None)

    def delete(self) -> None:
        """Deletes the TPU and its queued resource; does nothing if they do not exist."""
        # A TPU may have been created with or without a queued resource in an earlier call, so try both.
        forced = self._gcloud("delete", self.name, "--force", group="queued-resources")
        for argv in [forced] if self.queued else [forced, self._gcloud("delete", self.name, group="tpu-vm")]:
            try:
                self.shell.run(argv)
            except CommandError as error:
                if error.cause is not Cause.MISSING:
                    raise

    def ssh(self, command: str, *, worker: str = "all", expect: str = "") -> str:
        """Runs a shell command on all workers, or on worker 0 of slice 0, and returns their output."""
        return self.shell.run(self._ssh(command, worker), expect=expect)

    def follow(self, command: str) -> int:
        """Runs a shell command on worker 0 with its output on this terminal; returns its exit code."""
        return self.shell.follow(self._ssh(command, "0"))

    def copy(self, paths: Sequence[str], folder: str) -> None:
        """Copies files into a directory in the home of all workers."""
        where = self._where("all")
        self.shell.run(self._gcloud("scp", *paths, f"{self.name}:{folder}/", *where, *_SCP))

    def _ssh(self, command: str, worker: str) -> list[str]:
        return self._gcloud("ssh", self.name, *self._where(worker), *_SSH, f"--command={command}")

    def _where(self, worker: str) -> list[str]:
        return [f"--worker={worker}", *([f"--node={worker}"] if self.queued else [])]

    def _gcloud(self, verb: str, *arguments: str, group: str | None = None) -> list[str]:
        group = group or ("queued-resources" if self.queued else "tpu-vm")
        project = [f"--project={self.project}"] if self.project else []
        return ["gcloud", "compute", "tpus", group, verb, *arguments, f"--zone={self.zone}", *project, "--quiet"]

    def _fix_request(self) -> str:
        return (
            f"List the types of the zone with gcloud compute tpus accelerator-types list --zone={self.zone}; see your "
            "quota in the console under IAM & Admin > Quotas (tpu.googleapis.com); add --queued to wait for capacity."
        )


def _slice_flags(accelerator: Accelerator) -> list[str]:
    """Returns the flags for the TPU type: by size if the size implies this shape, else by generation and shape."""
    name = accelerator.cloud_name
    try:
        usual = parse(name).shape == accelerator.shape
    except ConfigError:
        usual = False
    if usual:
        return [f"--accelerator-type={name}"]
    return [f"--type={name.split('-')[0]}", f"--topology={'x'.join(map(str, accelerator.shape))}"]


def _state(answer: dict[str, Any]) -> State:
    found = answer.get("state", "UNKNOWN")
    reason = ""
    if isinstance(found, dict):  # the state of a queued resource is an object
        reason = found.get("failedData", {}).get("error", {}).get("message", "")
        found = found.get("state", "UNKNOWN")
    return State(_PHASES.get(found, Phase.PENDING), found, reason)
