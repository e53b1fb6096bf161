"""From a SeqIO task to a folder that Grain reads without TensorFlow (SeqIO's own caching needs apache-beam)."""

import dataclasses
import hashlib
import importlib.util
import itertools
from collections.abc import Sequence
from pathlib import Path

from diffusion_lm.core.errors import ConfigError, require
from diffusion_lm.data.round_trip import Losses
from diffusion_lm.data.schema import Manifest
from diffusion_lm.data.store import (
    RECORDS_PER_SHARD,
    PathLike,
    default_root,
    read_manifest,
    split_folder,
    write_records,
)
from diffusion_lm.data.vocabulary import MASK_VARIABLE, VOCABULARY_VARIABLE, VocabularyNotNamed

MAX_LOSSY = 0.01
"""Share of the targets that a vocabulary may fail to write: rare characters of large data sets, not the task itself."""

_FIX_FINISHED = "Choose another root (--root, GrainSource.root), or delete the directory to write it again."

TASK_MODULES = (
    "diffusion_lm_tasks.embedded",
    "diffusion_lm_tasks.translation",
    "diffusion_lm_tasks.code_synthesis",
    "diffusion_lm_tasks.extractive_qa",
    "diffusion_lm_tasks.summarization",
    "diffusion_lm_tasks.instruction",
    "diffusion_lm_tasks.pretraining",
    "diffusion_lm_tasks.reasoning",
    "diffusion_lm_tasks.commonsense",
    "diffusion_lm_tasks.cloze",
)
"""Modules that register tasks when imported."""


def materialise(
    task: str,
    split: str = "train",
    root: PathLike | None = None,
    *,
    chunk_length: int | None = None,
    limit: int | None = None,
    max_lossy: float = MAX_LOSSY,
    modules: Sequence[str] = TASK_MODULES,
    records_per_shard: int = RECORDS_PER_SHARD,
) -> Manifest:
    """Writes one split of a SeqIO task to `ROOT/<task>/<split>/` and returns its manifest; returns at once when done.

    Atomic: the folder appears under its name only when complete. Resumable: a killed writer goes on after its last
    complete shard. Deterministic: records stand in the task's own order and their ids follow from it.

    Args:
      task: name of a SeqIO task.
      split: name of one of its splits.
      root: where datasets live; default `default_root()`.
      chunk_length: longest piece, in tokens, into which documents of a task without inputs are cut; None = whole.
      limit: write only the first so many records; None = all.
      max_lossy: share of the targets that the vocabulary may fail to write whole (`round_trip.unwritten`), 1 = all;
        what it fails to write is counted in the manifest.
      modules: imported first, because they register tasks.
      records_per_shard: records in each ArrayRecord file.

    Raises:
      ConfigError: unknown task or split; the folder holds a dataset made with other options; a token of the data is
        MASK or lies outside the vocabulary; more targets are lossy than may be; or chunk_length is given for a task
        with inputs.
    """
    for name, value in (("chunk_length", chunk_length), ("limit", limit)):
        require(value is None or value > 0, f"{name} = {value} is not positive", fix="Leave it out or give 1 or more.")
    require(0 <= max_lossy <= 1, f"max_lossy = {max_lossy}", where="GrainSource.max_lossy", fix="Use a share, 0 to 1.")
    folder = split_folder(task, split, root)
    done = _finished(folder, chunk_length, limit)
    if done is not None:
        _check_vocabulary(done, folder, modules)
        return done
    from diffusion_lm.data import seqio_source

    seqio_task = seqio_source.get_task(task, modules)
    vocabulary = seqio_source.task_vocabulary(seqio_task)
    require(
        chunk_length is None or "inputs" not in seqio_task.output_features,
        f"chunk_length = {chunk_length} was given for task {task!r}, which has inputs",
        fix="Only documents of pretraining tasks are cut; leave chunk_length out.",
    )
    manifest = Manifest(
        task=task,
        split=split,
        specials=vocabulary.specials,
        metrics=seqio_source.metric_paths(seqio_task),
        chunk_length=chunk_length,
        limit=limit,
        modules=tuple(modules),
        code_sha256=code_digest(modules),
    )
    losses = Losses(vocabulary, name=f"{task}/{split}", most=max_lossy)
    records = seqio_source.task_records(
        seqio_task, split, vocabulary=vocabulary, chunk_length=chunk_length, losses=losses
    )

    def finish(manifest: Manifest) -> Manifest:
        losses.check()
        return dataclasses.replace(manifest, unwritten=losses.summary(), empty_targets=losses.empty_targets)

    try:
        return write_records(
            folder,
            itertools.islice(records, limit),
            manifest,
            vocabulary=vocabulary,
            records_per_shard=records_per_shard,
            finish=finish,
        )
    except ConfigError:
        # Another program may have finished the same split while this one waited for its lock.
        done = _finished(folder, chunk_length, limit)
        if done is None:
            raise
        _check_vocabulary(done, folder, modules)
        return done


