"""Returns shell commands for the machines of a TPU: install the wheel, and start, watch and stop a command.

All files are in `~/diffusion_lm` on each machine:

    env/                  Python environment         run/              working directory, with the copied files
    installed             hash of what is installed  log, log.previous output of the command
    pid, exit_code        of the command, which is the leader of its own process group
"""

import hashlib
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

FOLDER = "diffusion_lm"
RUNNING, GONE = "running", "gone"
_ALIVE = 'kill -0 -- "-$(cat pid 2>/dev/null)" 2>/dev/null'
_OUTCOME = re.compile(r"^diffusion_lm worker (\S+): (\S+)$", re.MULTILINE)


def prepare() -> str:
    """Creates the directories. As the first command, its retries also wait for machines that are still booting."""
    return f"mkdir -p ~/{FOLDER}/run"


def install(wheel: Path, constraints: Path, python: str) -> str:
    """Installs the wheel with the locked versions, unless they are installed already.

    The Python of the TPU images is too old, so uv installs a newer one.
    """
    key = hashlib.sha256(wheel.read_bytes() + constraints.read_bytes() + python.encode()).hexdigest()[:16]
    uv = "~/.local/bin/uv"
    wanted = f'"diffusion-lm[tpu] @ file://$HOME/{FOLDER}/{wheel.name}"'
    return " && ".join(
        [
            f"cd ~/{FOLDER}",
            f'{{ test "$(cat installed 2>/dev/null)" = {key} || {{ {{ test -x {uv} || '
            "curl -LsSf https://astral.sh/uv/install.sh | sh; }",
            f"{uv} venv --quiet --clear --python {shlex.quote(python)} env",
            f"{uv} pip install --quiet --python env/bin/python -c {shlex.quote(constraints.name)} {wanted}",
            f"echo {key} > installed; }}; }}",
        ]
    )


def start(command: Sequence[str], environment: Mapping[str, str]) -> str:
    """Starts a `diffusion-lm` command that outlives the connection; does nothing if it is running already."""
    variables = "".join(f"export {name}={shlex.quote(value)}; " for name, value in environment.items())
    # The trap keeps the shell alive when its process group gets SIGTERM, so that it can write the exit code.
    inner = (
        f"trap : TERM; {variables}cd run; ../env/bin/diffusion-lm {shlex.join(command)}; "
        "code=$?; cd ..; echo $code > exit_code.new; mv exit_code.new exit_code"
    )
    return (
        f"cd ~/{FOLDER} && {{ if {_ALIVE}; then echo already running; else rm -f exit_code; "
        "mv -f log log.previous 2>/dev/null; "
        f"setsid nohup bash -c {shlex.quote(inner)} > log 2>&1 < /dev/null & echo $! > pid; fi; }}"
    )


def follow(lines: str = "+1") -> str:
    """Prints the log from line `lines` (`tail -n`) and follows it until the command ends."""
    return f'cd ~/{FOLDER} && tail -s 0.2 -n {shlex.quote(lines)} --pid="$(cat pid)" -F log'


def outcome() -> str:
    """Prints one line per worker: its exit code, `running`, or `gone` if the command ended without an exit code."""
    return (
        f"cd ~/{FOLDER} && if {_ALIVE}; then found={RUNNING}; "
        f"else found=$(cat exit_code 2>/dev/null || echo {GONE}); fi; "
        'echo "diffusion_lm worker $(hostname): $found"'
    )


def read_outcomes(text: str) -> dict[str, str]:
    """Parses the output of `outcome`; returns the outcome by name of the machine."""
    return dict(_OUTCOME.findall(text))


def last_lines(count: int = 40) -> str:
    """Prints the last `count` log lines of each worker whose command failed."""
    return (
        f'cd ~/{FOLDER} && code=$(cat exit_code 2>/dev/null || echo {GONE}); case "$code" in 0|75) ;; *) '
        f'echo "diffusion_lm worker $(hostname) ended with $code:"; tail -n {count} log;; esac'
    )


def stop(grace: int = 120) -> str:
    """Sends SIGTERM, on which a run saves a checkpoint, and SIGKILL after `grace` seconds to what is still running."""
    return (
        f'cd ~/{FOLDER} 2>/dev/null && group="$(cat pid 2>/dev/null)" && kill -TERM -- "-$group" 2>/dev/null; '
        f'for i in $(seq {grace}); do {_ALIVE} || exit 0; sleep 1; done; kill -KILL -- "-$group" 2>/dev/null; true'
    )
