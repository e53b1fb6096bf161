"""Converts examples to the `Batch` layout of all architectures, in NumPy.

Single stream:    [BOS, inputs..., (SEP), target window..., suffix...], one or several (packed) per row, padded on the
                  right with segment 0.
Encoder-decoder:  encoder [inputs..., EOS]; decoder [BOS, target window...].
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from diffusion_lm.core.errors import require
from diffusion_lm.core.special import SpecialTokens
from diffusion_lm.core.types import Batch
from diffusion_lm.data.fitting import (
    Converter,
    Example,
    check_fields,
    check_slots,
    left_cut,
    longest,
    parts_of,
    prompt_slots,
    suffix_of,
)
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


@dataclasses.dataclass(frozen=True)
class SingleStreamConverter:
    """Rows of decoder-only, prefix-LM and encoder-only models.

    A row has `1 + inputs_length + target_length + suffix_length` slots, plus one for a separator.

    Attributes:
      inputs_length: maximum number of conditioning tokens of an example, not counting BOS.
      target_length: maximum number of slots of a target window. Chunks of pretraining text may use the whole row.
      target_window: rule for the tokens after a target.
      too_long: what to do with an example that does not fit. "truncate_inputs" truncates conditioning on the left (BOS
        is kept) and, in training only, targets on the right; "truncate" also truncates targets in evaluation; "error"
        raises. `DataPipeline.cuts` counts truncated examples.
      separator_id: token between inputs and target, as in DiffuSeq and DiffuLLaMA's fine-tuning; None = no separator.
        It is conditioning: never noised, never scored. Pretraining records get none.
      suffix_length: maximum number of conditioning tokens after the target window (infilling); a longer suffix is
        truncated on the right. With 0, an example with a suffix is an error. Under "causal" visibility the target does
        not attend to the suffix.
      max_slots: upper bound on the row length, if it is to be below the sum of the parts. An example that does not fit
        is an error. None = no bound.
    """

    inputs_length: int
    target_length: int
    target_window: TargetWindow = dataclasses.field(default_factory=ExactEos)
    too_long: str = "truncate_inputs"
    separator_id: int | None = None
    suffix_length: int = 0
    max_slots: int | None = None

    def __post_init__(self):
        check_fields(self)

    @property
    def row_length(self) -> int:
        """T = 1 + inputs_length + target_length + suffix_length, plus 1 with a separator; at most `max_slots`."""
        slots = 1 + self.inputs_length + len(self._separator) + self.target_length + self.suffix_length
        return slots if self.max_slots is None else min(slots, self.max_slots)

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
        """Returns i64[n, 1], slots per example including BOS, for lengths i32[n, 3] of inputs, targets and suffix."""
        lengths = lengths.astype(np.int64)
        if pretraining is None:
            inputs = np.minimum(lengths[:, 0], self.inputs_length) + len(self._separator)
            suffix = np.minimum(lengths[:, 2], self.suffix_length)
            return (1 + inputs + self.target_window.slots(lengths[:, 1], self.target_length) + suffix)[:, None]
        inputs, targets = pretraining.lengths(np.minimum(lengths[:, 1], self.max_piece(pretraining)))
        return (1 + inputs + pretraining.target_window.slots(targets, self.row_length))[:, None]

    def max_piece(self, pretraining: Pretraining) -> int:
        """Returns the length of the longest chunk whose inputs and targets together fit the row."""
        pieces = np.arange(1, self.row_length)
        inputs, targets = pretraining.lengths(pieces)
        slots = pretraining.target_window.slots(targets, 2 * self.row_length)
        return longest(pieces, 1 + inputs + slots <= self.row_length)

    def batch(self, rows: Sequence[Sequence[Example]], specials: SpecialTokens, *, training: bool) -> Batch:
        """Returns the batch of `rows`; raises `ConfigError` as `too_long` says, and for MASK in the data (T35)."""
        batch = empty_batch(len(rows), self.row_length, specials)
        for b, row in enumerate(rows):
            start = 0
            for segment, example in enumerate(row, 1):
                inputs, (tokens, weights) = parts_of(self, example, specials, training=training, shared_row=True)
                inputs = inputs if example.window is not None else self._closed(inputs)
                suffix = suffix_of(self, example)
                check_slots(self, start + 1 + len(inputs) + len(tokens) + len(suffix), example.example_id)
                start = write_example(
                    batch, b, start, segment, example.example_id, specials.bos_id, inputs, tokens, weights, suffix
                )
        return checked(batch, specials)

    def prompts(self, examples: Sequence[Example], specials: SpecialTokens) -> Batch:
        """Returns rows [BOS, inputs, (SEP), PAD ..., suffix], with PAD in the target window."""
        batch = empty_batch(len(examples), self.row_length, specials)
        for b, example in enumerate(examples):
            inputs, suffix = self._closed(left_cut(self, example)), suffix_of(self, example)
            slots = prompt_slots(self, example)
            check_slots(self, 1 + len(inputs) + slots + len(suffix), example.example_id)
            write_prompt(batch, b, example.example_id, specials, inputs, slots, suffix)
        return checked(batch, specials)

    def abstract_batch(self, batch_size: int, specials: SpecialTokens) -> Batch:
        """Returns a `Batch` of `jax.ShapeDtypeStruct`."""
        return abstract_batch(batch_size, self.row_length, None, specials)

    def _closed(self, inputs: np.ndarray) -> np.ndarray:
        """Returns the conditioning followed by the separator."""
        return np.concatenate([inputs, np.array(self._separator, np.int32)])


@dataclasses.dataclass(frozen=True)
class EncoderDecoderConverter:
    """Rows of encoder-decoders: `inputs_length + 1` encoder slots and `1 + target_length` decoder slots; no suffix.

    Attributes:
      inputs_length: maximum number of conditioning tokens of an example, not counting EOS.
      target_length: maximum number of slots of a target window, not counting BOS.
      target_window: rule for the tokens after a target.
      too_long: as for `SingleStreamConverter`.
    """

    inputs_length: int
    target_length: int
    target_window: TargetWindow = dataclasses.field(default_factory=ExactEos)
    too_long: str = "truncate_inputs"

    def __post_init__(self):
        check_fields(self)

    @property
    def suffix_length(self) -> int:
        """0: the decoder has no slots after the target."""
        return 0

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
        """Returns i64[n, 2], decoder and encoder slots, for lengths i32[n, 3] of inputs, targets and suffix."""
        lengths = lengths.astype(np.int64)
        inputs, targets, window = lengths[:, 0], lengths[:, 1], self.target_window
        if pretraining is not None:
            inputs, targets = pretraining.lengths(np.minimum(targets, self.max_piece(pretraining)))
            window = pretraining.target_window
        encoder = np.minimum(inputs, self.inputs_length) + 1
        return np.stack([1 + window.slots(targets, self.target_length), encoder], axis=1)

    def max_piece(self, pretraining: Pretraining) -> int:
        """Returns the length of the longest chunk whose inputs fit the encoder and whose targets fit the decoder."""
        pieces = np.arange(1, self.inputs_length + self.target_length + 1)
        inputs, targets = pretraining.widest(pieces)
        slots = pretraining.target_window.slots(targets, 2 * len(pieces) + 1)
        return longest(pieces, (inputs <= self.inputs_length) & (slots <= self.target_length))

    def batch(self, rows: Sequence[Sequence[Example]], specials: SpecialTokens, *, training: bool) -> Batch:
        """Returns the batch of `rows`; raises `ConfigError` as `too_long` says, and for MASK in the data (T35)."""
        batch = empty_batch(len(rows), self.row_length, specials)
        encoder = empty_encoder(len(rows), self.inputs_length + 1, specials)
        nothing = np.zeros(0, np.int32)
        for b, row in enumerate(rows):
            start = encoder_start = 0
            for segment, example in enumerate(row, 1):
                inputs, (tokens, weights) = parts_of(self, example, specials, training=training, shared_row=False)
                encoder_start = write_inputs(encoder, b, encoder_start, segment, inputs, specials)
                suffix = suffix_of(self, example)
                start = write_example(
                    batch, b, start, segment, example.example_id, specials.bos_id, nothing, tokens, weights, suffix
                )
        return checked(dataclasses.replace(batch, encoder=encoder), specials)

    def prompts(self, examples: Sequence[Example], specials: SpecialTokens) -> Batch:
        """Returns decoder rows [BOS, PAD ...] and encoder rows [inputs, EOS]."""
        batch = empty_batch(len(examples), self.row_length, specials)
        encoder = empty_encoder(len(examples), self.inputs_length + 1, specials)
        nothing = np.zeros(0, np.int32)
        for b, example in enumerate(examples):
            write_inputs(encoder, b, 0, 1, left_cut(self, example), specials)
            slots, suffix = prompt_slots(self, example), suffix_of(self, example)
            write_prompt(batch, b, example.example_id, specials, nothing, slots, suffix)
        return checked(dataclasses.replace(batch, encoder=encoder), specials)

    def abstract_batch(self, batch_size: int, specials: SpecialTokens) -> Batch:
        """Returns a `Batch` of `jax.ShapeDtypeStruct`."""
        return abstract_batch(batch_size, self.row_length, self.inputs_length + 1, specials)


def with_encoder(converter: Converter, encoder: bool) -> Converter:
    """Returns a converter for networks with or without an encoder, with the same lengths, window and `too_long`.

    Raises:
      ConfigError: the converter has a suffix, a separator or `max_slots`, which an encoder-decoder does not support.
    """
    if (converter.encoder_length is not None) == encoder:
        return converter
    separator, limit = getattr(converter, "separator_id", None), getattr(converter, "max_slots", None)
    require(
        separator is None,
        f"separator_id={separator}: an encoder-decoder has a separate input stream, so it takes no separator",
        where="SingleStreamConverter.separator_id",
        fix="Set it to None, or give the network with an encoder its own pipeline.",
    )
    require(
        limit is None,
        f"max_slots={limit}: inputs and targets of an encoder-decoder do not share a row",
        where="SingleStreamConverter.max_slots",
        fix="Set it to None and limit inputs_length and target_length.",
    )
    require(
        converter.suffix_length == 0,
        f"suffix_length={converter.suffix_length}: an encoder-decoder does not support text after the target",
        where="SingleStreamConverter.suffix_length",
        fix="Use a network without an encoder for infilling.",
    )
    layout = EncoderDecoderConverter if encoder else SingleStreamConverter
    return layout(converter.inputs_length, converter.target_length, converter.target_window, converter.too_long)
