"""Flags that several verbs share, and the configuration that they load."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from diffusion_lm.core.errors import ConfigError
from diffusion_lm.core.files import write_text

if TYPE_CHECKING:
    from diffusion_lm.cli.config import Config
    from diffusion_lm.recipes.comparison import Comparison
    from diffusion_lm.training.run import TrainRun

RESOLVED = "resolved.gin"
"""File in a run directory or comparison directory that holds its whole configuration, without includes."""

GIN_HELP = """\
--gin.NAME=VALUE sets a gin macro (--gin.TRAIN_STEPS=100) or a parameter (--gin.TrainRun.steps=100,
--gin.scope/Class.parameter=...). Strings may be quoted as in T5X: --gin.TASK="'wmt14_en_fr'".
Exit codes: 0 success; 2 invalid input; 75 stopped by SIGTERM with a checkpoint saved (run the command again);
130 stopped by Ctrl-C; 141 stdout was closed. A closed stderr is not an error. If stdout is closed, train, compare,
import, export and materialise still run to the end, and so does every verb with --json PATH."""


def add_common(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of every verb."""
    parser.add_argument(
        "--module",
        action="append",
        default=[],
        metavar="NAME",
        help="Python module to import first, e.g. one that registers SeqIO tasks; may be repeated",
    )
    parser.add_argument("--json", metavar="PATH", help="also write the result as JSON to PATH ('-' for stdout)")
    parser.add_argument("--debug", action="store_true", help="print the full traceback of an error")


def add_gin(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that name a configuration. `split_gin_flags` removes `--gin.NAME=VALUE` before argparse runs."""
    parser.add_argument(
        "--gin_file",
        action="append",
        default=[],
        metavar="FILE",
        help="gin file to read; may be repeated, later files override earlier ones",
    )
    parser.add_argument(
        "--gin_search_path",
        action="append",
        default=[],
        metavar="DIRS",
        help="comma-separated directories to search for gin files, after the current directory and before the "
        "packaged files",
    )


def add_run_folder(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that name a run directory and a checkpoint in it."""
    parser.add_argument(
        "--workdir", required=True, metavar="DIR", help="run directory, or WORKDIR/stages/STAGE of a comparison"
    )
    parser.add_argument(
        "--step",
        type=int,
        metavar="N",
        help="checkpoint step to use (default: the best one if the run selects one, else the newest)",
    )


def add_force(parser: argparse.ArgumentParser) -> None:
    """Adds the flag that allows a sampler which does not match how the model was trained."""
    parser.add_argument(
        "--force",
        action="store_true",
        help="decode even if the sampler does not match the training; results list the differences (unlike_training)",
    )


def split_gin_flags(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Splits off the `--gin.NAME=VALUE` flags; returns the other arguments and the flags as `NAME=VALUE`."""
    # argparse cannot accept flags with arbitrary names, so these are removed before it runs.
    rest, bindings = [], []
    for argument in arguments:
        if argument.startswith("--gin."):
            bindings.append(argument.removeprefix("--gin."))
        else:
            rest.append(argument)
    return rest, bindings


def load_config(arguments: argparse.Namespace, *, macros: Sequence[str] = ()) -> "Config":
    """Returns the configuration that the flags name. `macros` are the macros that the verb builds by name."""
    from diffusion_lm.cli import config
    from diffusion_lm.cli.search_path import split_search_path

    return config.load(arguments.gin_file, arguments.gin, split_search_path(arguments.gin_search_path), macros=macros)


def record_config(loaded: "Config", workdir: Path, *, claimed_by: str) -> None:
    """Writes resolved.gin into `workdir` unless the file `claimed_by` exists there.

    `claimed_by` exists once a run has started in the directory. It may then belong to another configuration, which is
    checked later, so its resolved.gin must not be overwritten here.
    """
    if not (workdir / claimed_by).exists():
        write_text(workdir / RESOLVED, loaded.resolved())


def build_root(loaded: "Config") -> "Comparison | TrainRun":
    """Returns the configured `Comparison` if there is one, else the configured `TrainRun`.

    Raises:
      ConfigError: the gin files configure neither.
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
        fix="Pass a recipe, e.g. --gin_file gin/recipes/quickstart.gin, or a run from gin/runs/.",
    )
