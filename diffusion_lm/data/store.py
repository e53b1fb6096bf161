"""The directory of one materialised split: `ROOT/<task>/<split>/` with manifest.json, lengths.npy, ArrayRecord shards.

A split is written shard by shard to `<split>.partial` and renamed when it is complete. A writer that was killed resumes
after its last complete shard.
"""

import dataclasses
import fcntl
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from diffusion_lm.core.errors import ConfigError, require
from diffusion_lm.core.files import as_path, is_bucket, read_text
from diffusion_lm.core.special import SpecialTokens
from diffusion_lm.data.schema import Manifest, Record
from diffusion_lm.data.vocabulary import Vocabulary

MANIFEST = "manifest.json"
LENGTHS = "lengths.npy"
VOCABULARY = "vocabulary.model"
RECORDS_PER_SHARD = 50_000

PathLike = str | os.PathLike[str]


def default_root() -> Path:
    """Returns the default root of datasets: `$DIFFUSION_LM_CACHE/data`, or `~/.cache/diffusion_lm/data`."""
    cache = os.environ.get("DIFFUSION_LM_CACHE")
    return (Path(cache).expanduser() if cache else Path.home() / ".cache" / "diffusion_lm") / "data"


def split_folder(task: str, split: str, root: PathLike | None = None) -> Path:
    """Returns the directory of one split of one task under `root` (default `default_root()`)."""
    return (as_path(root) if root else default_root()) / task / split


def read_manifest(folder: PathLike) -> Manifest | None:
    """Returns the manifest of a materialised split, or None if the directory has none."""
    path = as_path(folder) / MANIFEST
    return Manifest.from_json(read_text(path), where=str(path)) if path.is_file() else None


def check_tokens(tokens: np.ndarray, specials: SpecialTokens, name: str) -> None:
    """Raises `ConfigError` if `tokens` contains MASK or an id outside the vocabulary (trap T35)."""
    if specials.mask_id is not None and (tokens == specials.mask_id).any():
        raise ConfigError(
            f"{name} contains the MASK token {specials.mask_id} as data, so it cannot be distinguished from noise",
            fix="Remove the mask symbol in the task's preprocessors, or use a vocabulary with another MASK.",
        )
    if tokens.size and not (int(tokens.min()) >= 0 and int(tokens.max()) < specials.vocab_size):
        raise ConfigError(
            f"{name} contains a token outside the vocabulary of {specials.vocab_size} tokens",
            fix="Materialise the task again with the vocabulary that its manifest names.",
        )


