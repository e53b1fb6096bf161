"""Runs external programs (`gcloud`, `kubectl`, `sbatch`): dry runs, retries of transient failures, and clear errors.

The cause of a failure is found in the error output, because gcloud and kubectl exit with code 1 for all failures.
"""

import dataclasses
import enum
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import IO

from diffusion_lm.core.errors import ConfigError


class Cause(enum.Enum):
    """Causes of a failed command, which decide whether to retry."""

    MISSING = "the resource does not exist"
    EXISTS = "the resource exists already"
    CAPACITY = "the zone has no capacity at the moment"
    REFUSED = "no permission, over quota, or an invalid request; a retry does not help"
    TRANSIENT = "a transient failure of the network or the service"
    UNKNOWN = "unknown cause"


_RETRIED = (Cause.TRANSIENT,)
# The first match counts. Order matters: services report both lack of capacity and lack of quota as RESOURCE_EXHAUSTED.
_PATTERNS = (
    (Cause.CAPACITY, r"no more capacity|insufficient (reserved )?capacity|ZONE_RESOURCE_POOL_EXHAUSTED|stockout"),
    (Cause.TRANSIENT, r"per minute|rateLimitExceeded"),
    (Cause.REFUSED, r"[Qq]uota|PERMISSION_DENIED|UNAUTHENTICATED|does not have permission|Forbidden|Unauthorized"),
    (Cause.REFUSED, r"has not been used in project|is not enabled|active account|auth login|[Rr]eauthenticat"),
    (Cause.EXISTS, r"ALREADY_EXISTS|AlreadyExists|already exists"),
    (
        Cause.REFUSED,
        r"acceleratorTypes?/|[Aa]ccelerator ?type .* (not found|is not)|INVALID_ARGUMENT|FAILED_PRECONDITION",
    ),
    (Cause.REFUSED, r"Permission .* denied|unrecognized arguments|Invalid value|argument --|no matches for kind"),
    (Cause.REFUSED, r"Unknown zone|locations/[^/\s]+['\"] (was )?not found|Location \S+ is not found"),
    (Cause.MISSING, r"NOT_FOUND|NotFound|not found"),
    (
        Cause.TRANSIENT,
        r"UNAVAILABLE|INTERNAL|DEADLINE_EXCEEDED|ABORTED|RESOURCE_EXHAUSTED|[Rr]ate limit|Too Many Requests",
    ),
    (
        Cause.TRANSIENT,
        r"\b(429|500|502|503|504)\b|[Cc]onnection (reset|refused|closed|timed out)|[Tt]imed? ?out|i/o timeout",
    ),
    (
        Cause.TRANSIENT,
        r"exited with return code \[255\]|ssh: connect|kex_exchange|Broken pipe|Temporary failure in name",
    ),
    (Cause.TRANSIENT, r"Could not SSH|Unable to connect to the server|TLS handshake|Network is unreachable"),
)


def cause_of(text: str) -> Cause:
    """Returns the cause of a failure from the error output of gcloud, kubectl or ssh."""
    return next((found for found, pattern in _PATTERNS if re.search(pattern, text)), Cause.UNKNOWN)


@dataclasses.dataclass(frozen=True)
class Output:
    """Exit code, stdout and stderr of a finished command."""

    code: int
    stdout: str
    stderr: str


class CommandError(ConfigError):
    """A command failed, and retries did not help.

    Attributes:
      cause: why it failed.
    """

    def __init__(self, argv: Sequence[str], output: Output, fix: str = ""):
        self.cause = cause_of(output.stderr)
        reason = last_error(output.stderr) or f"exit code {output.code}"
        fix = fix if fix and self.cause is Cause.REFUSED else _FIXES[self.cause]
        super().__init__(f"`{' '.join(argv[:5])} ...` failed: {reason.rstrip('.')}", fix=fix)


_FIXES = {
    Cause.MISSING: "Check the name, --zone and --project.",
    Cause.EXISTS: "Use another name, or delete the existing one first.",
    Cause.CAPACITY: "Wait, try another zone, or queue the request (--queued).",
    Cause.REFUSED: "A retry will not help: change the request, or get the quota or permission.",
    Cause.TRANSIENT: "All retries failed; check the status of the service and run the command again later.",
    Cause.UNKNOWN: "Run it by hand to see its full output.",
}


