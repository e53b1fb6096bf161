"""The layer that reads the time: off it is not there, fresh it changes nothing, clean slots are told nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import model_stubs as stubs
import numpy as np
import pytest

from diffusion_lm.architectures.encoder_decoder import EncoderDecoder
from diffusion_lm.architectures.single_stream import SingleStream
from diffusion_lm.core.errors import ConfigError
from diffusion_lm.nn.masks import Full
from diffusion_lm.nn.time_conditioning import FEATURES, run_time_conditioning, time_features

T5 = stubs.nano_spec(**stubs.QUICK)
DOUBLE = dataclasses.replace(T5, encoder_layers=1, tied_embeddings=False)
BATCH = stubs.make_batch([2, 1], [5, 7], 9)
TIME = jnp.where(BATCH.target_mask, jnp.float32([[0.25], [0.75]]), 0.0)


def hidden(model, batch, **inputs):
    fields = {"positions": batch.positions, "segment_ids": batch.segment_ids, "encoder": batch.encoder}
    return model(batch.tokens, visibility=Full(), **fields, **inputs).values_BTD


@pytest.mark.parametrize("spec", [T5, DOUBLE], ids=["t5", "double"])
def test_the_other_parameters_are_what_they_are_without_it(spec):
    build = EncoderDecoder if spec.encoder_layers else SingleStream
    plain, told = build(spec), build(dataclasses.replace(spec, time_conditioning=True))
    before, after = plain.init(jax.random.key(3)), dict(told.init(jax.random.key(3)))
    layer = after.pop("time_conditioning")
    jax.tree.map(np.testing.assert_array_equal, after, before)
    assert not layer["down"].any(), "fresh, it adds nothing"
    axes = told.logical_axes()
    assert jax.tree.structure(told.abstract_params()) == jax.tree.structure(
        axes, is_leaf=lambda x: isinstance(x, tuple)
    )
    D = spec.model_dim
    assert told.flops_per_token(8) - plain.flops_per_token(8) == 2 * (FEATURES * D + D * D)
    assert told.count_parameters()["time_conditioning"] == FEATURES * D + D * D + 2 * D


def test_features_are_those_of_ddpm():
    """cos and sin of 1000 t / 10000^(i/half), computed here in float64 by a formula of their own."""
    features = np.asarray(time_features(jnp.float32([[0.0, 0.003, 0.5]])))[0]
    half = FEATURES // 2
    for t, row in zip((0.0, 0.003, 0.5), features, strict=True):
        angles = [1000.0 * t / 10000.0 ** (i / half) for i in range(half)]
        np.testing.assert_allclose(row, [*np.cos(angles), *np.sin(angles)], atol=2e-4)


def test_fresh_it_changes_nothing_and_trained_it_speaks_of_noisy_slots_alone():
    plain, trained = stubs.nano(**stubs.QUICK), stubs.nano(**stubs.QUICK, time_conditioning=True)
    layer = trained.params["time_conditioning"]
    idle = layer | {"down": jnp.zeros_like(layer["down"])}
    fresh = dataclasses.replace(trained, params=trained.params | {"time_conditioning": idle})
    expected = hidden(plain, BATCH)
    np.testing.assert_array_equal(hidden(fresh, BATCH, time=TIME), expected)
    np.testing.assert_array_equal(hidden(trained, BATCH), expected)
    np.testing.assert_array_equal(hidden(trained, BATCH, time=jnp.zeros_like(TIME)), expected)
    assert np.abs(hidden(trained, BATCH, time=TIME) - expected).max() > 0.01
    assert np.abs(hidden(trained, BATCH, time=TIME) - hidden(trained, BATCH, time=TIME / 2)).max() > 0.01
    added = np.asarray(run_time_conditioning(trained.spec, layer | {"down_bias": layer["down_bias"] + 1.0}, TIME))
    target = np.asarray(BATCH.target_mask)
    assert not added[~target].any(), "with biases too"
    assert np.abs(added[target]).min(axis=-1).max() > 0


def test_an_encoder_decoder_reads_it_in_its_decoder():
    model = stubs.nano_encoder_decoder(**stubs.QUICK, time_conditioning=True)
    batch = stubs.make_batch([1, 1], [5, 7], 9, encoder=True)
    assert "time_conditioning" not in model.params["encoder"]
    assert np.abs(hidden(model, batch, time=TIME) - hidden(model, batch)).max() > 0.01


def test_a_network_without_the_layer_refuses_a_time():
    with pytest.raises(ConfigError, match="no layer that reads a time"):
        hidden(stubs.nano(**stubs.QUICK), BATCH, time=TIME)
