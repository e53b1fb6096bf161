"""Code that all launchers share: their command line, and checks of the command before machines are requested."""

import argparse
import re
import sys
from collections.abc import Callable, Mapping, Sequence

from diffusion_lm.cli.arguments import split_gin_flags
from diffusion_lm.cli.main import VERBS, build_parser
from diffusion_lm.core.errors import ConfigError, near_names
from launch.commands import Shell

_NAME = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_WRITES = ("train", "compare")


def parser_of(
    launcher: str, doc: str | None, verbs: Mapping[str, tuple[str, object]], of: str
) -> argparse.ArgumentParser:
    """Returns the parser of a launcher with its verbs and the flags that all launchers have.

    Args:
      launcher: name of its module in `launch`.
      doc: description for `--help`.
      verbs: description and function of each verb.
      of: help text of `--name`.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m launch.{launcher}", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "verb", choices=sorted(verbs), help="; ".join(f"{name}: {what}" for name, (what, _) in verbs.items())
    )
    parser.add_argument("--name", required=True, help=of)
    parser.add_argument("--dry_run", action="store_true", help="print the commands without running them")
    parser.add_argument(
        "--env", action="append", default=[], metavar="NAME=VALUE", help="environment variable; may be repeated"
    )
    parser.add_argument(
        "--shared_folder",
        action="store_true",
        help="the run directory is on a file system shared by all machines (Filestore, gcsfuse, Lustre)",
    )
    parser.epilog = "Write the verb of diffusion-lm and its flags after --."
    return parser


def run(
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None,
    verb: Callable[[Shell, argparse.Namespace], int],
    *,
    interrupted: str = "",
) -> int:
    """Runs `verb` and returns its exit code: 2 for invalid input, 130 for Ctrl-C, which also prints `interrupted`."""
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
    """Parses the flags before `--`; the words after it are stored as `command`."""
    given = list(sys.argv[1:] if argv is None else argv)
    at = given.index("--") if "--" in given else len(given)
    parsed = parser.parse_args(given[:at])
    parsed.command = given[at + 1 :]
    return parsed


def command_of(arguments: argparse.Namespace, *, why_shared: str = "") -> list[str]:
    """Returns the verb and its flags after checking them.

    Args:
      arguments: parsed flags.
      why_shared: why the run directory must be on shared, persistent storage; empty = it may be local.

    Raises:
      ConfigError: the verb or a flag does not exist, or the run directory would be lost.
    """
    command = list(arguments.command)
    if not command or command[0] not in VERBS:
        given = command[0] if command else ""
        raise ConfigError(
            f"unknown verb {given!r}{near_names(given, VERBS)}" if given else "no command given",
            where="-- VERB ...",
            fix=f"End with --, one of {', '.join(VERBS)}, and its flags.",
        )
    rest, _ = split_gin_flags(command)
    parsed = build_parser().parse_args(rest)  # find misspelt flags before machines are requested
    workdir = getattr(parsed, "workdir", None)
    if why_shared and workdir and command[0] in _WRITES and not arguments.shared_folder and not is_bucket(workdir):
        raise ConfigError(
            f"the run directory {workdir} is local to each machine, but {why_shared}",
            where="--workdir",
            fix="Use a bucket (gs://BUCKET/...), or add --shared_folder if all machines mount this directory.",
        )
    return command


def environment_of(arguments: argparse.Namespace) -> dict[str, str]:
    """Returns the variables of `--env`.

    Raises:
      ConfigError: an argument is not NAME=VALUE.
    """
    pairs = [text.partition("=") for text in arguments.env]
    for name, equals, _ in pairs:
        if not equals or not _VARIABLE.fullmatch(name):
            raise ConfigError(f"{name + equals!r} is not NAME=VALUE", where="--env", fix="Write NAME=VALUE.")
    return {name: value for name, _, value in pairs}


def checked_name(name: str) -> str:
    """Returns `name` if Cloud and Kubernetes accept it.

    Raises:
      ConfigError: the name is not valid.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"{name!r} is not a valid name of a machine or job",
            where="--name",
            fix="Use at most 63 lower-case letters, digits and hyphens, a letter first and no hyphen at the end.",
        )
    return name


def is_bucket(path: str) -> bool:
    """Returns whether a path is in a bucket: `gs://...`."""
    return path.startswith("gs://")
