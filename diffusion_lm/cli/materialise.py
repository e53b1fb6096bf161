"""Writes SeqIO tasks to ArrayRecord files, which training reads without TensorFlow. Existing files are skipped.

Name tasks with --task, or pass a recipe with --gin_file to write all data that it reads."""

import argparse
import importlib.util
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

from diffusion_lm.cli.arguments import add_gin, build_root, load_config
from diffusion_lm.cli.environment import import_quietly
from diffusion_lm.cli.output import progress, say, table
from diffusion_lm.core.errors import ConfigError, require

if TYPE_CHECKING:
    from diffusion_lm.data.grain_source import GrainSource

_STDERR = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's flags."""
    add_gin(parser)
    parser.add_argument("--task", action="append", default=[], metavar="NAME", help="SeqIO task; may be repeated")
    parser.add_argument(
        "--split",
        action="append",
        default=[],
        metavar="NAME",
        help="splits of --task; may be repeated (default: train)",
    )
    parser.add_argument("--root", metavar="DIR", help="output directory (default: ~/.cache/diffusion_lm/data)")
    parser.add_argument(
        "--chunk_length", type=int, metavar="N", help="split documents of pretraining tasks into chunks of N tokens"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="write only the first N records of each split")
    parser.add_argument(
        "--max_lossy",
        type=float,
        metavar="SHARE",
        help="fraction of targets that may contain characters the vocabulary cannot encode (default: 0.01)",
    )


