"""Runs a `diffusion-lm` command on a Cloud TPU. `job` does everything; the other verbs are its single steps.

  make wheel
  python -m launch.tpu_vm job --name ar2diff --zone us-west4-a --accelerator v5e-16 --spot --queued \\
    -- compare --gin_file gin/recipes/ar2diff_base.gin --workdir gs://BUCKET/ar2diff_base

`job` creates the TPU, installs the wheel on all workers, starts the command, follows its log and deletes the TPU when
the command has ended. If the TPU is preempted, `job` deletes it, creates another one and starts the same command, which
resumes from its run directory. `job` itself can be stopped and started again at any time. `--dry_run` prints all
commands. The exit code is that of the command; 2 means invalid input or a request that Cloud refused.
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
from launch.commands import Cause, CommandError, Shell, cause_of

ROOT = Path(__file__).parents[1]
POLL_SECONDS = 30.0
CAPACITY_SECONDS = 300.0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a verb and returns the exit code."""
    notice = "stopped watching; the TPU keeps running and costs money until you run `delete`"
    return job.run(_parser(), argv, _run, interrupted=notice)


def _parser() -> argparse.ArgumentParser:
    parser = job.parser_of("tpu_vm", __doc__, _VERBS, of="name of the TPU")
    parser.add_argument("--zone", help="Cloud zone, e.g. us-west4-a")
    parser.add_argument("--project", help="Cloud project (default: that of the gcloud configuration)")
    parser.add_argument("--accelerator", help="type and size as in `plan --topology`: v5e-16, v4-32, 2xv5e-256")
    parser.add_argument("--slices", type=int, default=1, metavar="N", help="number of slices (needs --queued)")
    parser.add_argument("--spot", action="store_true", help="Spot capacity: cheaper, may be preempted at any time")
    parser.add_argument("--queued", action="store_true", help="queue the request until capacity is available")
    parser.add_argument("--runtime", help="TPU software version (default: the one for JAX)")
    parser.add_argument(
        "--gcloud_flag",
        action="append",
        default=[],
        metavar="FLAG",
        help="extra gcloud flag for `create`, e.g. --gcloud_flag=--reserved; may be repeated",
    )
    parser.add_argument(
        "--wheel", type=Path, help="wheel to install (default: the one in dist/, built by `make wheel`)"
    )
    parser.add_argument(
        "--constraints",
        type=Path,
        default=ROOT / "constraints.txt",
        help="locked versions of dependencies (default: constraints.txt of the repository)",
    )
    parser.add_argument("--python", default="3.11", metavar="VERSION", help="Python of the workers (default: 3.11)")
    parser.add_argument(
        "--copy",
        action="append",
        default=[],
        metavar="FILE",
        help="file to copy to the working directory of the command, e.g. a gin file; may be repeated",
    )
    parser.add_argument(
        "--wait", type=float, default=24.0, metavar="HOURS", help="maximum wait for a TPU, per request (default: 24)"
    )
    parser.add_argument(
        "--max_restarts", type=int, default=100, metavar="N", help="maximum restarts of one job (default: 100)"
    )
    parser.add_argument("--keep", action="store_true", help="do not delete the TPU when the job has ended")
    return parser


def _run(shell: Shell, arguments: argparse.Namespace) -> int:
    require(
        arguments.zone,
        "no zone given",
        where="--zone",
        fix="`gcloud compute tpus locations list` lists the zones.",
    )
    tpu = CloudTpu(shell, arguments.name, arguments.zone, arguments.project, arguments.queued)
    return _VERBS[arguments.verb][1](tpu, arguments)


def _accelerator(arguments: argparse.Namespace) -> Accelerator:
    require(
        arguments.accelerator,
        "no accelerator given",
        where="--accelerator",
        fix="Pass a generation and a size, e.g. v5e-16; `diffusion-lm plan` checks whether a run fits.",
    )
    return parse(arguments.accelerator, arguments.slices)


def _command(arguments: argparse.Namespace) -> tuple[list[str], dict[str, str]]:
    accelerator = _accelerator(arguments)
    why = "the TPU may be preempted" if arguments.spot else ""
    why = f"there are {accelerator.vms} machines" if accelerator.vms > 1 else why
    command = job.command_of(arguments, why_shared=why)
    several = {"DIFFUSION_LM_MULTIHOST": "1"} if accelerator.vms > 1 else {}
    return command, several | job.environment_of(arguments)


def _create(tpu: CloudTpu, arguments: argparse.Namespace) -> int:
    tpu.create(_accelerator(arguments), spot=arguments.spot, runtime=arguments.runtime, extra=arguments.gcloud_flag)
    return 0


