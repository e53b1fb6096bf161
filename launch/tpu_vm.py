"""Runs a `diffusion-lm` command on a Cloud TPU: one verb for the whole job, or one for each step of it.

  make wheel
  python -m launch.tpu_vm job --name ar2diff --zone us-west4-a --accelerator v5e-16 --spot --queued \\
    -- compare --gin_file gin/recipes/ar2diff_base.gin --workdir gs://BUCKET/ar2diff_base

`job` creates the TPU, installs the wheel on all workers, starts the command, follows its log and deletes the TPU when
the command has ended. A TPU that is taken away is deleted, created again and given the same command, which goes on
from its run folder; `job` itself can be stopped and started again at any time. `--dry_run` prints all commands.
Exit code: the command's; 2 for a wrong input or a refusal of Cloud's.
"""

import argparse
import contextlib
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from diffusion_lm.core.errors import ConfigError, require
from diffusion_lm.planning.accelerators import Accelerator, parse
from launch import job, watch, workers
from launch.cloud_tpu import CloudTpu, Phase
from launch.commands import CommandError, Meaning, Shell, meaning

ROOT = Path(__file__).parents[1]
POLL_SECONDS = 30.0
CAPACITY_SECONDS = 300.0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a verb and returns the exit code."""
    paid = "stopped watching; what was started goes on and costs money until `delete`"
    return job.run(_parser(), argv, _run, interrupted=paid)


def _parser() -> argparse.ArgumentParser:
    parser = job.parser_of("tpu_vm", __doc__, _VERBS, of="of the TPU")
    parser.add_argument("--zone", help="where, e.g. us-west4-a")
    parser.add_argument("--project", help="default: that of gcloud's configuration")
    parser.add_argument("--accelerator", help="as for `diffusion-lm plan --topology`: v5e-16, v4-32, 2xv5e-256")
    parser.add_argument("--slices", type=int, default=1, metavar="N", help="slices of that size (needs --queued)")
    parser.add_argument("--spot", action="store_true", help="cheaper, and may be taken away at any time")
    parser.add_argument("--queued", action="store_true", help="wait in the queue until there is one")
    parser.add_argument("--runtime", help="image of the machines (default: the one for JAX)")
    parser.add_argument(
        "--gcloud_flag",
        action="append",
        default=[],
        metavar="FLAG",
        help="passed on to `create`; may be repeated, e.g. --gcloud_flag=--reserved",
    )
    parser.add_argument("--wheel", type=Path, help="default: the one in dist/ (make wheel)")
    parser.add_argument("--constraints", type=Path, default=ROOT / "constraints.txt", help="the locked versions")
    parser.add_argument("--python", default="3.11", metavar="VERSION", help="Python on the workers (default 3.11)")
    parser.add_argument(
        "--copy",
        action="append",
        default=[],
        metavar="FILE",
        help="put this file, e.g. a gin file, where the command runs; may be repeated",
    )
    parser.add_argument("--wait", type=float, default=24.0, metavar="HOURS", help="for a TPU, each time (default 24)")
    parser.add_argument("--max_restarts", type=int, default=100, metavar="N", help="of one job (default 100)")
    parser.add_argument("--keep", action="store_true", help="do not delete the TPU when the job has ended")
    return parser


def _run(shell: Shell, arguments: argparse.Namespace) -> int:
    require(
        arguments.zone,
        "it is not said where the TPU is",
        where="--zone",
        fix="See `gcloud compute tpus locations list`.",
    )
    tpu = CloudTpu(shell, arguments.name, arguments.zone, arguments.project, arguments.queued)
    return _VERBS[arguments.verb][1](tpu, arguments)


def _accelerator(arguments: argparse.Namespace) -> Accelerator:
    require(
        arguments.accelerator,
        "it is not said which TPU to use",
        where="--accelerator",
        fix="Give a generation and a size, e.g. v5e-16; `diffusion-lm plan` says what fits on it.",
    )
    return parse(arguments.accelerator, arguments.slices)


def _command(arguments: argparse.Namespace) -> tuple[list[str], dict[str, str]]:
    accelerator = _accelerator(arguments)
    why = "its TPU may be taken away" if arguments.spot else ""
    why = f"there are {accelerator.vms} machines" if accelerator.vms > 1 else why
    command = job.command_of(arguments, why_shared=why)
    several = {"DIFFUSION_LM_MULTIHOST": "1"} if accelerator.vms > 1 else {}
    return command, several | job.environment_of(arguments)


def _create(tpu: CloudTpu, arguments: argparse.Namespace) -> int:
    tpu.create(_accelerator(arguments), spot=arguments.spot, runtime=arguments.runtime, extra=arguments.gcloud_flag)
    return 0


def _files(arguments: argparse.Namespace) -> Path:
    """Returns the wheel, once it and the other files to copy are known to be there."""
    wheel: Path = arguments.wheel or next(iter(sorted((ROOT / "dist").glob("*.whl"))), ROOT / "dist" / "*.whl")
    require(wheel.is_file(), f"there is no wheel {wheel}", where="--wheel", fix="Build it with `make wheel`.")
    for name in [arguments.constraints, *arguments.copy]:
        require(Path(name).is_file(), f"there is no file {name}", where="--constraints, --copy", fix="Check the path.")
    return wheel


def _install(tpu: CloudTpu, arguments: argparse.Namespace) -> int:
    wheel = _files(arguments)
    tpu.ssh(workers.prepare())
    tpu.copy([str(wheel), str(arguments.constraints)], workers.FOLDER)
    if arguments.copy:
        tpu.copy(arguments.copy, f"{workers.FOLDER}/run")
    tpu.ssh(workers.install(wheel, arguments.constraints, arguments.python))
    return 0


def _start(tpu: CloudTpu, arguments: argparse.Namespace) -> int:
    command, environment = _command(arguments)
    tpu.ssh(workers.start(command, environment))
    verdict, found = watch.follow(tpu, _accelerator(arguments).vms)
    return watch.conclude(tpu, verdict, found)


def _logs(tpu: CloudTpu, arguments: argparse.Namespace) -> int:
    return tpu.follow(workers.follow())


def _status(tpu: CloudTpu, arguments: argparse.Namespace) -> int:
    state = tpu.describe()
    tpu.shell.say(f"{tpu.name}: {state}")
    if state.phase is Phase.READY:
        print(tpu.ssh(workers.outcome()), end="")
    return 0


def _stop(tpu: CloudTpu, arguments: argparse.Namespace) -> int:
    tpu.ssh(workers.stop())
    return 0


def _delete(tpu: CloudTpu, arguments: argparse.Namespace) -> int:
    tpu.delete()
    return 0


def _job(tpu: CloudTpu, arguments: argparse.Namespace) -> int:
    """Checks all that can be checked here, then runs, then deletes the TPU, however it went."""
    command, environment = _command(arguments)
    _files(arguments)
    tpu.require_offered(_accelerator(arguments))
    try:
        code = _run_to_its_end(tpu, arguments, command, environment)
    except ConfigError:
        if not arguments.keep:
            with contextlib.suppress(ConfigError):  # the first error is the one to read
                tpu.delete()
        raise
    if not arguments.keep:
        tpu.delete()
    return code


def _run_to_its_end(
    tpu: CloudTpu, arguments: argparse.Namespace, command: Sequence[str], environment: Mapping[str, str]
) -> int:
    """Every turn of the loop can begin with a TPU in any state."""
    accelerator = _accelerator(arguments)
    verdict = watch.Verdict.AGAIN
    found: dict[str, str] = {}
    for restart in range(arguments.max_restarts + 1):
        if restart:
            tpu.shell.say(f"restart {restart} of at most {arguments.max_restarts}")
        _obtain(tpu, arguments)
        try:
            _install(tpu, arguments)
            tpu.ssh(workers.start(command, environment))
            verdict, found = watch.follow(tpu, accelerator.vms)
            if verdict is watch.Verdict.FAILED and watch.lost(tpu, accelerator.slices):
                verdict = watch.Verdict.AGAIN
        except CommandError:
            if not watch.lost(tpu, accelerator.slices):
                raise
            verdict = watch.Verdict.AGAIN
        if verdict is not watch.Verdict.AGAIN:
            break
        watch.clear(tpu, accelerator.slices)
    return watch.conclude(tpu, verdict, found)


def _obtain(tpu: CloudTpu, arguments: argparse.Namespace) -> None:
    """Waits until the TPU is ready, asking for it where it is not, and for another one where it was lost."""
    if tpu.shell.dry_run:
        _create(tpu, arguments)
    waited = 0.0
    while True:
        state = tpu.describe()
        if state.phase is Phase.READY:
            return
        if meaning(state.reason) is Meaning.REFUSED:
            raise ConfigError(f"Cloud gives no {arguments.accelerator}: {state}", where="--accelerator", fix=_ASK)
        seconds = POLL_SECONDS
        if state.phase is Phase.LOST:
            tpu.shell.say(f"{tpu.name} is {state}: deleting it to ask for another one")
            tpu.delete()
            seconds = 0.0
        elif state.phase is Phase.ABSENT:
            try:
                _create(tpu, arguments)
                seconds = 0.0
            except CommandError as error:
                if error.meaning is not Meaning.CAPACITY:
                    raise
                tpu.shell.say(f"{error} Asking again in {CAPACITY_SECONDS:.0f} s.")
                seconds = CAPACITY_SECONDS
        if waited >= 3600 * arguments.wait:
            raise ConfigError(f"there was no TPU for {arguments.wait:g} hours ({state})", where="--wait", fix=_ASK)
        # A request that fails at once must not be repeated without end: each turn counts for at least a second.
        waited += max(seconds, 1.0)
        tpu.shell.sleep(seconds)


_ASK = (
    "Try another zone or type (gcloud compute tpus accelerator-types list --zone=...), have the quota raised, or wait."
)


_Verb = Callable[[CloudTpu, argparse.Namespace], int]
_VERBS: dict[str, tuple[str, _Verb]] = {
    "job": ("all of the following, and again after a preemption", _job),
    "create": ("ask for the TPU", _create),
    "install": ("put the wheel on all workers", _install),
    "run": ("start the command and follow it", _start),
    "logs": ("follow the log of the first worker", _logs),
    "status": ("say what the TPU and the command are doing", _status),
    "stop": ("end the command; a run saves itself first", _stop),
    "delete": ("delete the TPU", _delete),
}

if __name__ == "__main__":
    sys.exit(main())