def run(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Runs the verb; returns one dict per split."""
    from diffusion_lm.data.grain_source import GrainSource
    from diffusion_lm.data.materialise import TASK_MODULES, is_stale
    from diffusion_lm.data.round_trip import loss_sentences
    from diffusion_lm.data.store import read_manifest

    root = None
    sources = [
        GrainSource(task, split, arguments.root, arguments.chunk_length)
        for task in arguments.task
        for split in arguments.split or ["train"]
    ]
    if arguments.gin_file or arguments.gin:
        from diffusion_lm.cli.walk import find_all

        require(
            not (arguments.root or arguments.chunk_length or arguments.split),
            "--root, --split and --chunk_length only apply to --task",
            where="--gin_file",
            fix="Set them in the recipe, e.g. with --gin.GrainSource.root=DIR.",
        )
        root = build_root(load_config(arguments))
        sources += find_all(root, GrainSource)
    if not sources:
        raise ConfigError("no task given", fix="Pass --task NAME, or a recipe with --gin_file.")
    options: dict[str, Any] = {"modules": (*TASK_MODULES, *arguments.module)}
    for name in ("limit", "max_lossy"):
        if getattr(arguments, name) is not None:
            options[name] = getattr(arguments, name)
    results = []
    vocabularies: set[str] = set()
    for number, source in enumerate(sources, 1):
        progress(f"{number}/{len(sources)}  {source.task}/{source.split} -> {source.folder}")
        try:
            # Writing a split needs SeqIO. For an existing one it only serves to check the vocabulary.
            finished = read_manifest(source.folder)
            if finished is None or importlib.util.find_spec("seqio") is not None:
                import_quietly("seqio")
            if finished is not None and is_stale(finished):
                progress(_stale_warning(source))
            manifest = source.materialise(**options)
        except ModuleNotFoundError as error:
            raise _missing_package(error.name, source) from error
        if manifest.vocabulary and manifest.vocabulary_sha256 not in vocabularies:
            vocabularies.add(manifest.vocabulary_sha256)
            progress(f"vocabulary: {source.vocabulary.report}")
        name = f"{manifest.task}/{manifest.split}"
        for sentence in loss_sentences(name, manifest.unwritten):
            progress(f"warning: {sentence}")
        if manifest.empty_targets:
            progress(f"{name}: {manifest.empty_targets:,} of {manifest.count:,} targets are empty")
        results.append(
            {
                "task": manifest.task,
                "split": manifest.split,
                "records": manifest.count,
                "target_tokens": manifest.target_tokens,
                "max_inputs_length": manifest.max_inputs_length,
                "max_targets_length": manifest.max_targets_length,
                "empty_targets": manifest.empty_targets,
                "unwritten": manifest.unwritten,
                "folder": str(source.folder),
            }
        )
    columns = ["task", "split", "records", "target tokens", "longest inputs", "longest targets"]
    rows = [
        (
            r["task"],
            r["split"],
            f"{r['records']:,}",
            f"{r['target_tokens']:,}",
            r["max_inputs_length"],
            r["max_targets_length"],
        )
        for r in results
    ]
    table(columns, rows, right=[2, 3, 4, 5])
    if root is not None:
        from diffusion_lm.cli.cut_report import cut_sentences

        for sentence in cut_sentences(root):
            say(f"  {sentence}")
    return results


def _missing_package(package: str | None, source: "GrainSource") -> ConfigError:
    return ConfigError(
        f"writing task {source.task!r} needs the package {package}, which is not installed",
        where=f"{source.task}/{source.split}",
        fix=f"Install it, or copy {source.folder} from another machine.",
    )


def _stale_warning(source: "GrainSource") -> str:
    return (
        f"warning: the code of task {source.task!r} has changed since {source.folder} was written; "
        "delete that directory to write it again"
    )


def _requested_vocabulary() -> str | None:
    """Returns the SHA-256 of the vocabulary that `$DIFFUSION_LM_VOCABULARY` names: None if unset, "" if unreadable.

    A vocabulary in a bucket counts as unreadable here: only the child process has TensorFlow to read it.
    """
    from diffusion_lm.data.vocabulary import VOCABULARY_VARIABLE, Vocabulary, requested_mask

    path = os.environ.get(VOCABULARY_VARIABLE)
    if not path:
        return None
    try:
        return Vocabulary.load(path, mask=requested_mask()).sha256
    except ConfigError:
        return ""


def ensure(root: object, arguments: argparse.Namespace) -> None:
    """Materialises the missing data sets of the configured object `root`, so that `train` and `compare` need no set-up.

    Existing data sets are kept. If the code of their task has changed since they were written, a warning is printed. If
    their vocabulary is not the one that `$DIFFUSION_LM_VOCABULARY` names and their task reads that variable, the
    command fails.

    The work runs in a child process, because TensorFlow would reserve GPU memory that training needs. The output of the
    child goes to stderr.

    Raises:
      SystemExit: the child failed; it has printed the error.
    """
    from diffusion_lm.cli.walk import find_all
    from diffusion_lm.data.grain_source import GrainSource
    from diffusion_lm.data.materialise import is_stale
    from diffusion_lm.data.store import read_manifest

    # The vocabulary named in the environment may differ from that of the data because the task uses its own. Only the
    # registered task can tell, and only the child process imports SeqIO.
    requested = _requested_vocabulary()
    missing, unverified = [], []
    for source in find_all(root, GrainSource):
        manifest = read_manifest(source.folder)
        if manifest is None:
            missing.append(source)
        elif is_stale(manifest):
            progress(_stale_warning(source))
        if manifest is not None and requested not in (None, manifest.vocabulary_sha256):
            unverified.append(source)
    if not missing and not unverified:
        return
    if missing:
        progress(f"materialising {len(missing)} missing data sets")
    else:
        progress(f"checking the vocabulary of {len(unverified)} data sets")
    flags = [("--gin_file", arguments.gin_file), ("--gin_search_path", arguments.gin_search_path)]
    flags.append(("--module", arguments.module))
    command = [sys.executable, "-m", "diffusion_lm.cli.main", "materialise"]
    command += [part for flag, values in flags for value in values for part in (flag, value)]
    command += [f"--gin.{binding}" for binding in arguments.gin]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}  # keep the child off the accelerators of this process
    done = subprocess.run(command, stdout=_STDERR, env=environment, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)
