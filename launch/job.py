"""What all launchers have in common: their command line, and what they ask of a command before they spend machines."""

import argparse
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from diffusion_lm.cli.arguments import split_gin_flags
from diffusion_lm.cli.main import VERBS, build_parser
from diffusion_lm.core.errors import ConfigError, near_names
from launch.commands import Shell

_NAME = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_WRITES = ("train", "compare")


def parser_of(launcher: str, doc: str | None, verbs: Mapping[str, tuple[str, Any]], of: str) -> argparse.ArgumentParser:
    """Returns the parser of a launcher with its verbs and the flags that all have.

    Args:
      launcher: its module in `launch`.
      doc: what it does.
      verbs: of each what it does, and the function that does it.
      of: what `--name` names.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m launch.{launcher}", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "verb", choices=sorted(verbs), help="; ".join(f"{name}: {what}" for name, (what, _) in verbs.items())
    )
    parser.add_argument("--name", required=True, help=of)
    parser.add_argument("--dry_run", action="store_true", help="print the commands, run nothing")
    parser.add_argument(
        "--env", action="append", default=[], metavar="NAME=VALUE", help="environment variable; may be repeated"
    )
    parser.add_argument(
        "--shared_folder",
        action="store_true",
        help="the run folder is local but the same on all machines and outlives them (Filestore, gcsfuse, Lustre)",
    )
    parser.epilog = "Behind -- comes a verb of diffusion-lm with its flags."
    return parser


def run(
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None,
    verb: Callable[[Shell, argparse.Namespace], int],
    *,
    interrupted: str = "",
) -> int:
    """Returns the exit code of `verb`: 2 for wrong input, 130 for Ctrl-C, which prints `interrupted`."""
    arguments = parse(parser, argv)
    try:
        checked_name(arguments.name)
        return verb(Shell(dry_run=arguments.dry_run), arguments)
    except ConfigError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if interrupted:
            print(interrupted, file=sys.stderr)
        return 130


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Returns the flags before `--` parsed, and what stands behind it as `command`."""
    given = list(sys.argv[1:] if argv is None else argv)
    at = given.index("--") if "--" in given else len(given)
    parsed = parser.parse_args(given[:at])
    parsed.command = given[at + 1 :]
    return parsed


def command_of(arguments: argparse.Namespace, *, why_shared: str = "") -> list[str]:
    """Returns the verb and its flags, once they are known to be readable.

    Args:
      arguments: parsed flags.
      why_shared: why the run folder must be one that all machines see and that outlives them; empty = it need not.

    Raises:
      ConfigError: there is no such verb or flag, or the run folder would be lost.
    """
    command = list(arguments.command)
    if not command or command[0] not in VERBS:
        given = command[0] if command else ""
        raise ConfigError(
            f"{given!r} is no verb of diffusion-lm{near_names(given, VERBS)}"
            if given
            else "there is no command to run",
            where="-- VERB ...",
            fix=f"End with -- and one of {', '.join(VERBS)} and its flags.",
        )
    rest, _ = split_gin_flags(command)
    parsed = build_parser().parse_args(rest)  # a misspelt flag is found here and not on rented machines
    workdir = getattr(parsed, "workdir", None)
    if why_shared and workdir and command[0] in _WRITES and not arguments.shared_folder and not is_bucket(workdir):
        raise ConfigError(
            f"the run folder {workdir} is local to each machine, but {why_shared}",
            where="--workdir",
            fix="Name a bucket (gs://BUCKET/...), or add --shared_folder if it is mounted on all of them.",
        )
    return command


def environment_of(arguments: argparse.Namespace) -> dict[str, str]:
    """Returns the variables of `--env`.

    Raises:
      ConfigError: one is no NAME=VALUE.
    """
    pairs = [text.partition("=") for text in arguments.env]
    for name, equals, _ in pairs:
        if not equals or not _VARIABLE.fullmatch(name):
            raise ConfigError(f"{name + equals!r} sets no variable", where="--env", fix="Write NAME=VALUE.")
    return {name: value for name, _, value in pairs}


def checked_name(name: str) -> str:
    """Returns a name that Cloud and Kubernetes accept.

    Raises:
      ConfigError: it is none.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"{name!r} is no name for a machine or a job",
            where="--name",
            fix="Use at most 63 lower-case letters, digits and hyphens, a letter first and no hyphen last.",
        )
    return name


def is_bucket(path: str) -> bool:
    """True for a folder that is no machine's own: `gs://...`."""
    return path.startswith("gs://")
