"""A vocabulary cut to the tokens that data use: smaller embeddings and softmax for fine-tuning on one task.

Source: arXiv 2308.12219, which prunes XLM-R's 250,000 tokens to those of the training set. The data on disk keep the
ids of the full vocabulary; `DataPipeline.vocabulary_map` maps them when a batch is made, and everything behind it
(special tokens, encoding, decoding) speaks the new ids. `architectures.surgery` moves the parameters' rows.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from diffusion_lm.core.errors import ConfigError, require
from diffusion_lm.core.files import as_path, read_json, write_json
from diffusion_lm.core.special import SpecialTokens
from diffusion_lm.data.grain_source import GrainSource
from diffusion_lm.data.vocabulary import Vocabulary

FILE = "vocabulary_map.json"
"""Where a run folder keeps the ids that its network knows."""


@dataclasses.dataclass(frozen=True)
class PrunedVocabulary:
    """Part of a vocabulary under new ids; has all that `Vocabulary` offers to batches and texts.

    Attributes:
      full: the vocabulary that it is part of.
      kept: the full id of each new id.
    """

    full: Vocabulary
    kept: tuple[int, ...] = dataclasses.field(repr=False)

    def __post_init__(self):
        missing = sorted(set(always_kept(self.full)) - set(self.kept))
        require(
            not missing and len(set(self.kept)) == len(self.kept),
            f"a pruned vocabulary must hold every special token once; it lacks {missing[:5]}",
            fix="Make it with vocabulary_map.UsedTokens.",
        )
        require(
            all(0 <= token < self.full.size for token in self.kept),
            f"the vocabulary of {self.full.size} tokens has no token {max(self.kept)}",
            fix="Use the map with the vocabulary that it was made of.",
        )

    @functools.cached_property
    def _new(self) -> np.ndarray:
        """i32[full size], the new id of each full one, -1 where it was cut."""
        table = np.full(self.full.size, -1, np.int32)
        table[np.asarray(self.kept)] = np.arange(len(self.kept), dtype=np.int32)
        return table

    @functools.cached_property
    def sha256(self) -> str:
        """Hash of the full vocabulary and the kept ids."""
        return hashlib.sha256(f"{self.full.sha256} {self.kept}".encode()).hexdigest()

    @property
    def size(self) -> int:
        """Number of tokens."""
        return len(self.kept)

    def __len__(self) -> int:
        return self.size

    @functools.cached_property
    def specials(self) -> SpecialTokens:
        """The special tokens under their new ids."""
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
        """The token that stands for every cut one."""
        return int(self._new[_unk_id(self.full)])

    @property
    def sentinel_ids(self) -> tuple[int, ...]:
        """The sentinels of span corruption, all of which are kept."""
        return tuple(int(self._new[token]) for token in self.full.sentinel_ids)

    def outside(self, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
        """Returns bool[...]: which tokens, given by full ids, were cut."""
        return self._new[np.asarray(tokens, np.int32)] < 0

    def to_pruned(self, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
        """Returns i32[...] new ids of full ones; UNK for what was cut."""
        new = self._new[np.asarray(tokens, np.int32)]
        return np.where(new < 0, np.int32(self.unk_id), new)

    def to_full(self, tokens: Iterable[int]) -> list[int]:
        """Returns the full ids of new ones; ids past the vocabulary (padding rows) are left out."""
        return [self.kept[token] for token in map(int, tokens) if 0 <= token < self.size]

    def encode(self, text: str) -> list[int]:
        """Returns the tokens of `text`, without BOS and EOS; UNK for what was cut."""
        return self.to_pruned(self.full.encode(text)).tolist()

    def decode(self, tokens: Iterable[int]) -> str:
        """Returns the text before the first EOS, without special tokens."""
        return self.full.decode(self.to_full(tokens))

    def decode_all(self, rows: Iterable[Sequence[int]]) -> list[str]:
        """Returns the text of each row of tokens."""
        return [self.decode(row) for row in rows]

    def piece(self, token: int) -> str:
        """Returns one token as the vocabulary spells it."""
        return self.full.piece(self.kept[token]) if 0 <= token < self.size else ""

    def save(self, folder: Path) -> None:
        """Writes the kept ids to `folder`/vocabulary_map.json."""
        content = {"full_sha256": self.full.sha256, "full_size": self.full.size, "kept": list(self.kept)}
        write_json(folder / FILE, content)


class VocabularyMap(Protocol):
    """A rule that says which tokens of a vocabulary are kept."""

    def prune(self, full: Vocabulary) -> PrunedVocabulary:
        """Returns the part of `full` that is kept."""
        ...


@dataclasses.dataclass(frozen=True)
class UsedTokens:
    """Keeps the tokens that occur in the named splits, and the special tokens.

    Special tokens come first, in the order of their ids, then all others in theirs. So MASK has an id that does not
    depend on the data: 4 in XLM-R's vocabulary (BOS 0, PAD 1, EOS 2, UNK 3), 4 in that of the embedded tasks.

    Attributes:
      sources: the splits that are looked through, usually those that are trained on. What occurs elsewhere only
        becomes UNK (`DataPipeline.unknown` counts it).
      size: number of tokens to keep, so that a network can be configured before its data are there: tokens that are
        not used fill it up, in the order of their ids (the frequent ones first, as tokenisers are trained). None keeps
        the used tokens alone.
    """

    sources: tuple[GrainSource, ...]
    size: int | None = None

    def __post_init__(self):
        sources = (self.sources,) if isinstance(self.sources, GrainSource) else tuple(self.sources)
        object.__setattr__(self, "sources", sources)
        require(bool(sources), "no split is named", where="UsedTokens.sources", fix="Name those that are trained on.")

    def prune(self, full: Vocabulary) -> PrunedVocabulary:
        """Returns the part of `full` that is kept; reads every named split the first time.

        Raises:
          ConfigError: a split is missing or has another vocabulary, the vocabulary has no UNK, or `size` is too small
            or more than there are.
        """
        counts = np.zeros(full.size, np.int64)
        for source in self.sources:
            require(
                source.vocabulary.sha256 == full.sha256,
                f"task {source.task!r} was materialised with another vocabulary than the data of the run",
                where="UsedTokens.sources",
                fix="Name splits of the run's own vocabulary.",
            )
            counts += source.open().token_counts
        first = always_kept(full)
        rest = np.setdiff1d(np.flatnonzero(counts), first)
        if self.size is not None:
            used = len(first) + len(rest)
            require(
                used <= self.size <= full.size,
                f"the data use {used} tokens of {full.size} (specials included), not {self.size}",
                where="UsedTokens.size",
                fix=f"Set it to {used} or more (at most {full.size}), and VOCAB_SIZE to the same.",
            )
            unused = np.setdiff1d(np.arange(full.size), np.concatenate([first, rest]))
            rest = np.union1d(rest, unused[: self.size - used])
        return PrunedVocabulary(full, (*map(int, first), *map(int, rest)))


@dataclasses.dataclass(frozen=True)
class StoredMap:
    """The map that another run was trained with: decodes or goes on from it where its training data are not at hand.

    Attributes:
      folder: the run folder.
    """

    folder: str

    def prune(self, full: Vocabulary) -> PrunedVocabulary:
        """Returns the part of `full` that the run keeps; raises `ConfigError` where there is no map, or another's."""
        stored = read_map(self.folder)
        require(
            stored is not None,
            f"{self.folder} has no {FILE}",
            where="StoredMap.folder",
            fix="Name the folder of a run with a vocabulary map.",
        )
        assert stored is not None
        require(
            stored["full_sha256"] == full.sha256,
            f"the map of {self.folder} belongs to another vocabulary",
            where="StoredMap.folder",
            fix="Use data of the vocabulary that the run was trained with.",
        )
        return PrunedVocabulary(full, tuple(stored["kept"]))


def read_map(folder: str | Path) -> dict[str, Any] | None:
    """Returns `{"full_sha256", "full_size", "kept"}` of a run (or one of its checkpoints), None where it has no map."""
    path = as_path(folder)
    for place in (path, path.parent, path.parent.parent):
        if (place / FILE).is_file():
            return read_json(place / FILE)
        if (place / "run_card.json").is_file():
            return None
    return None


def always_kept(full: Vocabulary) -> np.ndarray:
    """Returns i64[n], the special tokens of a vocabulary in the order of their ids, then its sentinels."""
    specials = full.specials
    ids = {specials.pad_id, specials.eos_id, specials.bos_id, specials.mask_id, _unk_id(full)} - {None}
    return np.array([*sorted(ids), *sorted(set(full.sentinel_ids) - ids)], np.int64)  # type: ignore[type-var]


def _unk_id(full: Vocabulary) -> int:
    token = full.unk_id
    if token is None:
        raise ConfigError(
            "the vocabulary has no UNK, which cut tokens need",
            where="DataPipeline.vocabulary_map",
            fix="Leave the map out, or use a vocabulary with an unknown token.",
        )
    return token