def write_records(
    path: PathLike,
    records: Iterable[Record],
    manifest: Manifest,
    *,
    vocabulary: Vocabulary | None = None,
    records_per_shard: int = RECORDS_PER_SHARD,
    finish: Callable[[Manifest], Manifest] | None = None,
) -> Manifest:
    """Writes one split to the directory `path` and returns its manifest with counts, lengths and shards filled in.

    Args:
      path: directory of the split, from `split_folder`; it must not have a manifest yet.
      records: the records in order. To resume, pass the same records in the same order again.
      manifest: task, split, specials, metrics and options; the fields that depend on the records are filled in here.
      vocabulary: stored next to the records; its special tokens must equal those of the manifest.
      records_per_shard: records in each ArrayRecord file.
      finish: completes the manifest after the last record; if it raises, the split is not created.

    Raises:
      ConfigError: the directory is already complete, a record contains MASK or an id outside the vocabulary, or there
        are no records.
    """
    require(
        not is_bucket(path),
        f"{path}: datasets cannot be written directly to a bucket",
        where="root",
        fix="Write to a local directory and copy it: gcloud storage cp --recursive DIR gs://BUCKET/...",
    )
    folder = Path(path)
    if vocabulary is not None:
        require(
            vocabulary.specials == manifest.specials,
            f"the special tokens in the manifest of {manifest.task!r} are not those of its vocabulary",
            fix="Pass Vocabulary.specials.",
        )
        manifest = dataclasses.replace(manifest, vocabulary=VOCABULARY, vocabulary_sha256=vocabulary.sha256)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with exclusive(folder.with_name(folder.name + ".lock")):
        require(not (folder / MANIFEST).exists(), f"{folder} already contains a dataset", fix="Delete it first.")
        partial = folder.with_name(folder.name + ".partial")
        _open_partial(partial, manifest, records_per_shard)
        lengths, shards = _write_shards(partial, records, manifest, records_per_shard)
        require(
            len(lengths) > 0,
            f"split {manifest.split!r} of task {manifest.task!r} has no records",
            fix="Check the source and the preprocessors of the task.",
        )
        np.save(partial / LENGTHS, lengths)
        if vocabulary is not None:
            (partial / VOCABULARY).write_bytes(vocabulary.model)
        manifest = dataclasses.replace(
            manifest,
            count=len(lengths),
            max_inputs_length=int(lengths[:, 0].max()),
            max_targets_length=int(lengths[:, 1].max()),
            max_suffix_length=int(lengths[:, 2].max()),
            target_tokens=int(lengths[:, 1].sum(dtype=np.int64)),
            has_inputs=bool(lengths[:, 0].any()),
            shards=tuple(shards),
        )
        if finish is not None:
            manifest = finish(manifest)
        for leftover in [*partial.glob("*.lengths.npy"), partial / "progress.json"]:
            leftover.unlink()
        (partial / MANIFEST).write_text(manifest.to_json())
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
    return manifest


def _open_partial(partial: Path, manifest: Manifest, records_per_shard: int) -> None:
    """Creates `partial`, or keeps its complete shards if they were written for the same manifest."""
    progress = json.dumps([json.loads(manifest.to_json()), records_per_shard], allow_nan=False)
    path = partial / "progress.json"
    if not (path.is_file() and path.read_text() == progress):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        path.write_text(progress)


def _write_shards(
    partial: Path, records: Iterable[Record], manifest: Manifest, records_per_shard: int
) -> tuple[np.ndarray, list[str]]:
    """Writes the missing shards; returns i32[count, 3] lengths of inputs, targets and suffix, and the shard names."""
    from array_record.python import array_record_module

    lengths: list[np.ndarray] = []
    shards: list[str] = []
    remaining = iter(records)
    while True:
        name = f"records-{len(shards):05d}.array_record"
        sidecar = partial / f"{name}.lengths.npy"
        # The sidecar is written after its shard is closed, so its presence means that the shard is complete.
        if sidecar.is_file():
            done = np.load(sidecar)
            for _ in itertools.islice(remaining, len(done)):
                pass
        else:
            rows: list[tuple[int, int, int]] = []
            writer = array_record_module.ArrayRecordWriter(str(partial / name), "group_size:1")
            for record in itertools.islice(remaining, records_per_shard):
                where = f"record {len(shards) * records_per_shard + len(rows)} of {manifest.task}/{manifest.split}"
                parts = (record.inputs, record.targets, record.suffix)
                for part in parts:
                    check_tokens(part, manifest.specials, where)
                writer.write(record.encode())
                rows.append((len(parts[0]), len(parts[1]), len(parts[2])))
            writer.close()
            done = np.asarray(rows, np.int32).reshape(-1, 3)
            if len(done):
                np.save(sidecar.with_suffix(".tmp.npy"), done)
                os.replace(sidecar.with_suffix(".tmp.npy"), sidecar)
            else:
                (partial / name).unlink()
        if len(done):
            lengths.append(done)
            shards.append(name)
        if len(done) < records_per_shard:
            return (np.concatenate(lengths) if lengths else np.zeros((0, 3), np.int32)), shards


@contextmanager
def exclusive(lock: Path) -> Iterator[None]:
    """Holds a file lock, so that concurrent processes write a split once; the kernel frees it if the holder dies."""
    with lock.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
