"""Writes examples to the arrays of a batch; shared by the converters."""

from typing import Any

import jax
import numpy as np
from jax.typing import DTypeLike

from diffusion_lm.core.special import SpecialTokens
from diffusion_lm.core.types import Batch, EncoderInputs
from diffusion_lm.data.store import check_tokens


def _full(shape: tuple[int, int], value: int, dtype: DTypeLike) -> Any:
    """Returns a NumPy array. Typed `Any`, because the fields of `Batch` are declared as `jax.Array`."""
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
    """Writes [BOS, inputs, window, suffix] from slot `start` of row `b` on; returns the next free slot."""
    first = start + 1 + len(inputs)
    window_end = first + len(tokens)
    end = window_end + len(suffix)
    batch.tokens[b, start] = bos_id
    batch.tokens[b, start + 1 : first] = inputs
    batch.tokens[b, first:window_end] = tokens
    batch.tokens[b, window_end:end] = suffix
    batch.target_mask[b, first:window_end] = True
    batch.loss_weights[b, first:window_end] = weights
    batch.segment_ids[b, start:end] = segment
    batch.positions[b, start:end] = np.arange(end - start)
    batch.example_ids[b, start:end] = example_id
    return end


def write_inputs(
    encoder: EncoderInputs, b: int, start: int, segment: int, inputs: np.ndarray, specials: SpecialTokens
) -> int:
    """Writes [inputs, EOS] from slot `start` of row `b` on; returns the next free slot."""
    end = start + len(inputs) + 1
    encoder.tokens[b, start : end - 1] = inputs
    encoder.tokens[b, end - 1] = specials.eos_id
    encoder.segment_ids[b, start:end] = segment
    encoder.positions[b, start:end] = np.arange(end - start)
    return end


def write_prompt(
    batch: Batch, b: int, example_id: int, specials: SpecialTokens, inputs: np.ndarray, window: int, suffix: np.ndarray
) -> None:
    """Writes [BOS, inputs, PAD ..., suffix] to row `b`, with loss weight 0 everywhere."""
    filler, unscored = np.full(window, specials.pad_id, np.int32), np.zeros(window, np.float32)
    write_example(batch, b, 0, 1, example_id, specials.bos_id, inputs, filler, unscored, suffix)


def checked(batch: Batch, specials: SpecialTokens) -> Batch:
    """Returns the batch; raises `ConfigError` if it contains MASK or an id outside the vocabulary (trap T35)."""
    check_tokens(np.asarray(batch.tokens), specials, "a batch")
    if batch.encoder is not None:
        check_tokens(np.asarray(batch.encoder.tokens), specials, "a batch")
    return batch


def strata(segment_ids: jax.Array | np.ndarray, first_row: int, batch_size: int) -> Any:
    """Returns `Batch.strata`, f32[B,T], for rows `first_row`, ... of a global batch of `batch_size` rows.

    The k-th examples of all rows are spread evenly over [0, 1). Successive examples of a packed row are offset by the
    golden ratio, so that any number of them stays spread out.
    """
    rows = (first_row + np.arange(len(segment_ids), dtype=np.float64)[:, None]) / batch_size
    places = rows + (np.maximum(segment_ids, 1) - 1) * ((5**0.5 - 1) / 2)
    return (places % 1.0).astype(np.float32)


def abstract_batch(batch_size: int, length: int, encoder_length: int | None, specials: SpecialTokens) -> Batch:
    """Returns the shapes and dtypes of a batch."""

    def shaped(dtype: DTypeLike, width: int = length) -> Any:
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
