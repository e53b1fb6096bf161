"""What a converter gets, what is asked of one, and how an example is made to fit its row."""

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from diffusion_lm.core.errors import ConfigError, require
from diffusion_lm.core.special import SpecialTokens
from diffusion_lm.core.types import Batch
from diffusion_lm.data.pretraining import Pretraining
from diffusion_lm.data.target_window import TargetWindow

TOO_LONG = ("truncate_inputs", "truncate", "error")


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """What a converter lays out: a record, after the pretraining transform where there is one.

    Attributes:
      inputs: i32[...].
      targets: i32[...].
      example_id: u32.
      window: the pretraining transform's rule for what stands behind the targets; None = the converter's rule.
      suffix: i32[...], conditioning behind the target.
    """

    inputs: np.ndarray
    targets: np.ndarray
    example_id: int
    window: TargetWindow | None = None
    suffix: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int32))


class Converter(Protocol):
    """What the pipeline, the trainer and `explain` ask of a converter; `data/converters.py` has all there are."""

    @property
    def inputs_length(self) -> int:
        """Most conditioning tokens of an example."""
        ...

    @property
    def target_length(self) -> int:
        """Most slots of a target window."""
        ...

    @property
    def suffix_length(self) -> int:
        """Most conditioning tokens behind a target window."""
        ...

    @property
    def target_window(self) -> TargetWindow:
        """What stands behind a target."""
        ...

    @property
    def too_long(self) -> str:
        """What happens to an example that does not fit: one of `TOO_LONG`."""
        ...

    @property
    def row_length(self) -> int:
        """T, slots of the main stream."""
        ...

    @property
    def encoder_length(self) -> int | None:
        """S, slots of the encoder's stream, or None where there is no encoder."""
        ...

    @property
    def capacity(self) -> np.ndarray:
        """i64[streams], slots of a row in each stream."""
        ...

    def costs(self, lengths: np.ndarray, pretraining: Pretraining | None) -> np.ndarray:
        """Returns i64[n, streams], the slots taken by examples of i32[n, 3] tokens of inputs, targets and suffix."""
        ...

    def max_piece(self, pretraining: Pretraining) -> int:
        """Returns the longest piece of text that fits a row however `pretraining` splits it."""
        ...

    def batch(self, rows: Sequence[Sequence[Example]], specials: SpecialTokens, *, training: bool) -> Batch:
        """Returns the batch of `rows`, each the examples that share a row."""
        ...

    def prompts(self, examples: Sequence[Example], specials: SpecialTokens) -> Batch:
        """Returns prompts: the conditioning, then PAD in every slot that a sampler is to fill."""
        ...

    def abstract_batch(self, batch_size: int, specials: SpecialTokens) -> Batch:
        """Returns the shapes and dtypes of a batch, without any data."""
        ...


def check_fields(converter: Converter) -> None:
    """Raises `ConfigError` for lengths that make no row."""
    name = type(converter).__name__
    for field, least in (("inputs_length", 0), ("target_length", 1), ("suffix_length", 0)):
        value = getattr(converter, field)
        require(value >= least, f"{field} = {value} is too small", where=f"{name}.{field}", fix=f"Use >= {least}.")
    require(
        converter.too_long in TOO_LONG,
        f"too_long = {converter.too_long!r} is no policy",
        where=f"{name}.too_long",
        fix=f"Use one of {', '.join(TOO_LONG)}.",
    )
    slots = getattr(converter, "max_slots", None)
    require(slots is None or slots > 1, f"max_slots = {slots}", where=f"{name}.max_slots", fix="Use >= 2, or None.")
    window = getattr(converter.target_window, "window", None)
    require(
        window is None or window <= converter.target_length,
        f"the target window of {window} slots is longer than target_length = {converter.target_length}",
        where=f"{name}.target_window",
        fix="Make the window shorter or target_length larger.",
    )


def longest(pieces: np.ndarray, fits: np.ndarray) -> int:
    """Returns the longest piece that fits. Lengths grow with the piece, so everything shorter fits too."""
    return int(pieces[fits].max(initial=0))


def prompt_slots(converter: Converter, example: Example) -> int:
    """Returns how many slots of an example a sampler is to fill."""
    return converter.target_window.prompt_slots(converter.target_length, len(example.targets))


def left_cut(converter: Converter, example: Example) -> np.ndarray:
    """Returns the conditioning, cut on its left where it is too long and may be cut."""
    if len(example.inputs) <= converter.inputs_length:
        return example.inputs
    if converter.too_long == "error":
        raise too_long_error(
            converter, "conditioning", len(example.inputs), converter.inputs_length, example.example_id
        )
    return example.inputs[len(example.inputs) - converter.inputs_length :]


def cut_tokens(converter: Converter, inputs: int, suffix: int = 0) -> dict[str, int]:
    """Returns how many of a prompt's tokens do not fit, by part ("inputs", "suffix"); parts that fit are left out."""
    over = {"inputs": inputs - converter.inputs_length, "suffix": suffix - converter.suffix_length}
    return {part: count for part, count in over.items() if count > 0}


def suffix_of(converter: Converter, example: Example) -> np.ndarray:
    """Returns the conditioning behind the target, cut at its end where it is too long and may be cut."""
    length, room = len(example.suffix), converter.suffix_length
    if length > room and (converter.too_long == "error" or room == 0):
        raise too_long_error(converter, "suffix", length, room, example.example_id)
    return example.suffix[:room]


def check_slots(converter: Converter, slots: int, example_id: int) -> None:
    """Raises `ConfigError` where an example needs more slots than its row has."""
    if slots > converter.row_length:
        raise too_long_error(converter, "example", slots, converter.row_length, example_id)


def parts_of(
    converter: Converter, example: Example, specials: SpecialTokens, *, training: bool, shared_row: bool
) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """Returns the conditioning that is kept, and the window's tokens and weights."""
    if example.window is not None:  # a piece of text that was already cut to what the row holds
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
    """Returns the error about an example that does not fit and may not be cut."""
    which = "" if example_id is None else f" of example {example_id}"
    fields = {"conditioning": "inputs_length", "suffix": "suffix_length", "example": "max_slots"}
    field = fields.get(part, "target_length")
    return ConfigError(
        f"the {part}{which} has {length} tokens, the row has room for {room}",
        where=f"{type(converter).__name__}.{field}",
        fix=f"Raise {field}" + (", or set too_long to 'truncate'." if room and part != "example" else "."),
    )