class Shell:
    """Runs commands or, with `dry_run`, prints them with shell quoting.

    Args:
      dry_run: print commands instead of running them.
      attempts: maximum number of attempts for transient failures, including the first.
      sleep: waits between attempts; replaceable for tests.
    """

    def __init__(self, *, dry_run: bool = False, attempts: int = 5, sleep: Callable[[float], None] | None = None):
        self.dry_run, self._attempts = dry_run, attempts
        self.sleep = sleep or (lambda seconds: None if dry_run else time.sleep(seconds))

    def say(self, text: str) -> None:
        """Prints a progress line to stderr; does nothing in a dry run, which prints commands only."""
        if not self.dry_run:
            print(text, file=sys.stderr, flush=True)

    def run(self, argv: Sequence[str], *, stdin: str | None = None, expect: str = "", fix: str = "") -> str:
        """Runs a command to its end and returns its stdout; its stderr is forwarded while it runs.

        Args:
          argv: the program and its arguments.
          stdin: text for its standard input.
          expect: output that a dry run returns.
          fix: advice for the case that the service refuses the request; empty = a general one.

        Raises:
          CommandError: the command failed; transient failures are retried first.
          ConfigError: the program is not installed.
        """
        if self.dry_run:
            self.show(argv, stdin)
            return expect
        delay = 5.0
        for attempt in range(1, self._attempts + 1):
            output = _execute(argv, stdin)
            if output.code == 0:
                return output.stdout
            error = CommandError(argv, output, fix)
            if error.cause not in _RETRIED or attempt == self._attempts:
                raise error
            self.say(f"{argv[0]}: {last_error(output.stderr)}; retry {attempt}/{self._attempts - 1} in {delay:.0f} s")
            self.sleep(delay)
            delay = min(2 * delay, 60.0)
        raise AssertionError("unreachable")

    def follow(self, argv: Sequence[str]) -> int:
        """Runs a command once, with its output on this terminal; returns its exit code."""
        if self.dry_run:
            self.show(argv)
            return 0
        _installed(argv[0])
        return subprocess.call(argv, stdin=subprocess.DEVNULL)

    def show(self, argv: Sequence[str], stdin: str | None = None) -> None:
        """Prints a command with shell quoting; its standard input follows as a here-document."""
        print(shlex.join(argv) + ("" if stdin is None else f" <<'END'\n{stdin.rstrip()}\nEND"), flush=True)


def last_error(stderr: str) -> str:
    """Returns the error message of a program on one line."""
    # gcloud prints some errors as JSON over several lines after `ERROR:`.
    found = list(re.finditer(r"ERROR: (\(\S+\) )?|error: |Error from server ", stderr))
    text = stderr[found[-1].end() :] if found else "\n".join(stderr.strip().splitlines()[-1:])
    return " ".join(text.split())[:400]


def _installed(program: str) -> None:
    if shutil.which(program) is None:
        raise ConfigError(
            f"program {program} is not on the PATH", fix="Install it, or use --dry_run to print the commands."
        )


def _execute(argv: Sequence[str], stdin: str | None) -> Output:
    _installed(argv[0])
    given = subprocess.DEVNULL if stdin is None else subprocess.PIPE
    process = subprocess.Popen(argv, stdin=given, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    lines: list[str] = []
    # Forward stderr in a thread while stdout is read; otherwise a full pipe would block the program.
    thread = threading.Thread(target=_pass_on, args=(process.stderr, lines), daemon=True)
    thread.start()
    if stdin is not None:
        assert process.stdin is not None
        with process.stdin:
            process.stdin.write(stdin)
    text = process.stdout.read()
    code = process.wait()
    thread.join()
    return Output(code, text, "".join(lines))


def _pass_on(stream: IO[str], lines: list[str]) -> None:
    for line in stream:
        lines.append(line)
        sys.stderr.write(line)
        sys.stderr.flush()
