"""Prompts that are given to `decode` as lines of text or JSON, with or without text behind the gap."""

import dataclasses
import json
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

from diffusion_lm.cli.output import progress
from diffusion_lm.core.errors import ConfigError, require
from diffusion_lm.core.rng import example_number
from diffusion_lm.core.types import Batch
from diffusion_lm.data.fitting import Converter, Example, cut_tokens
from diffusion_lm.data.iterator import DataPipeline
from diffusion_lm.data.round_trip import characters, unwritten
from diffusion_lm.data.schema import Record
from diffusion_lm.data.target_window import OracleLength


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One line of `--input`.

    Attributes:
      inputs: the text before the gap.
      suffix: the text behind it.
      slots: tokens of the gap; None = the window that the run decodes.
    """

    inputs: str
    suffix: str = ""
    slots: int | None = None


class CutPrompts:
    """Counts the prompts that the window cuts and says so on stderr, for the first ones each by itself.

    Args:
      converter: lays the prompts out.
      suffixes: whether a suffix may be cut; the rows of `--input` are as long as its suffixes need.
    """

    _SHOWN = 10

    def __init__(self, converter: Converter, *, suffixes: bool):
        self._converter, self._suffixes = converter, suffixes
        self._seen = self._cut = 0

    def add(self, record: Record) -> dict[str, int]:
        """Returns the tokens that are cut off a prompt, by part; empty where it fits."""
        self._seen += 1
        cut = cut_tokens(self._converter, len(record.inputs), len(record.suffix) if self._suffixes else 0)
        self._cut += bool(cut)
        if cut and self._cut <= self._SHOWN:
            for part, count in cut.items():
                total, side = len(getattr(record, part)), "left" if part == "inputs" else "right"
                progress(
                    f"prompt {self._seen}: {count} of {total} tokens of its {part} cut at the {side} "
                    f"({type(self._converter).__name__}.{part}_length = {total - count})"
                )
        return cut

    def conclude(self) -> None:
        """Says how many were cut."""
        if self._cut:
            progress(f"{self._cut} of {self._seen} prompts were cut; their lines have the field cut_tokens")


def given_prompts(
    path: str, limit: int | None, batch_size: int, data: DataPipeline
) -> Iterator[tuple[Batch, list[Record]]]:
    """Yields batches of the prompts of a file; the last one is filled with copies of its last prompt.

    Raises:
      ConfigError: there is no prompt, a line is not understood, or the run's rows have no place for a suffix.
    """
    prompts = read_prompts(path)[:limit]
    encode = data.vocabulary.encode
    if data.pruned is not None:
        full = data.pruned.full.encode
        tokens = [token for one in prompts for token in (*full(one.inputs), *full(one.suffix))]
        cut = int(data.pruned.outside(tokens).sum())
        progress(f"{cut} of {len(tokens)} tokens of the prompts are UNK: the run's vocabulary map leaves them out")
    for number, one in enumerate(prompts, 1):
        lost = unwritten(data.full_vocabulary, one.inputs) + unwritten(data.full_vocabulary, one.suffix)
        if lost:
            progress(f"warning: prompt {number}: the vocabulary cannot write {characters(lost)}")
    require(bool(prompts), f"there is no prompt in {path}", where="--input", fix="Write one a line.")
    nothing = np.zeros(0, np.int32)
    records = [
        Record(
            np.asarray(encode(one.inputs)),
            nothing,
            example_number(f"input/{number}"),
            inputs_text=one.inputs,
            suffix=np.asarray(encode(one.suffix)),
        )
        for number, one in enumerate(prompts)
    ]
    converter = _with_room(data.converter, prompts, max(len(record.suffix) for record in records))
    for start in range(0, len(records), batch_size):
        chosen = range(start, min(start + batch_size, len(records)))
        filled = [*chosen, *[chosen[-1]] * (batch_size - len(chosen))]
        examples = [
            # An oracle's window is as long as the target: here it is what the line says, and no reference.
            Example(
                records[row].inputs,
                np.zeros(prompts[row].slots or 0, np.int32),
                records[row].example_id,
                suffix=records[row].suffix,
            )
            for row in filled
        ]
        yield converter.prompts(examples, data.specials), [records[row] for row in chosen]


def _with_room(converter: Converter, prompts: list[Prompt], suffix_length: int) -> Converter:
    """Returns the run's converter with room for the suffixes and for the slots that are asked for."""
    changes: dict[str, Any] = {}
    if suffix_length:
        require(
            converter.encoder_length is None,
            "an encoder-decoder has no room for text behind the target",
            where="--input",
            fix='Leave out "suffix", or use a network without an encoder.',
        )
        changes["suffix_length"] = max(suffix_length, converter.suffix_length)
    slots = [one.slots for one in prompts if one.slots is not None]
    require(
        len(slots) in (0, len(prompts)),
        f"{len(slots)} of {len(prompts)} prompts say how many slots they have",
        where="--input",
        fix='Write "slots" in every line, or in none.',
    )
    if slots:
        changes |= {"target_length": max(slots), "target_window": OracleLength(closing=False)}
    return dataclasses.replace(converter, **changes) if changes else converter  # type: ignore[type-var]


def read_prompts(path: str) -> list[Prompt]:
    """Returns the prompts of a file, or of stdin ("-"): one a line, as text or as JSON; blank lines are skipped."""
    try:
        if path == "-":
            lines = sys.stdin.read().splitlines()
        else:
            with open(path, encoding="utf-8") as stream:
                lines = stream.read().splitlines()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}", where="--input", fix="Name a text file.") from error
    return [_prompt(line, number) for number, line in enumerate(lines, 1) if line.strip()]


def _prompt(line: str, number: int) -> Prompt:
    if not line.lstrip().startswith("{"):
        return Prompt(line)
    try:
        fields = json.loads(line)
        inputs, suffix, slots = fields["inputs"], fields.get("suffix", ""), fields.get("slots")
    except (ValueError, KeyError) as error:
        raise ConfigError(
            f"line {number} begins like JSON but has no field 'inputs'", where="--input", fix='Write {"inputs": "..."}.'
        ) from error
    require(
        isinstance(suffix, str) and (slots is None or (isinstance(slots, int) and slots >= 1)),
        f"line {number} has suffix = {suffix!r} and slots = {slots!r}",
        where="--input",
        fix='Write {"inputs": "...", "suffix": "...", "slots": 8}.',
    )
    return Prompt(str(inputs), suffix, slots)
