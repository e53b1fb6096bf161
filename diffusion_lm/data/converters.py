"""From examples to the one `Batch` layout of all architectures, in numpy.

Single stream:    [BOS, inputs..., (SEP), target window...], alone in a row or packed, right-padded with segment 0.
Encoder-decoder:  encoder [inputs..., EOS]; decoder [BOS, target window...].
"""

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from diffusion_lm.core.errors import ConfigError, require
from diffusion_lm.core.special import SpecialTokens
from diffusion_lm.core.types import Batch
from diffusion_lm.data.pretraining import Pretraining
from diffusion_lm.data.rows import (
    abstract_batch,
    checked,
    empty_batch,
    empty_encoder,
    write_example,
    write_inputs,
    write_prompt,
)
from diffusion_lm.data.target_window import ExactEos, TargetWindow

TOO_LONG = ("truncate_inputs", "truncate", "error")


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """What a converter lays out: a record, after the pretraining transform where there is one.

    Attributes:
      inputs: i32[...].
      targets: i32[...].
      example_id: u32.
      window: the pretraining transform's rule for what stands behind the targets; None = the converter's rule.
    """

    inputs: np.ndarray
    targets: np.ndarray
    example_id: int
    window: TargetWindow | None = None


class Converter(Protocol):
    """What the pipeline, the trainer and `explain` ask of a converter; the two below are all there are."""

    @property
    def inputs_length(self) -> int:
        """Most conditioning tokens of an example."""
        ...

    @property
    def target_length(self) -> int:
        """Most slots of a target window."""
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
        """Returns i64[n, streams], the slots taken by examples of i32[n, 2] tokens of inputs and targets."""
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

    def abstract_batch(self, batch_size: int) -> Batch:
        """Returns the shapes and dtypes of a batch, without any data."""
        ...


@dataclasses.dataclass(frozen=True)
class SingleStreamConverter:
    """Rows of decoder-only, prefix-LM and encoder-only models, of `1 + inputs_length + target_length` slots.

    Attributes:
      inputs_length: most conditioning tokens of an example, BOS not counted.
      target_length: most slots of a target window. Pieces of pretraining text may use the row's slots as they like.
      target_window: what stands behind a target.
      too_long: what happens to an example that does not fit. "truncate_inputs" cuts conditioning on its left (BOS
        stays) and, in training only, targets at their end; "truncate" cuts targets in evaluation too; "error" cuts
        nothing. `DataPipeline.fit` counts what is cut.
      separator_id: a token that closes the conditioning of examples with inputs of their own, as DiffuSeq and
        DiffuLLaMA's fine-tuning have it; None = the target follows the inputs at once. Never noised, never scored.
    """

    inputs_length: int
    target_length: int
    target_window: TargetWindow = dataclasses.field(default_factory=ExactEos)
    too_long: str = "truncate_inputs"
    separator_id: int | None = None

    def __post_init__(self):
        _check_fields(self)

    @property
    def row_length(self) -> int:
        """T = 1 + inputs_length + target_length, and 1 with a separator."""
        return 1 + self.inputs_length + len(self._separator) + self.target_length

    @property
    def _separator(self) -> list[int]:
        return [] if self.separator_id is None else [self.separator_id]

    @property
    def encoder_length(self) -> int | None:
        """None: there is no encoder."""
        return None

    @property
    def capacity(self) -> np.ndarray:
        """i64[1], the row length."""
        return np.array([self.row_length], np.int64)

    def costs(self, lengths: np.ndarray, pretraining: Pretraining | None) -> np.ndarray:
        """Returns i64[n, 1], slots with BOS and the window, for examples of i32[n, 2] tokens of inputs and targets."""
        lengths = lengths.astype(np.int64)
        if pretraining is None:
            inputs = np.minimum(lengths[:, 0], self.inputs_length) + len(self._separator)
            return (1 + inputs + self.target_window.slots(lengths[:, 1], self.target_length))[:, None]
        inputs, targets = pretraining.lengths(np.minimum(lengths[:, 1], self.max_piece(pretraining)))
        return (1 + inputs + pretraining.target_window.slots(targets, self.row_length))[:, None]

    def max_piece(self, pretraining: Pretraining) -> int:
        """Returns the longest piece whose inputs and targets fit the row together."""
        pieces = np.arange(1, self.row_length)
        inputs, targets = pretraining.lengths(pieces)
        slots = pretraining.target_window.slots(targets, 2 * self.row_length)
        return _longest(pieces, 1 + inputs + slots <= self.row_length)

    def batch(self, rows: Sequence[Sequence[Example]], specials: SpecialTokens, *, training: bool) -> Batch:
        """Returns the batch of `rows`; raises `ConfigError` as `too_long` says, and for MASK in the data (T35)."""
        batch = empty_batch(len(rows), self.row_length, specials)
        for b, row in enumerate(rows):
            start = 0
            for segment, example in enumerate(row, 1):
                inputs, (tokens, weights) = _parts(self, example, specials, training=training, shared_row=True)
                inputs = inputs if example.window is not None else self._closed(inputs)
                start = write_example(
                    batch, b, start, segment, example.example_id, specials.bos_id, inputs, tokens, weights
                )
        return checked(batch, specials)

    def prompts(self, examples: Sequence[Example], specials: SpecialTokens) -> Batch:
        """Returns [BOS, inputs, (SEP), PAD ...] rows; the window starts right behind the conditioning of its row."""
        batch = empty_batch(len(examples), self.row_length, specials)
        for b, example in enumerate(examples):
            inputs = self._closed(_left_cut(self, example))
            write_prompt(batch, b, example.example_id, specials, inputs, _prompt_slots(self, example))
        return checked(batch, specials)

    def abstract_batch(self, batch_size: int) -> Batch:
        """Returns a `Batch` of `jax.ShapeDtypeStruct`."""
        return abstract_batch(batch_size, self.row_length, None)

    def _closed(self, inputs: np.ndarray) -> np.ndarray:
        """Returns the conditioning with the separator behind it."""
        return np.concatenate([inputs, np.array(self._separator, np.int32)])


