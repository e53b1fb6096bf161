"""Vocabulary pruning: keeps only the tokens of one task, for a smaller embedding and softmax in fine-tuning.

Source: arXiv 2308.12219, which prunes XLM-R's 250,000 tokens to those of the training set. Materialised data keep the
ids of the full vocabulary. `DataPipeline.vocabulary_map` maps them when it makes a batch, and everything after that
(special tokens, encoding, decoding) uses the new ids. `architectures.surgery` prunes the parameters.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol, TypedDict

import numpy as np

from diffusion_lm.core.errors import ConfigError, require
from diffusion_lm.core.files import as_path, read_json, write_json
from diffusion_lm.core.special import SpecialTokens
from diffusion_lm.data.grain_source import GrainSource
from diffusion_lm.data.vocabulary import Vocabulary

FILE = "vocabulary_map.json"
"""File in a run directory with the kept ids."""


class StoredIds(TypedDict):
    """Contents of `vocabulary_map.json`.

    Attributes:
      full_sha256: hash of the full vocabulary.
      full_size: number of its tokens.
      kept: the full id of each new id.
    """

    full_sha256: str
    full_size: int
    kept: list[int]


@dataclasses.dataclass(frozen=True)
class PrunedVocabulary:
    """A subset of a vocabulary with new ids and the interface of `Vocabulary`.

    Attributes:
      full: the full vocabulary.
      kept: the full id of each new id.
    """

    full: Vocabulary
    kept: tuple[int, ...] = dataclasses.field(repr=False)

    def __post_init__(self):
        missing = sorted(map(int, set(always_kept(self.full)) - set(self.kept)))
        require(
            not missing and len(set(self.kept)) == len(self.kept),
            f"kept: must have every special token exactly once; missing ids: {[int(token) for token in missing[:5]]}",
            where="PrunedVocabulary.kept",
            fix="Use vocabulary_map.UsedTokens.",
        )
        require(
            all(0 <= token < self.full.size for token in self.kept),
            f"kept: token {max(self.kept)} is not in the vocabulary of {self.full.size} tokens",
            where="PrunedVocabulary.kept",
            fix="Use the map with the vocabulary that it was made from.",
        )

    @functools.cached_property
    def _new(self) -> np.ndarray:
        """i32[full.size], the new id of each full id, -1 for pruned tokens."""
        table = np.full(self.full.size, -1, np.int32)
        table[np.asarray(self.kept)] = np.arange(len(self.kept), dtype=np.int32)
        return table

    @functools.cached_property
    def sha256(self) -> str:
        """SHA-256 of the full vocabulary and the kept ids."""
        return hashlib.sha256(f"{self.full.sha256} {self.kept}".encode()).hexdigest()

    @property
    def size(self) -> int:
        """Number of tokens."""
        return len(self.kept)

    def __len__(self) -> int:
        return self.size

    @functools.cached_property
    def specials(self) -> SpecialTokens:
        """The special tokens, with new ids."""
        full = self.full.specials
        return SpecialTokens(
            vocab_size=self.size,
            pad_id=int(self._new[full.pad_id]),
            eos_id=int(self._new[full.eos_id]),
            bos_id=int(self._new[full.bos_id]),
            mask_id=None if full.mask_id is None else int(self._new[full.mask_id]),
            other_eos_ids=tuple(int(self._new[token]) for token in full.other_eos_ids),
        )

    @property
    def unk_id(self) -> int:
        """New id of UNK, which replaces every pruned token."""
        return int(self._new[_unk_id(self.full)])

    @property
    def sentinel_ids(self) -> tuple[int, ...]:
        """New ids of the sentinels of span corruption, which are always kept."""
        return tuple(int(self._new[token]) for token in self.full.sentinel_ids)

    def outside(self, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
        """Returns bool[...], True for full ids that were pruned."""
        return self._new[np.asarray(tokens, np.int32)] < 0

    def to_pruned(self, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
        """Maps full ids to new ids, i32[...]; pruned tokens become UNK."""
        new = self._new[np.asarray(tokens, np.int32)]
        return np.where(new < 0, np.int32(self.unk_id), new)

    def to_full(self, tokens: Iterable[int]) -> list[int]:
        """Maps new ids to full ids; ids beyond the vocabulary (padding rows) are dropped."""
        return [self.kept[token] for token in map(int, tokens) if 0 <= token < self.size]

    def encode(self, text: str) -> list[int]:
        """Returns the new ids of `text`, without BOS and EOS; pruned tokens become UNK."""
        return self.to_pruned(self.full.encode(text)).tolist()

    def decode(self, tokens: Iterable[int]) -> str:
        """Returns the text before the first EOS, without special tokens."""
        return self.full.decode(self.to_full(tokens))

    def decode_all(self, rows: Iterable[Sequence[int]]) -> list[str]:
        """Returns the text of each row of tokens."""
        return [self.decode(row) for row in rows]

    def piece(self, token: int) -> str:
        """Returns the SentencePiece spelling of a token, as `Vocabulary.piece`."""
        return self.full.piece(self.kept[token]) if 0 <= token < self.size else ""

    def save(self, folder: Path) -> None:
        """Writes the kept ids to `folder`/vocabulary_map.json."""
        content: StoredIds = {"full_sha256": self.full.sha256, "full_size": self.full.size, "kept": list(self.kept)}
        write_json(folder / FILE, content)


class VocabularyMap(Protocol):
    """Chooses the tokens of a vocabulary to keep."""

    def prune(self, full: Vocabulary) -> PrunedVocabulary:
        """Returns the kept subset of `full`."""
        ...


@dataclasses.dataclass(frozen=True)
class UsedTokens:
    """Keeps the special tokens and all tokens that occur in the given splits.

    Special tokens come first, then all others, both in the order of their full ids. So the new id of MASK does not
    depend on the data: 4 for XLM-R's vocabulary (BOS 0, PAD 1, EOS 2, UNK 3) and for that of the embedded tasks.

    Attributes:
      sources: the splits to count tokens in, usually the training data. Tokens that occur only elsewhere become UNK
        (`DataPipeline.unknown` counts them).
      size: number of tokens to keep, so that a network can be configured before its data are materialised. Unused
        tokens fill it up in the order of their ids (most tokenizers sort by frequency). None keeps only used tokens.
    """

    sources: tuple[GrainSource, ...]
    size: int | None = None

    def __post_init__(self):
        sources = (self.sources,) if isinstance(self.sources, GrainSource) else tuple(self.sources)
        object.__setattr__(self, "sources", sources)
        require(
            bool(sources), "sources=(): must not be empty", where="UsedTokens.sources", fix="Give the training data."
        )

    def prune(self, full: Vocabulary) -> PrunedVocabulary:
        """Returns the kept subset of `full`. The first call reads all records of the splits.

        Raises:
          ConfigError: a split is missing or has another vocabulary, the vocabulary has no UNK, or `size` is too small
            or too large.
        """
        counts = np.zeros(full.size, np.int64)
        for source in self.sources:
            require(
                source.vocabulary.sha256 == full.sha256,
                f"task {source.task!r} was materialised with another vocabulary than the data of the run",
                where="UsedTokens.sources",
                fix="Use splits that have the vocabulary of the run.",
            )
            counts += source.open().token_counts
        first = always_kept(full)
        rest = np.setdiff1d(np.flatnonzero(counts), first)
        if self.size is not None:
            used = len(first) + len(rest)
            require(
                used <= self.size <= full.size,
                f"size={self.size}: the data use {used} of {full.size} tokens, including special tokens",
                where="UsedTokens.size",
                fix=f"Set it to {used} or more (at most {full.size}), and VOCAB_SIZE to the same.",
            )
            unused = np.setdiff1d(np.arange(full.size), np.concatenate([first, rest]))
            rest = np.union1d(rest, unused[: self.size - used])
        return PrunedVocabulary(full, (*map(int, first), *map(int, rest)))


@dataclasses.dataclass(frozen=True)
class StoredMap:
    """The map of another run, for decoding or training from its checkpoint without its training data.

    Attributes:
      folder: the run directory.
    """

    folder: str

    def prune(self, full: Vocabulary) -> PrunedVocabulary:
        """Returns the subset of the run; raises `ConfigError` without a map, or for one of another vocabulary."""
        stored = read_map(self.folder)
        require(
            stored is not None,
            f"{self.folder} has no {FILE}",
            where="StoredMap.folder",
            fix="Give the directory of a run with a vocabulary map.",
        )
        assert stored is not None
        require(
            stored["full_sha256"] == full.sha256,
            f"the vocabulary map of {self.folder} was made from another vocabulary than the data",
            where="StoredMap.folder",
            fix="Use data with the vocabulary that the run was trained with.",
        )
        return PrunedVocabulary(full, tuple(stored["kept"]))


def read_map(folder: str | Path) -> StoredIds | None:
    """Returns the vocabulary map of a run directory or of one of its checkpoints, None if it has none."""
    path = as_path(folder)
    for place in (path, path.parent, path.parent.parent):
        if (place / FILE).is_file():
            return read_json(place / FILE)
        if (place / "run_card.json").is_file():
            return None
    return None


def always_kept(full: Vocabulary) -> np.ndarray:
    """Returns i64[n], the full ids of the special tokens in ascending order, then of the sentinels."""
    specials = full.specials
    ids = {specials.pad_id, specials.eos_id, specials.bos_id, specials.mask_id, _unk_id(full)} - {None}
    return np.array([*sorted(ids), *sorted(set(full.sentinel_ids) - ids)], np.int64)  # type: ignore[type-var]


def _unk_id(full: Vocabulary) -> int:
    token = full.unk_id
    if token is None:
        raise ConfigError(
            "the vocabulary has no UNK token, which replaces pruned tokens",
            where="DataPipeline.vocabulary_map",
            fix="Set it to None, or use a vocabulary with an UNK token.",
        )
    return token
