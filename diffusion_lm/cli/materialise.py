"""Writes SeqIO tasks to ArrayRecord files, which training then reads without TensorFlow. What is there is skipped.

Name tasks with --task, or give a recipe with --gin_file to write everything that its pipelines read."""

import argparse
import os
import subprocess
import sys
from typing import Any

from diffusion_lm.cli.arguments import add_gin, build_root, load_config
from diffusion_lm.cli.environment import import_quietly
from diffusion_lm.cli.output import progress, say, table
from diffusion_lm.core.errors import ConfigError, require

_STDERR = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's flags."""
    add_gin(parser)
    parser.add_argument("--task", action="append", default=[], metavar="NAME", help="SeqIO task; may be repeated")
    parser.add_argument("--split", action="append", default=[], metavar="NAME", help="its splits (default: train)")
    parser.add_argument("--root", metavar="DIR", help="where to (default: ~/.cache/diffusion_lm/data)")
    parser.add_argument(
        "--chunk_length", type=int, metavar="N", help="cut documents of pretraining tasks into N tokens"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="write only the first N records")
    parser.add_argument(
        "--max_lossy",
        type=float,
        metavar="SHARE",
        help="share of the targets that the vocabulary may fail to write, 1 = all (default: 0.01)",
    )


def run(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Runs the verb and returns one object per split."""
    from diffusion_lm.data.grain_source import GrainSource
    from diffusion_lm.data.materialise import TASK_MODULES
    from diffusion_lm.data.round_trip import loss_sentences
    from diffusion_lm.data.store import MANIFEST

    root = None
    sources = [
        GrainSource(task, split, arguments.root, arguments.chunk_length)
        for task in arguments.task
        for split in arguments.split or ["train"]
    ]
    if arguments.gin_file or arguments.gin:
        from diffusion_lm.cli.walk import parts

        require(
            not (arguments.root or arguments.chunk_length or arguments.split),
            "--root, --split and --chunk_length are for --task",
            where="--gin_file",
            fix="A recipe says them itself: bind GrainSource.root with --gin.",
        )
        root = build_root(load_config(arguments))
        sources += parts(root, GrainSource)
    if not sources:
        raise ConfigError("nothing to write is named", fix="Give --task NAME, or a recipe with --gin_file.")
    options: dict[str, Any] = {"modules": (*TASK_MODULES, *arguments.module)}
    for name in ("limit", "max_lossy"):
        if getattr(arguments, name) is not None:
            options[name] = getattr(arguments, name)
    results = []
    vocabularies: set[str] = set()
    for number, source in enumerate(sources, 1):
        progress(f"{number}/{len(sources)}  {source.task}/{source.split} -> {source.folder}")
        try:
            if not (source.folder / MANIFEST).is_file():
                import_quietly("seqio")
            manifest = source.materialise(**options)
        except ModuleNotFoundError as error:
            raise _needs(error.name, source) from error
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


def _needs(package: str | None, source: Any) -> ConfigError:
    return ConfigError(
        f"writing task {source.task!r} needs the package {package}, which is not installed",
        where=f"{source.task}/{source.split}",
        fix=f"Install it, or copy {source.folder} from a machine that has it.",
    )


def ensure(root: Any, arguments: argparse.Namespace) -> None:
    """Writes the datasets of the configured object `root` that are not there yet, so that one command does all.

    Data that are there stay as they are: where the task's code has changed since, that is said.

    TensorFlow stays out of this process: it would take GPU memory, and training has no use for it. What is printed goes
    to stderr.

    Raises:
      SystemExit: writing them failed; the error is printed.
    """
    from diffusion_lm.cli.walk import parts
    from diffusion_lm.data.grain_source import GrainSource
    from diffusion_lm.data.materialise import is_stale
    from diffusion_lm.data.store import read_manifest

    missing = []
    for source in parts(root, GrainSource):
        manifest = read_manifest(source.folder)
        if manifest is None:
            missing.append(source)
        elif is_stale(manifest):
            progress(
                f"warning: the code of task {source.task!r} has changed since {source.folder} was written; "
                "delete that folder to have it written again"
            )
    if not missing:
        return
    progress(f"writing {len(missing)} datasets that are not there yet")
    flags = [("--gin_file", arguments.gin_file), ("--gin_search_path", arguments.gin_search_path)]
    flags.append(("--module", arguments.module))
    command = [sys.executable, "-m", "diffusion_lm.cli.main", "materialise"]
    command += [part for flag, values in flags for value in values for part in (flag, value)]
    command += [f"--gin.{binding}" for binding in arguments.gin]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}  # accelerators belong to this process
    done = subprocess.run(command, stdout=_STDERR, env=environment, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)