@dataclasses.dataclass(frozen=True)
class EncoderDecoderConverter:
    """Rows of encoder-decoders: `inputs_length + 1` encoder slots and `1 + target_length` decoder slots.

    Attributes:
      inputs_length: most conditioning tokens of an example, EOS not counted.
      target_length: most slots of a target window, BOS not counted.
      target_window: what stands behind a target.
      too_long: as for `SingleStreamConverter`.
    """

    inputs_length: int
    target_length: int
    target_window: TargetWindow = dataclasses.field(default_factory=ExactEos)
    too_long: str = "truncate_inputs"

    def __post_init__(self):
        _check_fields(self)

    @property
    def row_length(self) -> int:
        """T = 1 + target_length."""
        return 1 + self.target_length

    @property
    def encoder_length(self) -> int | None:
        """S = inputs_length + 1."""
        return self.inputs_length + 1

    @property
    def capacity(self) -> np.ndarray:
        """i64[2], decoder and encoder slots."""
        return np.array([self.row_length, self.inputs_length + 1], np.int64)

    def costs(self, lengths: np.ndarray, pretraining: Pretraining | None) -> np.ndarray:
        """Returns i64[n, 2], decoder and encoder slots, for examples of i32[n, 2] tokens of inputs and targets."""
        lengths = lengths.astype(np.int64)
        inputs, targets, window = lengths[:, 0], lengths[:, 1], self.target_window
        if pretraining is not None:
            inputs, targets = pretraining.lengths(np.minimum(targets, self.max_piece(pretraining)))
            window = pretraining.target_window
        encoder = np.minimum(inputs, self.inputs_length) + 1
        return np.stack([1 + window.slots(targets, self.target_length), encoder], axis=1)

    def max_piece(self, pretraining: Pretraining) -> int:
        """Returns the longest piece whose inputs fit the encoder and whose targets fit the decoder."""
        if not pretraining.fixed_split:  # either side may get all tokens but one
            return min(self.inputs_length, self.target_length) + 1
        pieces = np.arange(1, self.inputs_length + self.target_length + 1)
        inputs, targets = pretraining.lengths(pieces)
        slots = pretraining.target_window.slots(targets, 2 * len(pieces) + 1)
        return _longest(pieces, (inputs <= self.inputs_length) & (slots <= self.target_length))

    def batch(self, rows: Sequence[Sequence[Example]], specials: SpecialTokens, *, training: bool) -> Batch:
        """Returns the batch of `rows`; raises `ConfigError` as `too_long` says, and for MASK in the data (T35)."""
        batch = empty_batch(len(rows), self.row_length, specials)
        encoder = empty_encoder(len(rows), self.inputs_length + 1, specials)
        nothing = np.zeros(0, np.int32)
        for b, row in enumerate(rows):
            start = encoder_start = 0
            for segment, example in enumerate(row, 1):
                inputs, (tokens, weights) = _parts(self, example, specials, training=training, shared_row=False)
                encoder_start = write_inputs(encoder, b, encoder_start, segment, inputs, specials)
                start = write_example(
                    batch, b, start, segment, example.example_id, specials.bos_id, nothing, tokens, weights
                )
        return checked(dataclasses.replace(batch, encoder=encoder), specials)

    def prompts(self, examples: Sequence[Example], specials: SpecialTokens) -> Batch:
        """Returns decoder rows [BOS, PAD ...] beside the encoder's rows [inputs, EOS]."""
        batch = empty_batch(len(examples), self.row_length, specials)
        encoder = empty_encoder(len(examples), self.inputs_length + 1, specials)
        for b, example in enumerate(examples):
            write_inputs(encoder, b, 0, 1, _left_cut(self, example), specials)
            write_prompt(batch, b, example.example_id, specials, np.zeros(0, np.int32), _prompt_slots(self, example))
        return checked(dataclasses.replace(batch, encoder=encoder), specials)

    def abstract_batch(self, batch_size: int) -> Batch:
        """Returns a `Batch` of `jax.ShapeDtypeStruct`."""
        return abstract_batch(batch_size, self.row_length, self.inputs_length + 1)


