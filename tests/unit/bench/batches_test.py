"""Synthetic batches have the shapes, dtypes and invariants of batches of the pipeline."""

import dataclasses

import jax
import numpy as np
import pytest

from diffusion_lm.architectures.encoder_decoder import EncoderDecoder
from diffusion_lm.architectures.single_stream import SingleStream
from diffusion_lm.bench.batches import conditioning_length, synthetic_batch
from diffusion_lm.data.converters import EncoderDecoderConverter, SingleStreamConverter
from diffusion_lm.data.grain_source import GrainSource
from diffusion_lm.data.iterator import DataPipeline
from diffusion_lm.data.pretraining import CausalLM
from diffusion_lm.nn.transformer import TransformerSpec
from diffusion_lm.objectives.autoregressive import Autoregressive
from diffusion_lm.objectives.masked_diffusion import MaskedDiffusion
from diffusion_lm.training.run import TrainRun

SPEC = TransformerSpec(vocab_size=8, num_layers=1, model_dim=8, num_heads=1, head_dim=8, mlp_dim=8)
SINGLE = SingleStreamConverter(inputs_length=3, target_length=5)
PAIR = EncoderDecoderConverter(inputs_length=3, target_length=5)


def run_of(converter, **fields):
    data = DataPipeline(
        sources=(GrainSource("none"),), converter=converter, pretraining=fields.pop("pretraining", None)
    )
    spec = dataclasses.replace(SPEC, encoder_layers=1) if converter is PAIR else SPEC
    model = EncoderDecoder(spec) if converter is PAIR else SingleStream(spec)
    return TrainRun(
        **({"model": model, "objective": Autoregressive(), "data": data, "steps": 1, "batch_size": 4} | fields)
    )


@pytest.mark.parametrize("converter", [SINGLE, PAIR], ids=["single", "pair"])
def test_shapes_and_dtypes_are_those_of_the_pipeline(converter):
    run = run_of(converter)
    batch = synthetic_batch(run)
    wanted = run.data.abstract_batch(4)
    assert jax.tree.structure(batch) == jax.tree.structure(wanted)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), batch) == jax.tree.map(lambda x: (x.shape, x.dtype), wanted)


@pytest.mark.parametrize(
    ("converter", "pretraining", "conditioning"),
    [(SINGLE, None, 4), (SINGLE, CausalLM(), 1), (PAIR, None, 1)],
    ids=["single", "text", "pair"],
)
def test_everything_after_the_conditioning_is_scored(converter, pretraining, conditioning):
    run = run_of(converter, pretraining=pretraining)
    batch = synthetic_batch(run)
    assert conditioning_length(run) == conditioning
    assert not batch.target_mask[:, :conditioning].any()
    assert batch.target_mask[:, conditioning:].all()
    np.testing.assert_array_equal(batch.loss_weights, batch.target_mask)


def test_tokens_never_contain_mask():
    run = run_of(SINGLE, objective=MaskedDiffusion(), batch_size=64)
    tokens = synthetic_batch(run).tokens
    assert set(np.unique(tokens)) == set(range(8)) - {4}


def test_batches_with_different_numbers_differ_in_tokens_and_example_ids():
    first, second = (synthetic_batch(run_of(SINGLE), number) for number in (0, 1))
    assert (first.tokens != second.tokens).any()
    assert not set(first.example_ids.ravel().tolist()) & set(second.example_ids.ravel().tolist())