def materialise_command(
    task: str,
    split: str,
    root: PathLike | None = None,
    chunk_length: int | None = None,
    max_lossy: float = MAX_LOSSY,
) -> str:
    """Returns the command line that makes the dataset; errors about a missing one quote it."""
    command = f"diffusion-lm materialise --task {task} --split {split} --root {root or default_root()}"
    command += f" --chunk_length {chunk_length}" if chunk_length else ""
    return command + (f" --max_lossy {max_lossy:g}" if max_lossy != MAX_LOSSY else "")


def code_digest(modules: Sequence[str]) -> str:
    """Returns a hash of the source files of `modules` and of their neighbours in a package, "" where one is gone.

    Runs none of them (only the packages' `__init__`).
    """
    files: set[Path] = set()
    for module in modules:
        try:
            spec = importlib.util.find_spec(module)
        except ModuleNotFoundError:
            spec = None
        if spec is None or not spec.origin:
            return ""
        files |= set(Path(spec.origin).parent.glob("*.py")) if spec.parent else {Path(spec.origin)}
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


def is_stale(manifest: Manifest) -> bool:
    """Says whether the code that registers the task has changed since its data were written; False where unknown."""
    code = code_digest(manifest.modules)
    return bool(manifest.code_sha256 and code) and manifest.code_sha256 != code


def _finished(folder: Path, chunk_length: int | None, limit: int | None) -> Manifest | None:
    """Returns the manifest of a finished split; raises `ConfigError` where it was made with other options."""
    manifest = read_manifest(folder)
    if manifest is None:
        return None
    for name, wanted in (("chunk_length", chunk_length), ("limit", limit)):
        found = getattr(manifest, name)
        require(
            found == wanted,
            f"{folder} was written with {name}={found}, but {name}={wanted} was requested",
            where=f"--{name}",
            fix=_FIX_FINISHED,
        )
    return manifest


def _check_vocabulary(manifest: Manifest, folder: Path, modules: Sequence[str]) -> None:
    """Raises `ConfigError` if the task of a finished split now uses another vocabulary than the split was written with.

    Does nothing where the task's vocabulary cannot be known: SeqIO is not installed, no module registers the task, or
    nothing names a vocabulary. A machine that only trains needs none of them.
    """
    if not manifest.vocabulary or importlib.util.find_spec("seqio") is None:
        return
    from diffusion_lm.data import seqio_source

    try:
        task = seqio_source.get_task(manifest.task, modules)
    except ConfigError:
        return
    try:
        vocabulary = seqio_source.task_vocabulary(task)
    except VocabularyNotNamed:
        return
    require(
        vocabulary.sha256 == manifest.vocabulary_sha256,
        f"{folder} was written with another vocabulary than task {manifest.task!r} uses now "
        f"({manifest.specials.vocab_size} and {vocabulary.size} tokens)",
        where=f"{VOCABULARY_VARIABLE} or {MASK_VARIABLE}, if the task reads them",
        fix=f"{_FIX_FINISHED} To keep using it, set {VOCABULARY_VARIABLE}={folder / manifest.vocabulary}.",
    )
