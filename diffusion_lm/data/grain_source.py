"""Random access to materialised records through Grain's ArrayRecord reader, without TensorFlow."""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from diffusion_lm.core.errors import ConfigError, require
from diffusion_lm.core.files import is_bucket
from diffusion_lm.data.bucket import local_copy
from diffusion_lm.data.materialise import MAX_LOSSY, TASK_MODULES, materialise, materialise_command
from diffusion_lm.data.schema import Manifest, Record
from diffusion_lm.data.store import LENGTHS, MANIFEST, read_manifest, split_folder
from diffusion_lm.data.vocabulary import Vocabulary

if TYPE_CHECKING:
    from grain.sources import ArrayRecordDataSource

TOKEN_COUNTS = "token_counts.npy"
_COUNTED_AT_ONCE = 4096


@dataclasses.dataclass(frozen=True)
class GrainSource:
    """One materialised split of one task. Files are opened on first use.

    Attributes:
      task: name of the SeqIO task.
      split: name of its split.
      root: root directory of datasets; None = `store.default_root()`.
      chunk_length: longest chunk, in tokens, that `materialise` splits documents into; None accepts existing data of
        any chunk length.
      max_lossy: fraction of targets that the vocabulary may fail to encode when the split is materialised.
    """

    task: str
    split: str = "train"
    root: str | None = None
    chunk_length: int | None = None
    max_lossy: float = dataclasses.field(default=MAX_LOSSY, compare=False)

    def __post_init__(self):
        require(bool(self.task), "no task given", where="GrainSource.task", fix="Name a task, e.g. 'wmt14_en_fr'.")
        if self.root is not None:
            object.__setattr__(self, "root", str(self.root))

    @property
    def folder(self) -> Path:
        """The directory of the split."""
        return split_folder(self.task, self.split, self.root)

    @property
    def command(self) -> str:
        """The command line that materialises the split."""
        return materialise_command(self.task, self.split, self.root, self.chunk_length, self.max_lossy)

    def materialise(
        self, *, modules: Sequence[str] = TASK_MODULES, limit: int | None = None, max_lossy: float | None = None
    ) -> Manifest:
        """Materialises the split if it is missing, which needs TensorFlow. Arguments as for `materialise.materialise`.

        `max_lossy` overrides the field of the same name.
        """
        return materialise(
            self.task,
            self.split,
            self.root,
            chunk_length=self.chunk_length,
            limit=limit,
            max_lossy=self.max_lossy if max_lossy is None else max_lossy,
            modules=modules,
        )

    def open(self) -> "OpenSource":
        """Returns the open dataset.

        Raises:
          ConfigError: it is not materialised, cannot be read, or was materialised with another chunk_length.
        """
        path = self.folder / MANIFEST
        if not path.is_file():
            raise ConfigError(
                f"split {self.split!r} of task {self.task!r} is not materialised in {self.folder}",
                where="GrainSource.task",
                fix=f"Run: {self.command}",
            )
        folder = local_copy(self.folder) if is_bucket(self.folder) else self.folder
        source = _open(folder, (folder / MANIFEST).stat().st_mtime_ns)
        require(
            self.chunk_length in (None, source.manifest.chunk_length),
            f"chunk_length={self.chunk_length}: {self.folder} was written with {source.manifest.chunk_length}",
            where="GrainSource.chunk_length",
            fix=f"Delete the directory and run: {self.command}",
        )
        return source

    @property
    def manifest(self) -> Manifest:
        """The manifest of the split."""
        return self.open().manifest

    @property
    def vocabulary(self) -> Vocabulary:
        """The vocabulary of the split."""
        return self.open().vocabulary

    def __len__(self) -> int:
        return self.open().manifest.count

    def __getitem__(self, index: int) -> Record:
        return self.open().records([index])[0]

    def records(self, limit: int | None = None) -> list[Record]:
        """Returns the first `limit` records (all of them by default) in stored order."""
        source = self.open()
        return source.records(range(source.manifest.count if limit is None else min(limit, source.manifest.count)))


class OpenSource:
    """The files of one materialised split.

    Attributes:
      folder: their directory.
      manifest: the contents of manifest.json.
      lengths: i32[count, 3], lengths of inputs, targets and suffix in tokens.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.manifest = self._read_manifest()
        lengths: np.ndarray = np.load(folder / LENGTHS)
        # Files written before suffixes existed have two columns.
        self.lengths = np.pad(lengths, ((0, 0), (0, 1))) if lengths.shape[1:] == (2,) else lengths
        require(
            self.lengths.shape == (self.manifest.count, 3)
            and all((folder / shard).is_file() for shard in self.manifest.shards),
            f"{folder}: files do not match the manifest of {self.manifest.count} records",
            fix="Delete the directory and materialise the task again.",
        )

    def _read_manifest(self) -> Manifest:
        manifest = read_manifest(self.folder)
        assert manifest is not None
        return manifest

    @functools.cached_property
    def vocabulary(self) -> Vocabulary:
        """The vocabulary stored next to the records."""
        require(
            bool(self.manifest.vocabulary),
            f"{self.folder} was written without a vocabulary",
            fix="Pass `vocabulary` to write_records.",
        )
        path = self.folder / self.manifest.vocabulary
        vocabulary = Vocabulary(path.read_bytes() if path.is_file() else b"")
        require(
            vocabulary.sha256 == self.manifest.vocabulary_sha256,
            f"{path}: SHA-256 differs from the one in the manifest",
            fix="Delete the directory and materialise the task again.",
        )
        return vocabulary

    @functools.cached_property
    def _reader(self) -> "ArrayRecordDataSource":
        from grain.sources import ArrayRecordDataSource

        reader = ArrayRecordDataSource([str(self.folder / shard) for shard in self.manifest.shards])
        require(
            len(reader) == self.manifest.count,
            f"{self.folder} has {len(reader)} records, but its manifest says {self.manifest.count}",
            fix="Delete the directory and materialise the task again.",
        )
        return reader

    @functools.cached_property
    def token_counts(self) -> np.ndarray:
        """i64[V], how often each token occurs in the records; counted once, then stored next to the records."""
        path, size = self.folder / TOKEN_COUNTS, self.manifest.specials.vocab_size
        if path.is_file():
            return np.load(path)
        counts = np.zeros(size, np.int64)
        for start in range(0, self.manifest.count, _COUNTED_AT_ONCE):
            records = self.records(range(start, min(start + _COUNTED_AT_ONCE, self.manifest.count)))
            tokens = np.concatenate([part for one in records for part in (one.inputs, one.targets, one.suffix)])
            counts += np.bincount(tokens, minlength=size)
        with contextlib.suppress(OSError):  # a read-only directory: every process counts for itself
            temporary = path.with_name(f".{TOKEN_COUNTS}.{os.getpid()}.npy")
            np.save(temporary, counts)
            os.replace(temporary, path)
        return counts

    def records(self, indices: Sequence[int] | np.ndarray) -> list[Record]:
        """Returns the records at `indices`, in that order."""
        return [Record.decode(data) for data in self._reader.__getitems__([int(index) for index in indices])]


@functools.lru_cache(maxsize=64)
def _open(folder: Path, modified_ns: int) -> OpenSource:
    """Opens a dataset once per process; `modified_ns` is part of the cache key, so rewritten data are opened again."""
    del modified_ns
    return OpenSource(folder)