def with_encoder(converter: Converter, encoder: bool) -> Converter:
    """Returns the converter of the layout with or without an encoder: same lengths, same window, same policy."""
    if (converter.encoder_length is not None) == encoder:
        return converter
    layout = EncoderDecoderConverter if encoder else SingleStreamConverter
    return layout(converter.inputs_length, converter.target_length, converter.target_window, converter.too_long)


def _check_fields(converter: Converter) -> None:
    name = type(converter).__name__
    for field, least in (("inputs_length", 0), ("target_length", 1)):
        value = getattr(converter, field)
        require(value >= least, f"{field} = {value} is too small", where=f"{name}.{field}", fix=f"Use >= {least}.")
    require(
        converter.too_long in TOO_LONG,
        f"too_long = {converter.too_long!r} is no policy",
        where=f"{name}.too_long",
        fix=f"Use one of {', '.join(TOO_LONG)}.",
    )
    window = getattr(converter.target_window, "window", None)
    require(
        window is None or window <= converter.target_length,
        f"the target window of {window} slots is longer than target_length = {converter.target_length}",
        where=f"{name}.target_window",
        fix="Make the window shorter or target_length larger.",
    )


def _longest(pieces: np.ndarray, fits: np.ndarray) -> int:
    """Returns the longest piece that fits. Lengths grow with the piece, so everything shorter fits too."""
    return int(pieces[fits].max(initial=0))


def _prompt_slots(converter: Converter, example: Example) -> int:
    return converter.target_window.prompt_slots(converter.target_length, len(example.targets))


def _left_cut(converter: Converter, example: Example) -> np.ndarray:
    """Returns the conditioning, cut on its left where it is too long and may be cut."""
    if len(example.inputs) <= converter.inputs_length:
        return example.inputs
    if converter.too_long == "error":
        raise too_long_error(
            converter, "conditioning", len(example.inputs), converter.inputs_length, example.example_id
        )
    return example.inputs[len(example.inputs) - converter.inputs_length :]


def _parts(
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
    return _left_cut(converter, example), converter.target_window.fill(
        example.targets, specials, converter.target_length
    )


def too_long_error(
    converter: Converter, part: str, length: int, room: int, example_id: int | None = None
) -> ConfigError:
    """Returns the error about an example that does not fit and may not be cut."""
    which = "" if example_id is None else f" of example {example_id}"
    field = "inputs_length" if part == "conditioning" else "target_length"
    return ConfigError(
        f"the {part}{which} has {length} tokens, the row has room for {room}",
        where=f"{type(converter).__name__}.{field}",
        fix=f"Raise {field}, or set too_long to 'truncate'.",
    )