def _files(arguments: argparse.Namespace) -> Path:
    """Returns the path of the wheel after checking that it and all files to copy exist."""
    wheel: Path = arguments.wheel or next(iter(sorted((ROOT / "dist").glob("*.whl"))), ROOT / "dist" / "*.whl")
    require(wheel.is_file(), f"wheel {wheel} not found", where="--wheel", fix="Build it with `make wheel`.")
    for name in [arguments.constraints, *arguments.copy]:
        require(Path(name).is_file(), f"file {name} not found", where="--constraints, --copy", fix="Check the path.")
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
    """Checks the input before any request to Cloud, runs the command, and deletes the TPU on success and on failure."""
    command, environment = _command(arguments)
    _files(arguments)
    tpu.require_offered(_accelerator(arguments))
    try:
        code = _run_to_its_end(tpu, arguments, command, environment)
    except ConfigError:
        if not arguments.keep:
            with contextlib.suppress(ConfigError):  # report the first error, not a failure to clean up
                tpu.delete()
        raise
    if not arguments.keep:
        tpu.delete()
    return code


def _run_to_its_end(
    tpu: CloudTpu, arguments: argparse.Namespace, command: Sequence[str], environment: Mapping[str, str]
) -> int:
    """Runs the command until it ends, restarting it after preemptions; returns the exit code.

    Each iteration handles a TPU in any state (absent, ready, preempted), so an interrupted `job` can be started again.
    """
    accelerator = _accelerator(arguments)
    verdict = watch.Verdict.RESTART
    found: dict[str, str] = {}
    for restart in range(arguments.max_restarts + 1):
        if restart:
            tpu.shell.say(f"restart {restart} of at most {arguments.max_restarts}")
        _obtain(tpu, arguments)
        try:
            _install(tpu, arguments)
            tpu.ssh(workers.start(command, environment))
            verdict, found = watch.follow(tpu, accelerator.vms)
            # A preemption can also make the command fail; restart it then.
            if verdict is watch.Verdict.FAILED and watch.lost(tpu, accelerator.slices):
                verdict = watch.Verdict.RESTART
        except CommandError:
            if not watch.lost(tpu, accelerator.slices):
                raise
            verdict = watch.Verdict.RESTART
        if verdict is not watch.Verdict.RESTART:
            break
        watch.clear(tpu, accelerator.slices)
    return watch.conclude(tpu, verdict, found)


def _obtain(tpu: CloudTpu, arguments: argparse.Namespace) -> None:
    """Waits until the TPU is ready. Requests it if it does not exist, and replaces it if it was preempted or failed."""
    if tpu.shell.dry_run:
        _create(tpu, arguments)
    waited = 0.0
    while True:
        state = tpu.describe()
        if state.phase is Phase.READY:
            return
        # A queued request that failed for lack of quota or permission will not succeed later.
        if cause_of(state.reason) is Cause.REFUSED:
            raise ConfigError(
                f"Cloud refused the request for {arguments.accelerator}: {state}", where="--accelerator", fix=_NO_TPU
            )
        seconds = POLL_SECONDS
        if state.phase is Phase.LOST:
            tpu.shell.say(f"{tpu.name} is {state}: deleting it and requesting another one")
            tpu.delete()
            seconds = 0.0
        elif state.phase is Phase.ABSENT:
            try:
                _create(tpu, arguments)
                seconds = 0.0
            except CommandError as error:
                if error.cause is not Cause.CAPACITY:
                    raise
                tpu.shell.say(f"{error} Retrying in {CAPACITY_SECONDS:.0f} s.")
                seconds = CAPACITY_SECONDS
        if waited >= 3600 * arguments.wait:
            raise ConfigError(
                f"no TPU available within {arguments.wait:g} hours ({state})", where="--wait", fix=_NO_TPU
            )
        # Count at least one second per iteration, so that a request that fails immediately is not repeated forever.
        waited += max(seconds, 1.0)
        tpu.shell.sleep(seconds)


_NO_TPU = (
    "Try another zone or type (gcloud compute tpus accelerator-types list --zone=...), request more quota, or wait."
)


_Verb = Callable[[CloudTpu, argparse.Namespace], int]
_VERBS: dict[str, tuple[str, _Verb]] = {
    "job": ("create, install, run and delete, with restarts after preemptions", _job),
    "create": ("request the TPU", _create),
    "install": ("install the wheel on all workers", _install),
    "run": ("start the command and follow its log", _start),
    "logs": ("follow the log of the first worker", _logs),
    "status": ("show the state of the TPU and of the command", _status),
    "stop": ("stop the command; a run saves a checkpoint first", _stop),
    "delete": ("delete the TPU", _delete),
}

if __name__ == "__main__":
    sys.exit(main())
