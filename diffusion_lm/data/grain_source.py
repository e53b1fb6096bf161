"""Random access to materialised records through Grain's ArrayRecord reader, without TensorFlow."""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_lm.core.errors import ConfigError, require
from diffusion_lm.core.files import is_bucket
from diffusion_lm.data.bucket import local_copy
from diffusion_lm.data.materialise import MAX_LOSSY, materialise, materialise_command
from diffusion_lm.data.schema import Manifest, Record
from diffusion_lm.data.store import LENGTHS, MANIFEST, read_manifest, split_folder
from diffusion_lm.data.vocabulary import Vocabulary

TOKEN_COUNTS = "token_counts.npy"
_COUNTED_AT_ONCE = 4096


@dataclasses.dataclass(frozen=True)
class GrainSource:
    """One materialised split of one task. Nothing is read before it is asked for.

    Attributes:
      task: name of the SeqIO task.
      split: name of its split.
      root: where datasets live; None = `store.default_root()`.
      chunk_length: the length into which `materialise` cuts documents; None = whatever was materialised.
      max_lossy: share of the targets that the vocabulary may fail to write when the split is materialised.
    """

    task: str
    split: str = "train"
    root: str | None = None
    chunk_length: int | None = None
    max_lossy: float = dataclasses.field(default=MAX_LOSSY, compare=False)

    def __post_init__(self):
        require(bool(self.task), "no task is named", where="GrainSource.task", fix="Name a task, e.g. 'wmt14_en_fr'.")
        if self.root is not None:
            object.__setattr__(self, "root", str(self.root))

    @property
    def folder(self) -> Path:
        """The folder of the split."""
        return split_folder(self.task, self.split, self.root)

    @property
    def command(self) -> str:
        """The command line that materialises the split."""
        return materialise_command(self.task, self.split, self.root, self.chunk_length, self.max_lossy)

    def materialise(self, **options: Any) -> Manifest:
        """Materialises the split where it is missing (needs TensorFlow then); `options` as for `materialise`."""
        return materialise(self.task, self.split, self.root, **{**self._options, **options})

    @property
    def _options(self) -> dict[str, Any]:
        return {"chunk_length": self.chunk_length, "max_lossy": self.max_lossy}

    def open(self) -> "OpenSource":
        """Returns the open dataset.

        Raises:
          ConfigError: it is not materialised, not readable, or was materialised with another chunk_length.
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
            f"{self.folder} was cut into pieces of {source.manifest.chunk_length} tokens, not {self.chunk_length}",
            where="GrainSource.chunk_length",
            fix=f"Delete the folder and run: {self.command}",
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
      folder: where they are.
      manifest: what they are.
      lengths: i32[count, 3], tokens of inputs, targets and suffix.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.manifest = self._read_manifest()
        lengths: np.ndarray = np.load(folder / LENGTHS)
        # Files from before suffixes have two columns.
        self.lengths = np.pad(lengths, ((0, 0), (0, 1))) if lengths.shape[1:] == (2,) else lengths
        require(
            self.lengths.shape == (self.manifest.count, 3)
            and all((folder / shard).is_file() for shard in self.manifest.shards),
            f"the files of {folder} do not match its manifest of {self.manifest.count} records",
            fix="Delete the folder and materialise the task again.",
        )

    def _read_manifest(self) -> Manifest:
        manifest = read_manifest(self.folder)
        assert manifest is not None
        return manifest

    @functools.cached_property
    def vocabulary(self) -> Vocabulary:
        """The vocabulary stored beside the records."""
        require(
            bool(self.manifest.vocabulary),
            f"{self.folder} was written without a vocabulary",
            fix="Give write_records the vocabulary.",
        )
        path = self.folder / self.manifest.vocabulary
        vocabulary = Vocabulary(path.read_bytes() if path.is_file() else b"")
        require(
            vocabulary.sha256 == self.manifest.vocabulary_sha256,
            f"the vocabulary file of {self.folder} is not the one that its manifest names",
            fix="Delete the folder and materialise the task again.",
        )
        return vocabulary

    @functools.cached_property
    def _reader(self) -> Any:
        from grain.sources import ArrayRecordDataSource

        reader = ArrayRecordDataSource([str(self.folder / shard) for shard in self.manifest.shards])
        require(
            len(reader) == self.manifest.count,
            f"{self.folder} holds {len(reader)} records, its manifest says {self.manifest.count}",
            fix="Delete the folder and materialise the task again.",
        )
        return reader

    @functools.cached_property
    def token_counts(self) -> np.ndarray:
        """i64[vocabulary], how often each token occurs in the records; counted once, kept beside the records."""
        path, size = self.folder / TOKEN_COUNTS, self.manifest.specials.vocab_size
        if path.is_file():
            return np.load(path)
        counts = np.zeros(size, np.int64)
        for start in range(0, self.manifest.count, _COUNTED_AT_ONCE):
            records = self.records(range(start, min(start + _COUNTED_AT_ONCE, self.manifest.count)))
            tokens = np.concatenate([part for one in records for part in (one.inputs, one.targets, one.suffix)])
            counts += np.bincount(tokens, minlength=size)
        with contextlib.suppress(OSError):  # data that others own are counted by every process
            temporary = path.with_name(f".{TOKEN_COUNTS}.{os.getpid()}.npy")
            np.save(temporary, counts)
            os.replace(temporary, path)
        return counts

    def records(self, indices: Sequence[int] | np.ndarray) -> list[Record]:
        """Returns the records at `indices`, in that order."""
        return [Record.decode(data) for data in self._reader.__getitems__([int(index) for index in indices])]


@functools.lru_cache(maxsize=64)
def _open(folder: Path, modified_ns: int) -> OpenSource:
    """One open dataset per folder and process; a dataset written anew is opened anew."""
    del modified_ns
    return OpenSource(folder)
