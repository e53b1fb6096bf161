"""The data pipeline of a run: a mixture of sources and a converter.

Batch `i` is a pure function of (pipeline, i, batch size). It does not depend on the batches read before, nor on the
number of hosts, each of which reads its own slice of the rows. So the batch number is the only state to save.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from diffusion_lm.core.checks import check_positive
from diffusion_lm.core.errors import ConfigError, require
from diffusion_lm.core.special import SpecialTokens
from diffusion_lm.core.types import Batch
from diffusion_lm.data import counted
from diffusion_lm.data.checks import Cut, Use, check_lengths, check_sources, cuts
from diffusion_lm.data.converters import with_encoder
from diffusion_lm.data.fitting import Converter, Example
from diffusion_lm.data.grain_source import GrainSource, OpenSource
from diffusion_lm.data.order import PERIOD, Order
from diffusion_lm.data.packing import PackingPlan, pack
from diffusion_lm.data.prefetch import BatchIterator
from diffusion_lm.data.pretraining import Pretraining
from diffusion_lm.data.round_trip import loss_sentences
from diffusion_lm.data.rows import strata
from diffusion_lm.data.schema import Manifest, Record
from diffusion_lm.data.vocabulary import Vocabulary
from diffusion_lm.data.vocabulary_map import PrunedVocabulary, VocabularyMap

_READ_AT_ONCE = 4096


@dataclasses.dataclass(frozen=True)
class DataPipeline:
    """Batches for training and evaluation. Files are opened on first use.

    Attributes:
      sources: the sources to mix; all must have the same vocabulary.
      converter: lays out examples in rows.
      weights: weight of each source in the mixture, in rows. None = the sources are concatenated, and every example
        occurs once per epoch.
      seed: seed of the order and of the pretraining splits.
      shuffle: False = stored order; True = a new global order every epoch.
      pack: whether examples of one source share a row if they fit.
      pretraining: splits records of sources without inputs into inputs and targets.
      vocabulary_map: the subset of the vocabulary that the network has (`vocabulary_map.UsedTokens`). Batches,
        `vocabulary` and `specials` then use the ids of the subset, and all other tokens become UNK. None = all tokens.
    """

    sources: tuple[GrainSource, ...]
    converter: Converter
    weights: tuple[float, ...] | None = None
    seed: int = 0
    shuffle: bool = True
    pack: bool = False
    pretraining: Pretraining | None = None
    vocabulary_map: VocabularyMap | None = None

    def __post_init__(self):
        sources = (self.sources,) if isinstance(self.sources, GrainSource) else tuple(self.sources)
        object.__setattr__(self, "sources", sources)
        require(
            bool(sources),
            "sources=(): must not be empty",
            where="DataPipeline.sources",
            fix="Give one or more.",
        )
        if self.weights is not None:
            weights = tuple(float(weight) for weight in self.weights)
            object.__setattr__(self, "weights", weights)
            require(
                len(weights) == len(sources),
                f"{len(weights)} weights for {len(sources)} sources",
                where="DataPipeline.weights",
                fix="Give one weight per source.",
            )
            require(
                all(weight * PERIOD >= sum(weights) > 0 for weight in weights),
                f"weights={weights}: every weight must be at least 1/{PERIOD} of their sum",
                where="DataPipeline.weights",
                fix="Increase the weight, or remove the source.",
            )

    # Properties.

    @property
    def manifests(self) -> tuple[Manifest, ...]:
        """The manifest of each source."""
        return tuple(source.manifest for source in self._open)

    @property
    def vocabulary(self) -> Vocabulary | PrunedVocabulary:
        """The vocabulary of the batches: that of the sources, or its subset under `vocabulary_map`."""
        return self.pruned or self._open[0].vocabulary

    @property
    def full_vocabulary(self) -> Vocabulary:
        """The vocabulary of the sources, regardless of `vocabulary_map`."""
        return self._open[0].vocabulary

    @property
    def specials(self) -> SpecialTokens:
        """The special tokens of `vocabulary`."""
        return self.pruned.specials if self.pruned is not None else self._open[0].manifest.specials

    @functools.cached_property
    def pruned(self) -> PrunedVocabulary | None:
        """The subset of the vocabulary under `vocabulary_map`; None without a map."""
        return None if self.vocabulary_map is None else self.vocabulary_map.prune(self._open[0].vocabulary)

    @functools.cached_property
    def unknown(self) -> tuple[tuple[int, int], ...]:
        """For each source: (number of tokens that `vocabulary_map` maps to UNK, number of all tokens)."""
        if self.pruned is None:
            return tuple((0, int(source.lengths.sum(dtype=np.int64))) for source in self._open)
        cut = self.pruned.outside(np.arange(self.pruned.full.size))
        counts = [source.token_counts for source in self._open]
        return tuple((int(count[cut].sum()), int(count.sum())) for count in counts)

    @property
    def vocabulary_note(self) -> str | None:
        """What the vocabulary cannot encode and what `vocabulary_map` maps to UNK, for reports; None if nothing."""
        lossy = [
            sentence
            for manifest in self.manifests
            for sentence in loss_sentences(f"{manifest.task}/{manifest.split}", manifest.unwritten)
        ]
        return "\n".join([*lossy, *([self._map_note] if self.pruned is not None else [])]) or None

    @property
    def _map_note(self) -> str:
        assert self.pruned is not None
        share = ", ".join(
            f"{unknown:,} of {total:,} tokens of {source.task}/{source.split}"
            for source, (unknown, total) in zip(self.sources, self.unknown, strict=True)
        )
        return f"vocabulary: {self.pruned.size:,} of {self.pruned.full.size:,} tokens kept; UNK for {share}"

    @property
    def row_length(self) -> int:
        """T, length of the main stream."""
        return self.converter.row_length

    @property
    def encoder_length(self) -> int | None:
        """S, length of the encoder stream; None without an encoder."""
        return self.converter.encoder_length

    @property
    def epoch_rows(self) -> int:
        """Number of rows of all sources."""
        return sum(plan.rows for plan in self._plans)

    def cuts(self, use: Use, limit: int | None = None) -> tuple[Cut, ...]:
        """Returns the truncated parts of the examples, one `Cut` for each source and part with at least one.

        Counted from the stored lengths, without reading records.

        Args:
          use: what the batches are used for.
          limit: number of examples to count, from the start of the stored order; None = all.
        """
        sources, indices = self._stored(limit)
        found: list[Cut] = []
        for number, (source, part) in enumerate(zip(self._open, self._parts, strict=True)):
            chosen = None if limit is None else indices[sources == number]
            found += cuts(self.converter, source, part, use, chosen)
        return tuple(found)

    def abstract_batch(self, batch_size: int) -> Batch:
        """Returns the shapes and dtypes of a batch; works before the data are materialised."""
        try:
            specials = self.specials
        except ConfigError:
            # `plan` and `bench` need shapes before the data are materialised. The ids do not matter there.
            specials = SpecialTokens(vocab_size=2**31 - 1, bos_id=2, mask_id=4)
        batch = self.converter.abstract_batch(batch_size, specials)
        return batch.replace(strata=jax.ShapeDtypeStruct(batch.tokens.shape, np.float32))

    def with_encoder(self, encoder: bool) -> "DataPipeline":
        """Returns the same pipeline with a converter for networks with or without an encoder; lengths are kept."""
        converter = with_encoder(self.converter, encoder)
        return self if converter is self.converter else dataclasses.replace(self, converter=converter)

    # Training.

    def batch(self, index: int, batch_size: int, *, process_index: int = 0, process_count: int = 1) -> Batch:
        """Returns this process's rows of global batch `index` as NumPy arrays.

        Args:
          index: number of the batch, from 0 without an upper bound.
          batch_size: number of rows of the global batch.
          process_index: number of this process, which reads the contiguous slice of this number.
          process_count: number of processes and of equal slices.
        """
        start, count = _slice(batch_size, process_index, process_count)
        sources, numbers, epochs = self._order.places(index * batch_size + start + np.arange(count))
        members = [self._plans[source].row(number) for source, number in zip(sources, numbers, strict=True)]
        rows = [
            [self._example(record, int(source), int(epoch)) for record in records]
            for records, source, epoch in zip(self._read(sources, members), sources, epochs, strict=True)
        ]
        batch = self.converter.batch(rows, self.specials, training=True)
        return batch.replace(strata=strata(batch.segment_ids, start, batch_size))

    def iterator(
        self,
        batch_size: int,
        *,
        position: int = 0,
        process_index: int = 0,
        process_count: int = 1,
        prefetch: int = 2,
    ) -> BatchIterator:
        """Returns an endless iterator from global batch `position` on; a thread prefetches `prefetch` batches."""
        self.check()
        _slice(batch_size, process_index, process_count)

        def read(index: int) -> Batch:
            return self.batch(index, batch_size, process_index=process_index, process_count=process_count)

        return BatchIterator(read, position, prefetch)

    # Evaluation: stored order, one example per row.

    def eval_batches(
        self, batch_size: int, limit: int | None = None, *, process_index: int = 0, process_count: int = 1
    ) -> Iterator[tuple[Batch, list[Record]]]:
        """Yields batches with targets of the first `limit` examples, and their records.

        The last batch is filled up with copies of its last example; these have loss weight 0 and no record.
        """
        for examples, records in self._evaluation(batch_size, limit, process_index, process_count):
            batch = self.converter.batch([[example] for example in examples], self.specials, training=False)
            np.asarray(batch.loss_weights)[len(records) :] = 0
            yield batch, records

    def prompt_batches(
        self, batch_size: int, limit: int | None = None, *, process_index: int = 0, process_count: int = 1
    ) -> Iterator[tuple[Batch, list[Record]]]:
        """Yields prompts of the first `limit` examples, with PAD in the target window, and their records.

        The last batch is filled up with copies of its last example, which have no record.
        """
        for examples, records in self._evaluation(batch_size, limit, process_index, process_count):
            yield self.converter.prompts(examples, self.specials), records

    def records(self, limit: int | None = None) -> Iterator[Record]:
        """Yields the records of the first `limit` examples in stored order, as evaluation reads them."""
        sources, indices = self._stored(limit)
        for start in range(0, len(sources), _READ_AT_ONCE):
            part = slice(start, start + _READ_AT_ONCE)
            yield from itertools.chain.from_iterable(self._read(sources[part], list(indices[part, None])))

    def check(self, *, evaluation: bool = False) -> None:
        """Opens all sources and raises `ConfigError` for anything that would fail later.

        That is: a source is missing or unreadable, vocabularies differ, the pretraining transform is missing or unused,
        sentinels are missing, packing is impossible, or an example does not fit and must not be truncated (with
        `evaluation`, targets are truncated only under `too_long = "truncate"`).
        """
        for source, part in zip(self._open, self._parts, strict=True):
            check_lengths(self.converter, source, part, evaluation=evaluation)
        assert self._order.sizes

    # Implementation.

    @functools.cached_property
    def _open(self) -> tuple[OpenSource, ...]:
        opened = tuple(source.open() for source in self.sources)
        check_sources(opened, self.converter, self.pretraining, pack=self.pack)
        return opened

    @functools.cached_property
    def _sentinels(self) -> tuple[int, ...]:
        needed = self.pretraining is not None and self.pretraining.needs_sentinels
        return self.vocabulary.sentinel_ids if needed else ()

    @functools.cached_property
    def _piece_length(self) -> int:
        return self.converter.max_piece(self.pretraining) if self.pretraining is not None else 0

    @functools.cached_property
    def _parts(self) -> tuple[Pretraining | None, ...]:
        """The pretraining transform of each source; None for sources with inputs."""
        return tuple(None if source.manifest.has_inputs else self.pretraining for source in self._open)

    @functools.cached_property
    def _plans(self) -> tuple[PackingPlan, ...]:
        plans = []
        for number, (source, part) in enumerate(zip(self._open, self._parts, strict=True)):
            count = source.manifest.count
            if not self.pack:
                plans.append(PackingPlan.single(count))
                continue
            order = np.arange(count)
            if self.shuffle:
                order = counted.permute(order, count, counted.key("packing", self.seed, number))
            plans.append(pack(self.converter.costs(source.lengths, part), self.converter.capacity, order))
        return tuple(plans)

    @functools.cached_property
    def _order(self) -> Order:
        return Order(tuple(plan.rows for plan in self._plans), self.weights, self.seed, self.shuffle)

    def _read(self, sources: np.ndarray, members: Sequence[np.ndarray]) -> list[list[Record]]:
        """Returns the records `members[row]` of source `sources[row]` for each row, with one read per source."""
        rows: list[list[Record]] = [[] for _ in members]
        for source in np.unique(sources):
            here = np.flatnonzero(sources == source).tolist()
            found = self._open[source].records(np.concatenate([members[row] for row in here]))
            records = iter(found if self.pruned is None else map(self._pruned_record, found))
            for row in here:
                rows[row] = list(itertools.islice(records, len(members[row])))
        return rows

    def _pruned_record(self, record: Record) -> Record:
        """Returns the record with the ids of the vocabulary map."""
        assert self.pruned is not None
        inputs, targets, suffix = map(self.pruned.to_pruned, (record.inputs, record.targets, record.suffix))
        return dataclasses.replace(record, inputs=inputs, targets=targets, suffix=suffix)

    def _example(self, record: Record, source: int, epoch: int) -> Example:
        part = self._parts[source]
        if part is None:
            return Example(record.inputs, record.targets, record.example_id, suffix=record.suffix)
        piece = record.targets[: self._piece_length]
        key = counted.key("pretraining", self.seed, epoch, record.example_id)
        inputs, targets = part.split(piece, key, eos_id=self.specials.eos_id, sentinel_ids=self._sentinels)
        return Example(inputs, targets, record.example_id, part.target_window)

    def _evaluation(
        self, batch_size: int, limit: int | None, process_index: int, process_count: int
    ) -> Iterator[tuple[Sequence[Example], list[Record]]]:
        """Yields the examples of each batch, filled up to its size, and the records of those that are not fillers."""
        first, count = _slice(batch_size, process_index, process_count)
        every_source, every_index = self._stored(limit)
        total = len(every_source)
        for start in range(0, total, batch_size):
            wanted = np.arange(start + first, start + first + count)
            filled = np.minimum(wanted, total - 1)  # repeats the last example
            sources, indices = every_source[filled], every_index[filled]
            records = list(itertools.chain.from_iterable(self._read(sources, list(indices[:, None]))))
            examples = [self._example(record, int(s), epoch=0) for s, record in zip(sources, records, strict=True)]
            yield examples, records[: int((wanted < total).sum())]

    def _stored(self, limit: int | None) -> tuple[np.ndarray, np.ndarray]:
        """Returns (source, index), i64[n] each, of the first `limit` examples in stored order."""
        stored = Order(tuple(source.manifest.count for source in self._open), None, self.seed, shuffle=False)
        total = sum(stored.sizes) if limit is None else min(limit, sum(stored.sizes))
        sources, indices, _ = stored.places(np.arange(total))
        return sources, indices


def _slice(batch_size: int, process_index: int, process_count: int) -> tuple[int, int]:
    """Returns the first row and the number of rows of one process."""
    check_positive(batch_size, "batch_size", "Use 1 or more.")
    require(
        batch_size % process_count == 0,
        f"batch_size={batch_size}: must be a multiple of the {process_count} processes",
        where="batch_size",
        fix="Use a multiple of the number of processes.",
    )
    count = batch_size // process_count
    return process_index * count, count
