"""Checks of a pipeline before the first step: whether its sources fit together, and which examples are truncated."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np

from diffusion_lm.core.errors import require
from diffusion_lm.data.fitting import Converter, too_long_error
from diffusion_lm.data.grain_source import OpenSource
from diffusion_lm.data.pretraining import Pretraining

Use = Literal["training", "scoring", "prompts"]
"""What batches are used for: `DataPipeline.batch`, `eval_batches` or `prompt_batches`."""


@dataclasses.dataclass(frozen=True)
class Cut:
    """Examples of one split that are truncated to fit a row.

    Attributes:
      task: name of the task.
      split: its split.
      part: "prompts" (truncated on the left, where the question may be), or "targets", "texts" (pretraining documents)
        or "suffixes", which are truncated on the right.
      count: number of examples that do not fit.
      of: number of examples that are used.
      kept: length after truncation, in tokens.
      longest: length of the longest example before truncation, in tokens.
      field: the gin parameter to raise.
      closed: whether a slot for EOS follows the kept tokens.
      generated: whether the targets are to be generated, so that a sampler cannot reach their end.
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
        """The side on which tokens are dropped, "left" or "right"."""
        return "left" if self.part == "prompts" else "right"

    def __str__(self) -> str:
        tokens = f"{self.kept:,} tokens{' and EOS' if self.closed else ''}"
        what = (
            f"targets are longer than the {tokens} that can be generated"
            if self.generated
            else f"{self.part} truncated on the {self.side} to {tokens}"
        )
        return f"{self.task}/{self.split}: {self.count:,} of {self.of:,} {what} ({self.field})"

    def plain(self) -> dict[str, object]:
        """Returns the fields, the side and the message as JSON values, for result files."""
        return {**dataclasses.asdict(self), "side": self.side, "text": str(self)}


def cuts(
    converter: Converter, source: OpenSource, part: Pretraining | None, use: Use, indices: np.ndarray | None
) -> tuple[Cut, ...]:
    """Returns which of the examples at `indices` (i64[n]; None = all) a converter truncates, one `Cut` per part.

    Reads only the lengths. Examples that the converter refuses to truncate are not counted: they raise an error.
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
    """Raises `ConfigError` if an example does not fit and must not be truncated."""
    policy = converter.too_long
    for name, lengths, room in _rooms(converter, source, part):
        whole = policy == "error" or (policy == "truncate_inputs" and evaluation and name == "target" and not part)
        # A suffix that is dropped entirely would change the task, so it is an error under every policy.
        whole = whole or (name == "suffix" and room == 0)
        if whole and lengths.max(initial=0) > room:
            raise too_long_error(converter, name, int(lengths.max()), room)
    slots = int(converter.costs(source.lengths, part)[:, 0].max(initial=0))
    if slots > converter.row_length:
        raise too_long_error(converter, "example", slots, converter.row_length)


def _rooms(converter: Converter, source: OpenSource, part: Pretraining | None) -> list[tuple[str, np.ndarray, int]]:
    """Returns (name, lengths i32[n], available slots) of each part that the converter may truncate."""
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
    """Raises `ConfigError` if vocabularies differ, or the pretraining transform is missing, unused or impossible."""
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
        f"task {text_only[0] if text_only else ''!r} has only targets, and no pretraining transform is set",
        where="DataPipeline.pretraining",
        fix="Use PrefixSplit, SpanCorruption, CausalLM or DenoiserMixture.",
    )
    if pretraining is None:
        return
    require(
        bool(text_only),
        f"{type(pretraining).__name__}: unused, because every source has inputs and targets",
        where="DataPipeline.pretraining",
        fix="Set it to None.",
    )
    require(
        not (pack and converter.encoder_length is not None and not pretraining.fixed_split),
        f"pack=True: {type(pretraining).__name__} on an encoder-decoder changes the lengths every epoch",
        where="DataPipeline.pack",
        fix="Set it to False.",
    )
    require(
        not pretraining.needs_sentinels or bool(opened[0].vocabulary.sentinel_ids),
        f"{type(pretraining).__name__} needs sentinels <extra_id_0>, ..., and the vocabulary has none",
        where="DataPipeline.pretraining",
        fix="Use a vocabulary with extra ids, or PrefixSplit.",
    )
    require(
        converter.max_piece(pretraining) > 0,
        f"target_length={converter.target_length}: too short for {type(pretraining).__name__}",
        where=f"{type(converter).__name__}.target_length",
        fix="Increase it.",
    )
