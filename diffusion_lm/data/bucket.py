"""Materialised data in a bucket: read from a copy on this machine, because records are read at random.

The copy is made once a machine, below `default_root()`; its manifest comes last and says that it is whole.
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
    """Returns a local folder with the files of a split in a bucket, copying them if they are not there yet.

    Raises:
      ConfigError: the disk has no room for them, or they do not match their manifest.
    """
    source = as_path(folder)
    text = read_text(source / MANIFEST)
    manifest = Manifest.from_json(text, where=str(source / MANIFEST))
    key = hashlib.sha256(os.fspath(source).encode()).hexdigest()[:16]
    target = default_root() / "from_buckets" / f"{manifest.task}-{manifest.split}-{key}"
    target.parent.mkdir(parents=True, exist_ok=True)
    with exclusive(target.with_name(target.name + ".lock")):  # several processes of a machine want the same
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
            f"{source} has {size / 2**30:.1f} GiB and the disk of {target} {free / 2**30:.1f} GiB free",
            where="GrainSource.root",
            fix="Attach a larger disk and point DIFFUSION_LM_CACHE at it, or mount the bucket (gcsfuse).",
        )
        for name in names:
            _copy(source / name, target / name)
        write_text(there, text)
    return target


def _size(path: Path) -> int:
    require(path.exists(), f"there is no {path}, which its manifest names", fix="Copy the dataset to the bucket again.")
    # The two libraries behind paths into buckets name it differently from `os.stat`.
    stat = path.stat()
    return int(getattr(stat, "length", 0) or getattr(stat, "st_size", 0))


def _copy(source: Path, target: Path) -> None:
    with source.open("rb") as reader, target.open("wb") as writer:
        shutil.copyfileobj(reader, writer, 16 << 20)
