"""The interface of converters, and the truncation of examples to the length of a row."""

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from diffusion_lm.core.checks import check_choice, check_count
from diffusion_lm.core.errors import ConfigError, require
from diffusion_lm.core.special import SpecialTokens
from diffusion_lm.core.types import Batch
from diffusion_lm.data.pretraining import Pretraining
from diffusion_lm.data.target_window import TargetWindow

TOO_LONG = ("truncate_inputs", "truncate", "error")


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """Input of a converter: a record, after the pretraining transform if there is one.

    Attributes:
      inputs: i32[inputs_length].
      targets: i32[targets_length].
      example_id: u32.
      window: target window of the pretraining transform; None = the converter's.
      suffix: i32[suffix_length], conditioning after the target.
    """

    inputs: np.ndarray
    targets: np.ndarray
    example_id: int
    window: TargetWindow | None = None
    suffix: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int32))


class Converter(Protocol):
    """Interface of converters; `data/converters.py` has the implementations."""

    @property
    def inputs_length(self) -> int:
        """Maximum number of conditioning tokens of an example."""
        ...

    @property
    def target_length(self) -> int:
        """Maximum number of slots of a target window."""
        ...

    @property
    def suffix_length(self) -> int:
        """Maximum number of conditioning tokens after a target window."""
        ...

    @property
    def target_window(self) -> TargetWindow:
        """Rule for the tokens after a target."""
        ...

    @property
    def too_long(self) -> str:
        """What to do with an example that does not fit: one of `TOO_LONG`."""
        ...

    @property
    def row_length(self) -> int:
        """T, length of the main stream."""
        ...

    @property
    def encoder_length(self) -> int | None:
        """S, length of the encoder stream; None without an encoder."""
        ...

    @property
    def capacity(self) -> np.ndarray:
        """i64[streams], slots of a row in each stream."""
        ...

    def costs(self, lengths: np.ndarray, pretraining: Pretraining | None) -> np.ndarray:
        """Returns i64[n, streams], slots per example, for lengths i32[n, 3] of inputs, targets and suffix."""
        ...

    def max_piece(self, pretraining: Pretraining) -> int:
        """Returns the length of the longest chunk of text that fits a row for every split by `pretraining`."""
        ...

    def batch(self, rows: Sequence[Sequence[Example]], specials: SpecialTokens, *, training: bool) -> Batch:
        """Returns the batch; `rows[b]` are the examples packed into row b."""
        ...

    def prompts(self, examples: Sequence[Example], specials: SpecialTokens) -> Batch:
        """Returns prompts: the conditioning, then PAD in every slot to be generated."""
        ...

    def abstract_batch(self, batch_size: int, specials: SpecialTokens) -> Batch:
        """Returns the shapes and dtypes of a batch without reading data."""
        ...


def check_fields(converter: Converter) -> None:
    """Raises `ConfigError` for invalid lengths or an invalid `too_long`."""
    name = type(converter).__name__
    for field, least in (("inputs_length", 0), ("target_length", 1), ("suffix_length", 0)):
        check_count(getattr(converter, field), f"{name}.{field}", minimum=least)
    check_choice(converter.too_long, TOO_LONG, f"{name}.too_long")
    slots = getattr(converter, "max_slots", None)
    if slots is not None:
        check_count(slots, f"{name}.max_slots", "Use 2 or more, or None.", minimum=2)
    window = getattr(converter.target_window, "window", None)
    require(
        window is None or window <= converter.target_length,
        f"window={window}: must be <= target_length={converter.target_length}",
        where=f"{name}.target_window",
        fix="Decrease the window or increase target_length.",
    )


def longest(pieces: np.ndarray, fits: np.ndarray) -> int:
    """Returns the largest of the chunk lengths `pieces` with `fits`; 0 if there is none.

    Slots grow with the chunk length, so every shorter chunk fits as well.
    """
    return int(pieces[fits].max(initial=0))


def prompt_slots(converter: Converter, example: Example) -> int:
    """Returns the number of slots that a sampler fills for an example."""
    return converter.target_window.prompt_slots(converter.target_length, len(example.targets))


def left_cut(converter: Converter, example: Example) -> np.ndarray:
    """Returns the inputs, truncated on the left to `inputs_length`; raises if `too_long` is "error"."""
    if len(example.inputs) <= converter.inputs_length:
        return example.inputs
    if converter.too_long == "error":
        raise too_long_error(
            converter, "conditioning", len(example.inputs), converter.inputs_length, example.example_id
        )
    return example.inputs[len(example.inputs) - converter.inputs_length :]


def cut_tokens(converter: Converter, inputs: int, suffix: int = 0) -> dict[str, int]:
    """Returns the number of tokens of a prompt that do not fit, for each of "inputs" and "suffix" that is too long."""
    over = {"inputs": inputs - converter.inputs_length, "suffix": suffix - converter.suffix_length}
    return {part: count for part, count in over.items() if count > 0}


def suffix_of(converter: Converter, example: Example) -> np.ndarray:
    """Returns the suffix, truncated on the right to `suffix_length`; raises if it must not be truncated."""
    length, room = len(example.suffix), converter.suffix_length
    if length > room and (converter.too_long == "error" or room == 0):
        raise too_long_error(converter, "suffix", length, room, example.example_id)
    return example.suffix[:room]


def check_slots(converter: Converter, slots: int, example_id: int) -> None:
    """Raises `ConfigError` if an example needs more slots than its row has."""
    if slots > converter.row_length:
        raise too_long_error(converter, "example", slots, converter.row_length, example_id)


def parts_of(
    converter: Converter, example: Example, specials: SpecialTokens, *, training: bool, shared_row: bool
) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """Returns the inputs i32[n] and the target window: tokens i32[w] and loss weights f32[w].

    Args:
      converter: provides lengths and policy.
      example: the example to lay out.
      specials: the special tokens of the vocabulary.
      training: whether "truncate_inputs" also truncates targets.
      shared_row: whether inputs and targets share a row.
    """
    if example.window is not None:  # a chunk of pretraining text, which already has the right length
        room = converter.row_length - 1 - (len(example.inputs) if shared_row else 0)
        return example.inputs, example.window.fill(example.targets, specials, room)
    room = converter.target_window.room(converter.target_length)
    may_cut = converter.too_long == "truncate" or (converter.too_long == "truncate_inputs" and training)
    if len(example.targets) > room and not may_cut:
        raise too_long_error(converter, "target", len(example.targets), room, example.example_id)
    return left_cut(converter, example), converter.target_window.fill(
        example.targets, specials, converter.target_length
    )


def too_long_error(
    converter: Converter, part: str, length: int, room: int, example_id: int | None = None
) -> ConfigError:
    """Returns the error for an example that does not fit and must not be truncated."""
    which = "" if example_id is None else f" of example {example_id}"
    subject = f"the {part}{which}"
    if part == "example":
        subject = "an example" if example_id is None else f"example {example_id}"
    fields = {"conditioning": "inputs_length", "suffix": "suffix_length", "example": "max_slots"}
    field = fields.get(part, "target_length")
    return ConfigError(
        f"{subject} has {length} tokens, but the row has room for {room}",
        where=f"{type(converter).__name__}.{field}",
        fix=f"Increase {field}" + (", or set too_long to 'truncate'." if room and part != "example" else "."),
    )
