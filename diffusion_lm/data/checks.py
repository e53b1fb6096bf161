"""What a pipeline finds out about its sources before anything is spent: whether they go together, what is cut."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from diffusion_lm.core.errors import require
from diffusion_lm.data.fitting import Converter, too_long_error
from diffusion_lm.data.grain_source import OpenSource
from diffusion_lm.data.pretraining import Pretraining

Use = Literal["training", "scoring", "prompts"]
"""What batches are made for: `DataPipeline.batch`, `eval_batches` or `prompt_batches`."""


@dataclasses.dataclass(frozen=True)
class Cut:
    """Examples of one split that a row does not hold whole.

    Attributes:
      task: name of the task.
      split: its split.
      part: "prompts" (cut at their left, where a question may be), "targets", "texts" (documents of pretraining) or
        "suffixes", all three cut at their right.
      count: examples that do not fit.
      of: examples looked at: those that are used.
      kept: tokens that are kept of such a part.
      longest: tokens of the longest such part.
      field: the setting to raise.
      closed: a slot for EOS follows the kept tokens.
      generated: the targets are not in the batch: a sampler cannot reach their end.
    """

    task: str
    split: str
    part: str
    count: int
    of: int
    kept: int
    longest: int
    field: str
    closed: bool = False
    generated: bool = False

    @property
    def side(self) -> str:
        """The side on which tokens are lost."""
        return "left" if self.part == "prompts" else "right"

    def __str__(self) -> str:
        tokens = f"{self.kept:,} tokens{' and EOS' if self.closed else ''}"
        what = (
            f"targets are longer than the {tokens} that can be generated"
            if self.generated
            else f"{self.part} cut at the {self.side} to {tokens}"
        )
        return f"{self.task}/{self.split}: {self.count:,} of {self.of:,} {what} ({self.field})"

    def plain(self) -> dict[str, Any]:
        """Returns the fields, the side and the sentence as JSON data, for result files."""
        return {**dataclasses.asdict(self), "side": self.side, "text": str(self)}


def cuts(
    converter: Converter, source: OpenSource, part: Pretraining | None, use: Use, indices: np.ndarray | None
) -> tuple[Cut, ...]:
    """Returns what the rows of a converter do not hold whole of the examples at `indices`, i64[n]; None = of all.

    Reads the length index only. What the converter refuses to cut is not counted: the batch is an error.
    """
    if converter.too_long == "error":
        return ()
    name, found = type(converter).__name__, []
    for what, every, room in _rooms(converter, source, part):
        lengths = every if indices is None else every[indices]
        generated = what == "target" and use == "prompts"
        refused = what == "target" and use == "scoring" and converter.too_long != "truncate" and part is None
        count = int((lengths > room).sum())
        refused = refused or (what == "suffix" and room == 0)
        if not count or refused:
            continue
        words, field = _WORDS[what]
        found.append(
            Cut(
                task=source.manifest.task,
                split=source.manifest.split,
                part="texts" if part is not None else words,
                count=count,
                of=len(lengths),
                kept=room,
                longest=int(lengths.max()),
                field=f"{name}.{field}",
                closed=what == "target" and part is None and room < converter.target_length,
                generated=generated,
            )
        )
    return tuple(found)


_WORDS = {
    "conditioning": ("prompts", "inputs_length"),
    "target": ("targets", "target_length"),
    "suffix": ("suffixes", "suffix_length"),
}


def check_lengths(converter: Converter, source: OpenSource, part: Pretraining | None, *, evaluation: bool) -> None:
    """Raises `ConfigError` where something does not fit and may not be cut, before any step is spent."""
    policy = converter.too_long
    for name, lengths, room in _rooms(converter, source, part):
        kept = policy == "error" or (policy == "truncate_inputs" and evaluation and name == "target" and not part)
        kept = kept or (name == "suffix" and room == 0)
        if kept and lengths.max(initial=0) > room:
            raise too_long_error(converter, name, int(lengths.max()), room)
    slots = int(converter.costs(source.lengths, part)[:, 0].max(initial=0))
    if slots > converter.row_length:
        raise too_long_error(converter, "example", slots, converter.row_length)


def _rooms(converter: Converter, source: OpenSource, part: Pretraining | None) -> list[tuple[str, np.ndarray, int]]:
    """Returns (name, i32[n] lengths, room) of what the converter may have to cut."""
    if part is not None:
        return [("target", source.lengths[:, 1], converter.max_piece(part))]
    return [
        ("conditioning", source.lengths[:, 0], converter.inputs_length),
        ("target", source.lengths[:, 1], converter.target_window.room(converter.target_length)),
        ("suffix", source.lengths[:, 2], converter.suffix_length),
    ]


def check_sources(
    opened: Sequence[OpenSource], converter: Converter, pretraining: Pretraining | None, *, pack: bool
) -> None:
    """Raises `ConfigError`: vocabularies differ, or the pretraining transform is missing, useless or impossible."""
    first = opened[0].manifest
    for source in opened[1:]:
        require(
            source.manifest.vocabulary_sha256 == first.vocabulary_sha256 and source.manifest.specials == first.specials,
            f"tasks {first.task!r} and {source.manifest.task!r} were materialised with different vocabularies",
            where="DataPipeline.sources",
            fix="Materialise both with one vocabulary, or train on one of them.",
        )
    text_only = [source.manifest.task for source in opened if not source.manifest.has_inputs]
    require(
        not text_only or pretraining is not None,
        f"task {text_only[0] if text_only else ''!r} has targets only",
        where="DataPipeline.pretraining",
        fix="Say how text becomes inputs and targets: PrefixSplit, SpanCorruption, CausalLM, DenoiserMixture.",
    )
    if pretraining is None:
        return
    require(
        bool(text_only),
        f"{type(pretraining).__name__} is given, but every source has inputs and targets of its own",
        where="DataPipeline.pretraining",
        fix="Leave it out.",
    )
    require(
        not (pack and converter.encoder_length is not None and not pretraining.fixed_split),
        f"packing needs fixed lengths, but {type(pretraining).__name__} on an encoder-decoder changes them every epoch",
        where="DataPipeline.pack",
        fix="Set pack to False.",
    )
    require(
        not pretraining.needs_sentinels or bool(opened[0].vocabulary.sentinel_ids),
        f"the vocabulary has no sentinels <extra_id_0>, ... for {type(pretraining).__name__}",
        where="DataPipeline.pretraining",
        fix="Build the vocabulary with extra ids, or use PrefixSplit.",
    )
    require(
        converter.max_piece(pretraining) > 0,
        "the row is too short for any text",
        where=f"{type(converter).__name__}.target_length",
        fix="Raise it.",
    )
