"""Writing examples into the arrays of a batch: what the converters share."""

from typing import Any

import jax
import numpy as np

from diffusion_lm.core.special import SpecialTokens
from diffusion_lm.core.types import Batch, EncoderInputs
from diffusion_lm.data.store import check_tokens


def _full(shape: tuple[int, int], value: int, dtype: Any) -> Any:
    """A numpy array where the types say jax.Array: batches cross to the device as they are."""
    return np.full(shape, value, dtype)


def empty_batch(rows: int, length: int, specials: SpecialTokens) -> Batch:
    """Returns a batch [rows, length] of padding."""
    shape = (rows, length)
    return Batch(
        tokens=_full(shape, specials.pad_id, np.int32),
        target_mask=_full(shape, False, np.bool_),
        loss_weights=_full(shape, 0, np.float32),
        segment_ids=_full(shape, 0, np.int32),
        positions=_full(shape, 0, np.int32),
        example_ids=_full(shape, 0, np.uint32),
        special=specials,
    )


def empty_encoder(rows: int, length: int, specials: SpecialTokens) -> EncoderInputs:
    """Returns encoder inputs [rows, length] of padding."""
    shape = (rows, length)
    return EncoderInputs(
        tokens=_full(shape, specials.pad_id, np.int32),
        segment_ids=_full(shape, 0, np.int32),
        positions=_full(shape, 0, np.int32),
    )


def write_example(
    batch: Batch,
    b: int,
    start: int,
    segment: int,
    example_id: int,
    bos_id: int,
    inputs: np.ndarray,
    tokens: np.ndarray,
    weights: np.ndarray,
    suffix: np.ndarray,
) -> int:
    """Writes [BOS, inputs, window, suffix] at slot `start` of row `b`; returns the slot behind it."""
    first = start + 1 + len(inputs)
    behind = first + len(tokens)
    end = behind + len(suffix)
    batch.tokens[b, start] = bos_id
    batch.tokens[b, start + 1 : first] = inputs
    batch.tokens[b, first:behind] = tokens
    batch.tokens[b, behind:end] = suffix
    batch.target_mask[b, first:behind] = True
    batch.loss_weights[b, first:behind] = weights
    batch.segment_ids[b, start:end] = segment
    batch.positions[b, start:end] = np.arange(end - start)
    batch.example_ids[b, start:end] = example_id
    return end


def write_inputs(
    encoder: EncoderInputs, b: int, start: int, segment: int, inputs: np.ndarray, specials: SpecialTokens
) -> int:
    """Writes [inputs, EOS] at slot `start` of row `b`; returns the slot behind it."""
    end = start + len(inputs) + 1
    encoder.tokens[b, start : end - 1] = inputs
    encoder.tokens[b, end - 1] = specials.eos_id
    encoder.segment_ids[b, start:end] = segment
    encoder.positions[b, start:end] = np.arange(end - start)
    return end


def write_prompt(
    batch: Batch, b: int, example_id: int, specials: SpecialTokens, inputs: np.ndarray, window: int, suffix: np.ndarray
) -> None:
    """Writes [BOS, inputs, PAD ..., suffix] into row `b`; nothing is scored."""
    filler, unscored = np.full(window, specials.pad_id, np.int32), np.zeros(window, np.float32)
    write_example(batch, b, 0, 1, example_id, specials.bos_id, inputs, filler, unscored, suffix)


def checked(batch: Batch, specials: SpecialTokens) -> Batch:
    """Returns the batch; raises `ConfigError` for MASK or an id outside the vocabulary in it (trap T35)."""
    check_tokens(np.asarray(batch.tokens), specials, "a batch")
    if batch.encoder is not None:
        check_tokens(np.asarray(batch.encoder.tokens), specials, "a batch")
    return batch


def strata(segment_ids: Any, first_row: int, batch_size: int) -> Any:
    """Returns `Batch.strata` for rows `first_row`, ... of a global batch of `batch_size` rows.

    The examples of one number inside their rows are spread evenly over [0, 1); those that share a row are set apart by
    the golden ratio, which keeps any number of them spread.
    """
    rows = (first_row + np.arange(len(segment_ids), dtype=np.float64)[:, None]) / batch_size
    places = rows + (np.maximum(segment_ids, 1) - 1) * ((5**0.5 - 1) / 2)
    return (places % 1.0).astype(np.float32)


def abstract_batch(batch_size: int, length: int, encoder_length: int | None, specials: SpecialTokens) -> Batch:
    """Returns the shapes and dtypes of a batch."""

    def shaped(dtype: Any, width: int = length) -> Any:
        return jax.ShapeDtypeStruct((batch_size, width), dtype)

    encoder = None
    if encoder_length is not None:
        encoder = EncoderInputs(*(shaped(np.int32, encoder_length) for _ in range(3)))
    return Batch(
        tokens=shaped(np.int32),
        target_mask=shaped(np.bool_),
        loss_weights=shaped(np.float32),
        segment_ids=shaped(np.int32),
        positions=shaped(np.int32),
        example_ids=shaped(np.uint32),
        special=specials,
        encoder=encoder,
    )
