"""Runs a `diffusion-lm` command on GPUs of a Slurm cluster: writes a batch script and submits it with `sbatch`.

  python -m launch.slurm submit --name ar2diff --nodes 2 --gpus 8 --time 24:00:00 --setup 'source .venv/bin/activate' \\
    -- compare --gin_file gin/recipes/ar2diff_base.gin --workdir /scratch/$USER/ar2diff_base

One task runs per GPU, which JAX's cluster detection for Slurm requires. Some minutes before the time limit, and on
preemption, Slurm sends SIGTERM to all tasks. The run then saves a checkpoint, the job is requeued, and it resumes from
its run directory. `script` prints the batch script.
"""

import argparse
import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence

from diffusion_lm.core.errors import require
from launch import job
from launch.commands import Shell

SAVED = 75
"""Exit code of `diffusion-lm` after SIGTERM with a checkpoint saved; the same command resumes."""

# Slurm signals the tasks and sometimes this shell too, which must outlive them. A signal interrupts `wait` but not the
# job step, so `wait` is repeated. --kill-on-bad-exit=0: the first task that has saved exits with 75 while others are
# still saving, and must not terminate them.
_BODY = """\
set -u
cd "$SLURM_SUBMIT_DIR" || exit 1
{setup}{exports}
interrupted=yes
trap 'interrupted=yes' TERM
srun --kill-on-bad-exit=0 diffusion-lm {command} &
step=$!
while [ "$interrupted" = yes ]; do
  interrupted=no
  wait "$step"
  ended=$?
  if [ "$ended" -ne 127 ]; then code=$ended; fi
done
echo "diffusion-lm ended with $code"
if [ "$code" -eq {saved} ] && [ "${{SLURM_RESTART_COUNT:-0}}" -lt {max_restarts} ]; then
  scontrol requeue "$SLURM_JOB_ID" && exit 0
fi
exit "$code"
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a verb and returns the exit code."""
    return job.run(_parser(), argv, lambda shell, arguments: _VERBS[arguments.verb][1](shell, arguments))


def _parser() -> argparse.ArgumentParser:
    parser = job.parser_of("slurm", __doc__, _VERBS, of="name of the job; its log is NAME-JOBID.log")
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="number of machines (default: 1)")
    parser.add_argument(
        "--gpus", type=int, default=8, metavar="N", help="GPUs per machine, with one task each (default: 8)"
    )
    parser.add_argument(
        "--time", default="24:00:00", metavar="LIMIT", help="time limit in Slurm's format (default: 24:00:00)"
    )
    parser.add_argument(
        "--grace",
        type=int,
        default=300,
        metavar="SECONDS",
        help="time between SIGTERM and the time limit, to save a checkpoint (default: 300)",
    )
    parser.add_argument("--cpus", type=int, metavar="N", help="CPU cores per task")
    parser.add_argument(
        "--max_restarts", type=int, default=100, metavar="N", help="maximum restarts of the job (default: 100)"
    )
    parser.add_argument(
        "--setup", default="", metavar="SHELL", help="shell command to run first, e.g. to activate an environment"
    )
    parser.add_argument(
        "--sbatch_flag",
        action="append",
        default=[],
        metavar="FLAG",
        help="extra sbatch option, e.g. --sbatch_flag=--partition=gpu; may be repeated",
    )
    return parser


def script(
    name: str,
    command: Sequence[str],
    *,
    nodes: int,
    gpus: int,
    time: str,
    grace: int = 300,
    cpus: int | None = None,
    setup: str = "",
    environment: Mapping[str, str] | None = None,
    flags: Sequence[str] = (),
    max_restarts: int = 100,
) -> str:
    """Returns the batch script of a `diffusion-lm` command.

    Args:
      name: name of the job.
      command: verb and flags.
      nodes: number of machines.
      gpus: tasks per machine, with one GPU each.
      time: time limit in Slurm's format.
      grace: seconds between SIGTERM and the time limit, for saving a checkpoint.
      cpus: CPU cores per task; None = Slurm's default.
      setup: shell command that runs first, on the first machine; the tasks inherit its exported variables.
      environment: environment variables of the command.
      flags: more options of sbatch.
      max_restarts: maximum number of times the job is requeued.

    Raises:
      ConfigError: a number is too small, or the time limit is malformed.
    """
    require(
        nodes >= 1 and gpus >= 1,
        f"nodes={nodes}, gpus={gpus}: both must be >= 1",
        where="--nodes, --gpus",
        fix="Pass larger numbers.",
    )
    require(
        re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}", time) is not None,
        f"{time!r} is not a time limit in Slurm's format",
        where="--time",
        fix="Write HOURS:MINUTES:SECONDS or DAYS-HOURS.",
    )
    # JAX assigns the i-th visible GPU to task i of a machine. `--gpus-per-task` would hide all but one GPU from each.
    options = {
        "job-name": name,
        "nodes": nodes,
        "ntasks-per-node": gpus,
        "gres": f"gpu:{gpus}",
        "time": time,
        # Without `B:` the signal goes to the tasks. On preemption, Slurm's own grace time applies instead.
        "signal": f"TERM@{grace}",
        "output": f"{name}-%j.log",
        "open-mode": "append",
    }
    if cpus is not None:
        options["cpus-per-task"] = cpus
    lines = [f"#SBATCH --{key}={value}" for key, value in options.items()]
    lines += ["#SBATCH --requeue", *(f"#SBATCH {flag}" for flag in flags)]
    several = {"DIFFUSION_LM_MULTIHOST": "1"} if nodes * gpus > 1 else {}
    exports = [f"export {key}={shlex.quote(value)}" for key, value in (several | dict(environment or {})).items()]
    body = _BODY.format(
        setup=setup + "\n" if setup else "",
        exports="\n".join(exports),
        command=shlex.join(command),
        saved=SAVED,
        max_restarts=max_restarts,
    )
    return "\n".join(["#!/bin/bash", *lines, body])


def _script(arguments: argparse.Namespace) -> str:
    return script(
        arguments.name,
        # Slurm clusters share home and scratch directories between machines, so any run directory works.
        job.command_of(arguments),
        nodes=arguments.nodes,
        gpus=arguments.gpus,
        time=arguments.time,
        grace=arguments.grace,
        cpus=arguments.cpus,
        setup=arguments.setup,
        environment=job.environment_of(arguments),
        flags=arguments.sbatch_flag,
        max_restarts=arguments.max_restarts,
    )


def _print(shell: Shell, arguments: argparse.Namespace) -> int:
    print(_script(arguments), end="")
    return 0


def _submit(shell: Shell, arguments: argparse.Namespace) -> int:
    print(shell.run(["sbatch"], stdin=_script(arguments)), end="")
    return 0


_Verb = Callable[[Shell, argparse.Namespace], int]
_VERBS: dict[str, tuple[str, _Verb]] = {
    "submit": ("submit the batch script with sbatch", _submit),
    "script": ("print the batch script", _print),
}

if __name__ == "__main__":
    sys.exit(main())
