"""Runs a `diffusion-lm` command on GPUs of a Slurm cluster: writes the batch script and hands it to `sbatch`.

  python -m launch.slurm submit --name ar2diff --nodes 2 --gpus 8 --time 24:00:00 --setup 'source .venv/bin/activate' \\
    -- compare --gin_file gin/recipes/ar2diff_base.gin --workdir /scratch/$USER/ar2diff_base

One task runs on each GPU, which is how JAX finds the others on Slurm. Some minutes before the time is up, and at a
preemption, Slurm sends SIGTERM to all tasks; the run saves itself, and the job is queued again and goes on from its
run folder. `script` prints the batch script.
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
"""The exit code of `diffusion-lm` that says: saved, start me again."""

# Slurm signals the tasks, and sometimes this shell too, which must outlive them: a signal ends `wait`, not the step.
# No task may end the others (--kill-on-bad-exit): one that has saved itself exits with 75 while the rest still save.
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
    parser = job.parser_of("slurm", __doc__, _VERBS, of="of the job; also of its log, NAME-JOBID.log")
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="machines (default 1)")
    parser.add_argument(
        "--gpus", type=int, default=8, metavar="N", help="GPUs of each machine, a task for each (default 8)"
    )
    parser.add_argument("--time", default="24:00:00", metavar="LIMIT", help="as Slurm writes it (default 24:00:00)")
    parser.add_argument(
        "--grace", type=int, default=300, metavar="SECONDS", help="for saving before the end (default 300)"
    )
    parser.add_argument("--cpus", type=int, metavar="N", help="CPU cores of each task")
    parser.add_argument("--max_restarts", type=int, default=100, metavar="N", help="of the job (default 100)")
    parser.add_argument(
        "--setup", default="", metavar="SHELL", help="shell command before, e.g. to activate an environment"
    )
    parser.add_argument(
        "--sbatch_flag",
        action="append",
        default=[],
        metavar="FLAG",
        help="a line more for sbatch, e.g. --sbatch_flag=--partition=gpu; may be repeated",
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
      name: of the job.
      command: verb and flags.
      nodes: machines.
      gpus: tasks of each machine, one GPU each.
      time: limit, in Slurm's notation.
      grace: seconds between SIGTERM and the limit; the run saves itself in them.
      cpus: cores of each task; None = Slurm's default.
      setup: shell command that runs before, on the first machine; its exported variables reach the tasks.
      environment: variables of the command.
      flags: more options of sbatch.
      max_restarts: how often the job may be queued again.

    Raises:
      ConfigError: a number or a time makes no job.
    """
    require(nodes >= 1 and gpus >= 1, "a job needs a machine and a GPU", where="--nodes, --gpus", fix="Give 1 or more.")
    require(
        re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}", time) is not None,
        f"{time!r} is no time limit of Slurm's",
        where="--time",
        fix="Write HOURS:MINUTES:SECONDS or DAYS-HOURS.",
    )
    # JAX gives task i of a machine the i-th GPU that it sees. `--gpus-per-task` would hide all but one from each task.
    options = {
        "job-name": name,
        "nodes": nodes,
        "ntasks-per-node": gpus,
        "gres": f"gpu:{gpus}",
        "time": time,
        # Without `B:` the signal goes to the tasks; at a preemption it comes with Slurm's own grace time instead.
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
        # Homes and scratch of Slurm clusters are the same on all machines, so any folder will do.
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
    "submit": ("hand the script to sbatch", _submit),
    "script": ("print it", _print),
}

if __name__ == "__main__":
    sys.exit(main())
