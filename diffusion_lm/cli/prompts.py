"""Reads the prompts of `decode --input`: lines of text or JSON, optionally with the text after the gap (infilling)."""

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
      suffix: the text after the gap.
      slots: number of tokens in the gap; None = the target length of the run.
    """

    inputs: str
    suffix: str = ""
    slots: int | None = None


class CutPrompts:
    """Counts truncated prompts and reports them on stderr, the first ten individually.

    Args:
      converter: lays out the prompts.
      suffixes: whether suffixes may be truncated; the rows of `--input` are always long enough for its suffixes.
    """

    _SHOWN = 10

    def __init__(self, converter: Converter, *, suffixes: bool):
        self._converter, self._suffixes = converter, suffixes
        self._total = self._cut = 0

    def add(self, record: Record) -> dict[str, int]:
        """Returns the number of tokens cut off a prompt, by part; empty if it fits."""
        self._total += 1
        cut = cut_tokens(self._converter, len(record.inputs), len(record.suffix) if self._suffixes else 0)
        self._cut += bool(cut)
        if cut and self._cut <= self._SHOWN:
            for part, count in cut.items():
                total, side = len(getattr(record, part)), "left" if part == "inputs" else "right"
                progress(
                    f"prompt {self._total}: {count} of {total} tokens of its {part} cut at the {side} "
                    f"({type(self._converter).__name__}.{part}_length = {total - count})"
                )
        return cut

    def conclude(self) -> None:
        """Reports how many prompts were truncated."""
        if self._cut:
            progress(f"{self._cut} of {self._total} prompts were cut; their output has the field cut_tokens")


def given_prompts(
    path: str, limit: int | None, batch_size: int, data: DataPipeline
) -> Iterator[tuple[Batch, list[Record]]]:
    """Yields batches of prompts and their records; the last batch is padded with copies of its last prompt.

    Raises:
      ConfigError: the file has no prompts, a line cannot be parsed, or the network cannot condition on a suffix.
    """
    prompts = read_prompts(path)[:limit]
    encode = data.vocabulary.encode
    if data.pruned is not None:
        full = data.pruned.full.encode
        tokens = [token for one in prompts for token in (*full(one.inputs), *full(one.suffix))]
        cut = int(data.pruned.outside(tokens).sum())
        progress(f"{cut} of {len(tokens)} prompt tokens become UNK: the vocabulary map of the run does not keep them")
    for number, one in enumerate(prompts, 1):
        lost = unwritten(data.full_vocabulary, one.inputs) + unwritten(data.full_vocabulary, one.suffix)
        if lost:
            progress(f"warning: prompt {number}: the vocabulary cannot encode {characters(lost)}")
    require(bool(prompts), f"no prompts in {path}", where="--input", fix="Write one prompt per line.")
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
        # Pad the last batch to the compiled batch size; the caller drops the extra rows.
        filled = [*chosen, *[chosen[-1]] * (batch_size - len(chosen))]
        examples = [
            # An oracle target window is as long as the target. There is no reference here, so zeros stand in for it
            # with the length that the line gives.
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
    """Returns the converter of the run with space for the suffixes and for the requested numbers of slots."""
    changes: dict[str, Any] = {}
    if suffix_length:
        require(
            converter.encoder_length is None,
            "an encoder-decoder network cannot condition on text after the target",
            where="--input",
            fix='Remove "suffix", or use a network without an encoder.',
        )
        changes["suffix_length"] = max(suffix_length, converter.suffix_length)
    slots = [one.slots for one in prompts if one.slots is not None]
    require(
        len(slots) in (0, len(prompts)),
        f'{len(slots)} of {len(prompts)} prompts have the field "slots"',
        where="--input",
        fix='Write "slots" in all lines or in none.',
    )
    if slots:
        changes |= {"target_length": max(slots), "target_window": OracleLength(closing=False)}
    return dataclasses.replace(converter, **changes) if changes else converter  # type: ignore[type-var]


def read_prompts(path: str) -> list[Prompt]:
    """Returns the prompts of a file or of stdin ("-"), one per line, as text or JSON; blank lines are skipped."""
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
            f"line {number} is not a JSON object with a field 'inputs'", where="--input", fix='Write {"inputs": "..."}.'
        ) from error
    require(
        isinstance(suffix, str) and (slots is None or (isinstance(slots, int) and slots >= 1)),
        f"line {number}: suffix={suffix!r}, slots={slots!r}: suffix must be a string and slots an integer >= 1",
        where="--input",
        fix='Write {"inputs": "...", "suffix": "...", "slots": 8}.',
    )
    return Prompt(str(inputs), suffix, slots)
