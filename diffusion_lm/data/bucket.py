"""Copies materialised data from a bucket to the local disk, because training reads records in random order.

Each machine copies a split once, to a directory under `default_root()`. The manifest is written last, so a copy with a
manifest is complete.
"""

import hashlib
import os
import shutil
from pathlib import Path

from diffusion_lm.core.errors import require
from diffusion_lm.core.files import as_path, read_text, write_text
from diffusion_lm.data.schema import Manifest
from diffusion_lm.data.store import LENGTHS, MANIFEST, default_root, exclusive


def local_copy(folder: str | os.PathLike) -> Path:
    """Returns a local directory with the files of a split in a bucket; copies them on first use.

    Raises:
      ConfigError: the disk is too small, or a file that the manifest names is missing.
    """
    source = as_path(folder)
    text = read_text(source / MANIFEST)
    manifest = Manifest.from_json(text, where=str(source / MANIFEST))
    key = hashlib.sha256(os.fspath(source).encode()).hexdigest()[:16]
    target = default_root() / "from_buckets" / f"{manifest.task}-{manifest.split}-{key}"
    target.parent.mkdir(parents=True, exist_ok=True)
    with exclusive(target.with_name(target.name + ".lock")):  # the processes of a machine share one copy
        there = target / MANIFEST
        if there.is_file() and there.read_text() == text:
            return target
        if target.exists():
            shutil.rmtree(target)
        target.mkdir()
        names = [*manifest.shards, LENGTHS, *([manifest.vocabulary] if manifest.vocabulary else [])]
        size = sum(_size(source / name) for name in names)
        free = shutil.disk_usage(target).free
        require(
            size < free,
            f"{source} needs {size / 2**30:.1f} GiB, but the disk of {target} has {free / 2**30:.1f} GiB free",
            where="GrainSource.root",
            fix="Attach a larger disk and point DIFFUSION_LM_CACHE at it, or mount the bucket (gcsfuse).",
        )
        for name in names:
            _copy(source / name, target / name)
        write_text(there, text)
    return target


def _size(path: Path) -> int:
    require(path.exists(), f"{path}: listed in the manifest but missing", fix="Copy the dataset to the bucket again.")
    # The two libraries that implement bucket paths do not use the field name of `os.stat`.
    stat = path.stat()
    return int(getattr(stat, "length", 0) or getattr(stat, "st_size", 0))


def _copy(source: Path, target: Path) -> None:
    with source.open("rb") as reader, target.open("wb") as writer:
        shutil.copyfileobj(reader, writer, 16 << 20)
