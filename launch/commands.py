"""Other programs (`gcloud`, `kubectl`, `sbatch`): shown before they run, run again where that can help, and explained
in one sentence where it cannot.

What a failure means is read from what the program prints, because gcloud and kubectl exit with 1 for all of them.
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


class Meaning(enum.Enum):
    """What a failed command says about trying again."""

    MISSING = "there is no such thing"
    EXISTS = "it is there already"
    CAPACITY = "the zone has none to give at the moment"
    REFUSED = "not allowed, over quota, or asked wrongly; asking again changes nothing"
    PASSING = "a fault of the network or the service"
    UNKNOWN = "none of these"


_RETRIED = (Meaning.PASSING,)
# The first that is found counts: services answer a lack of chips and a lack of quota with the same RESOURCE_EXHAUSTED.
_PATTERNS = (
    (Meaning.CAPACITY, r"no more capacity|insufficient (reserved )?capacity|ZONE_RESOURCE_POOL_EXHAUSTED|stockout"),
    (Meaning.PASSING, r"per minute|rateLimitExceeded"),
    (Meaning.REFUSED, r"[Qq]uota|PERMISSION_DENIED|UNAUTHENTICATED|does not have permission|Forbidden|Unauthorized"),
    (Meaning.REFUSED, r"has not been used in project|is not enabled|active account|auth login|[Rr]eauthenticat"),
    (Meaning.EXISTS, r"ALREADY_EXISTS|AlreadyExists|already exists"),
    (
        Meaning.REFUSED,
        r"acceleratorTypes?/|[Aa]ccelerator ?type .* (not found|is not)|INVALID_ARGUMENT|FAILED_PRECONDITION",
    ),
    (Meaning.REFUSED, r"Permission .* denied|unrecognized arguments|Invalid value|argument --|no matches for kind"),
    (Meaning.REFUSED, r"Unknown zone|locations/[^/\s]+['\"] (was )?not found|Location \S+ is not found"),
    (Meaning.MISSING, r"NOT_FOUND|NotFound|not found"),
    (
        Meaning.PASSING,
        r"UNAVAILABLE|INTERNAL|DEADLINE_EXCEEDED|ABORTED|RESOURCE_EXHAUSTED|[Rr]ate limit|Too Many Requests",
    ),
    (
        Meaning.PASSING,
        r"\b(429|500|502|503|504)\b|[Cc]onnection (reset|refused|closed|timed out)|[Tt]imed? ?out|i/o timeout",
    ),
    (
        Meaning.PASSING,
        r"exited with return code \[255\]|ssh: connect|kex_exchange|Broken pipe|Temporary failure in name",
    ),
    (Meaning.PASSING, r"Could not SSH|Unable to connect to the server|TLS handshake|Network is unreachable"),
)


def meaning(text: str) -> Meaning:
    """Returns what the error output of gcloud, kubectl or ssh means."""
    return next((found for found, pattern in _PATTERNS if re.search(pattern, text)), Meaning.UNKNOWN)


@dataclasses.dataclass(frozen=True)
class Output:
    """What a finished command said: its exit code, and the text of stdout and of stderr."""

    code: int
    stdout: str
    stderr: str


class CommandError(ConfigError):
    """A command failed for good.

    Attributes:
      meaning: why.
    """

    def __init__(self, argv: Sequence[str], output: Output, fix: str = ""):
        self.meaning = meaning(output.stderr)
        reason = last_error(output.stderr) or f"exit code {output.code}"
        fix = fix if fix and self.meaning is Meaning.REFUSED else _FIXES[self.meaning]
        super().__init__(f"`{' '.join(argv[:5])} ...` failed: {reason.rstrip('.')}", fix=fix)


_FIXES = {
    Meaning.MISSING: "Check the name, --zone and --project.",
    Meaning.EXISTS: "Choose another name, or delete it first.",
    Meaning.CAPACITY: "Wait, try another zone, or let it queue (--queued).",
    Meaning.REFUSED: "Trying again will not help: change the request, or have the quota or the permission granted.",
    Meaning.PASSING: "It failed several times; look at the status of the service and run the command again.",
    Meaning.UNKNOWN: "Run it by hand to see all that it prints.",
}


class Shell:
    """Runs commands, or with `dry_run` only prints them, quoted so that they can be pasted.

    Args:
      dry_run: print what would run and execute nothing.
      attempts: how often a command that fails for a passing reason is started, the first time included.
      sleep: waits between attempts; tests replace it.
    """

    def __init__(self, *, dry_run: bool = False, attempts: int = 5, sleep: Callable[[float], None] | None = None):
        self.dry_run, self._attempts = dry_run, attempts
        self.sleep = sleep or (lambda seconds: None if dry_run else time.sleep(seconds))

    def say(self, text: str) -> None:
        """Prints a line about what happens, on stderr; a dry run prints commands only."""
        if not self.dry_run:
            print(text, file=sys.stderr, flush=True)

    def run(self, argv: Sequence[str], *, stdin: str | None = None, expect: str = "", fix: str = "") -> str:
        """Runs a command to its end and returns its stdout; what it writes to stderr is passed on while it runs.

        Args:
          argv: the program and its arguments.
          stdin: text for its standard input.
          expect: what a dry run takes for the answer.
          fix: what to do if the service refuses, where more can be said than for any command.

        Raises:
          CommandError: it failed, and again if the reason could pass.
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
            if error.meaning not in _RETRIED or attempt == self._attempts:
                raise error
            self.say(f"{argv[0]}: {last_error(output.stderr)}; again in {delay:.0f} s ({attempt}/{self._attempts - 1})")
            self.sleep(delay)
            delay = min(2 * delay, 60.0)
        raise AssertionError("unreachable")

    def follow(self, argv: Sequence[str]) -> int:
        """Runs a command whose output goes straight to the terminal, once; returns its exit code."""
        if self.dry_run:
            self.show(argv)
            return 0
        _installed(argv[0])
        return subprocess.call(argv, stdin=subprocess.DEVNULL)

    def show(self, argv: Sequence[str], stdin: str | None = None) -> None:
        """Prints a command as a shell would read it; its standard input follows as a here-document."""
        print(shlex.join(argv) + ("" if stdin is None else f" <<'END'\n{stdin.rstrip()}\nEND"), flush=True)


def last_error(stderr: str) -> str:
    """Returns the sentence in which a program said why it failed, on one line."""
    # gcloud prints some errors as JSON over several lines behind `ERROR:`.
    found = list(re.finditer(r"ERROR: (\(\S+\) )?|error: |Error from server ", stderr))
    text = stderr[found[-1].end() :] if found else "\n".join(stderr.strip().splitlines()[-1:])
    return " ".join(text.split())[:400]


def _installed(program: str) -> None:
    if shutil.which(program) is None:
        raise ConfigError(
            f"the program {program} is not on the path", fix="Install it, or see what it would do with --dry_run."
        )


def _execute(argv: Sequence[str], stdin: str | None) -> Output:
    _installed(argv[0])
    given = subprocess.DEVNULL if stdin is None else subprocess.PIPE
    process = subprocess.Popen(argv, stdin=given, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    lines: list[str] = []
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
