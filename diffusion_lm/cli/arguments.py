"""The flags that verbs share, and from them to a configuration."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion_lm.core.errors import ConfigError
from diffusion_lm.core.files import write_text

if TYPE_CHECKING:
    from diffusion_lm.cli.config import Config

RESOLVED = "resolved.gin"
"""The configuration of a run folder or a comparison, as one gin file that includes no other."""

GIN_HELP = """\
--gin.NAME=VALUE sets a macro (--gin.TRAIN_STEPS=100) or a parameter (--gin.TrainRun.steps=100,
--gin.scope/Class.parameter=...). Strings may be quoted as in T5X: --gin.TASK="'wmt14_en_fr'".
Exit codes: 0 done, 2 wrong input, 75 stopped by SIGTERM and saved (run again), 130 stopped by Ctrl-C, 141 the reader
of stdout went away. A closed stderr is not an error; train, compare, import, export and materialise also finish without
a reader of stdout, and so does every verb with --json PATH."""


def add_common(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of every verb."""
    parser.add_argument(
        "--module",
        action="append",
        default=[],
        metavar="NAME",
        help="import this module first, e.g. one that registers SeqIO tasks; may be repeated",
    )
    parser.add_argument("--json", metavar="PATH", help="also write the result as JSON to PATH ('-' is stdout)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def add_gin(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that name a configuration; `--gin.NAME=VALUE` is taken out before argparse looks."""
    parser.add_argument(
        "--gin_file",
        action="append",
        default=[],
        metavar="FILE",
        help="gin file to read; may be repeated, later ones override earlier ones",
    )
    parser.add_argument(
        "--gin_search_path",
        action="append",
        default=[],
        metavar="DIRS",
        help="comma-separated folders to look for gin files in, between the current folder and the packaged ones",
    )


def add_run_folder(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that name a run folder and a checkpoint in it."""
    parser.add_argument(
        "--workdir", required=True, metavar="DIR", help="run folder, or WORKDIR/stages/STAGE of a comparison"
    )
    parser.add_argument(
        "--step",
        type=int,
        metavar="N",
        help="checkpoint to use (default: the one that the run selected, else the newest)",
    )


def add_force(parser: argparse.ArgumentParser) -> None:
    """Adds the flag that decodes with a sampler which does not fit the training."""
    parser.add_argument(
        "--force",
        action="store_true",
        help="decode although the sampler does not fit the training; the results say in what (unlike_training)",
    )


def split_gin_flags(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Returns the arguments without their `--gin.NAME=VALUE` flags, and those flags as `NAME=VALUE`."""
    rest, bindings = [], []
    for argument in arguments:
        if argument.startswith("--gin."):
            bindings.append(argument.removeprefix("--gin."))
        else:
            rest.append(argument)
    return rest, bindings


def load_config(arguments: argparse.Namespace, *, macros: Sequence[str] = ()) -> "Config":
    """Returns the configuration that the flags name; `macros` are those that the verb will build by name."""
    from diffusion_lm.cli import config
    from diffusion_lm.cli.search_path import split_search_path

    return config.load(arguments.gin_file, arguments.gin, split_search_path(arguments.gin_search_path), macros=macros)


def record_config(loaded: "Config", workdir: Path, *, claimed_by: str) -> None:
    """Writes resolved.gin into a folder that no configuration has claimed yet; `claimed_by` is the file that claims it.

    A folder that is claimed may turn out to be another configuration's, so there it is left as it is.
    """
    if not (workdir / claimed_by).exists():
        write_text(workdir / RESOLVED, loaded.resolved())


def build_root(loaded: "Config") -> Any:
    """Returns the `Comparison` where the gin files configure one, else the `TrainRun`.

    Raises:
      ConfigError: they configure neither.
    """
    from diffusion_lm.recipes.comparison import Comparison
    from diffusion_lm.training.run import TrainRun

    if loaded.binds(Comparison):
        return loaded.build(Comparison)
    if loaded.binds(TrainRun):
        return loaded.build(TrainRun)
    raise ConfigError(
        "the gin files configure neither a Comparison nor a TrainRun",
        where=", ".join(str(path) for path in loaded.files[:3]),
        fix="Give a recipe, e.g. --gin_file gin/recipes/quickstart.gin, or a run from gin/runs/.",
    )
