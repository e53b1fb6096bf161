"""Makes training batches of random tokens with the shapes of a run, so that a step can be timed without data."""

from typing import Any, cast

import jax
import numpy as np

from diffusion_lm.core.special import SpecialTokens
from diffusion_lm.core.types import Batch, EncoderInputs
from diffusion_lm.data.rows import strata
from diffusion_lm.training.run import TrainRun


def synthetic_batch(run: TrainRun, number: int = 0) -> Batch:
    """Returns a batch of full rows: conditioning of the maximum length of the run, then targets that are all scored.

    `number` seeds the random tokens. MASK never occurs.
    """
    shapes = run.data.abstract_batch(run.batch_size)
    rows, length = shapes.tokens.shape
    draw = np.random.default_rng(number)
    # Like those of a pipeline, batches are numpy arrays until they are placed on devices.
    target: Any = np.broadcast_to(np.arange(length) >= conditioning_length(run), (rows, length))
    example_ids: Any = np.arange(rows, dtype=np.uint32) + np.uint32(number * rows)
    encoder = None
    if shapes.encoder is not None:
        encoder = EncoderInputs(*_stream(draw, run, shapes.encoder.tokens.shape, shapes.special))
    tokens, segments, positions = _stream(draw, run, (rows, length), shapes.special)
    return Batch(
        tokens=tokens,
        target_mask=target.copy(),
        loss_weights=target.astype(np.float32),
        segment_ids=segments,
        positions=positions,
        example_ids=example_ids[:, None].repeat(length, axis=1),
        special=shapes.special,
        encoder=encoder,
        strata=cast(jax.Array, strata(segments, 0, rows)),
    )


def conditioning_length(run: TrainRun) -> int:
    """Returns the number of conditioning tokens per row: BOS and the longest inputs in this stream."""
    data = run.data
    if data.encoder_length is not None:
        return 1
    if data.pretraining is not None:
        inputs, _ = data.pretraining.lengths(np.array([data.converter.max_piece(data.pretraining)]))
        return 1 + int(inputs[0])
    return data.row_length - data.converter.target_length


def _stream(
    draw: np.random.Generator, run: TrainRun, shape: tuple[int, ...], special: SpecialTokens
) -> tuple[Any, Any, Any]:
    """Returns tokens, segment ids and positions of one stream, i32[B,T] each."""
    tokens = draw.integers(0, run.model.spec.vocab_size, shape, dtype=np.int32)
    mask = special.mask_id
    if mask is not None and run.objective.needs().mask_token:
        # Real targets never contain MASK.
        tokens[tokens == mask] = mask - 1 if mask else 1
    positions = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
    return tokens, np.ones(shape, np.int32), positions.copy()
