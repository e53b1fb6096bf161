"""The layer that reads a prediction: off it is not there, fresh it changes nothing, zeros are no prediction."""

import dataclasses

import jax
import jax.numpy as jnp
import model_stubs as stubs
import numpy as np
import pytest

from diffusion_lm.architectures.base import BoundModel
from diffusion_lm.architectures.encoder_decoder import EncoderDecoder
from diffusion_lm.architectures.single_stream import SingleStream
from diffusion_lm.core.errors import ConfigError
from diffusion_lm.nn.masks import Full
from diffusion_lm.nn.stack import run_self_conditioning

T5 = stubs.nano_spec(**stubs.QUICK)
GPT = dataclasses.replace(T5, norm="layernorm", mlp="gelu", use_bias=True, position="rope")
DOUBLE = dataclasses.replace(T5, encoder_layers=1, tied_embeddings=False)
BATCH = stubs.make_batch([2, 1], [5, 7], 9)
SIGNAL = jax.random.normal(jax.random.key(1), (2, 9, 32))


def network(spec):
    return EncoderDecoder(spec) if spec.encoder_layers else SingleStream(spec)


def hidden(model, batch, **inputs):
    fields = {"positions": batch.positions, "segment_ids": batch.segment_ids, "encoder": batch.encoder}
    return model(batch.tokens, visibility=Full(), **fields, **inputs).values_BTD


@pytest.mark.parametrize("spec", [T5, GPT, DOUBLE], ids=["t5", "gpt", "double"])
def test_the_other_parameters_are_what_they_are_without_it(spec):
    plain, with_layer = network(spec), network(dataclasses.replace(spec, self_conditioning=True))
    before, after = plain.init(jax.random.key(3)), dict(with_layer.init(jax.random.key(3)))
    layer = after.pop("self_conditioning")
    jax.tree.map(np.testing.assert_array_equal, after, before)
    assert not layer["mlp"]["down"].any(), "fresh, it adds nothing"
    assert layer["mlp"]["up"].shape == (spec.model_dim, spec.mlp_dim)
    assert "bias" not in str(jax.tree.structure(layer))
    is_axes = lambda x: isinstance(x, tuple)  # noqa: E731
    axes = with_layer.logical_axes()
    assert jax.tree.structure(with_layer.abstract_params()) == jax.tree.structure(axes, is_leaf=is_axes)
    assert with_layer.flops_per_token(8) > plain.flops_per_token(8)
    assert with_layer.count_parameters()["self_conditioning"] == sum(x.size for x in jax.tree.leaves(layer))


def test_fresh_it_changes_nothing_and_trained_it_reads_each_slot_by_itself():
    plain = stubs.nano(**stubs.QUICK)
    trained = stubs.nano(**stubs.QUICK, self_conditioning=True)
    layer = trained.params["self_conditioning"]
    idle = layer | {"mlp": layer["mlp"] | {"down": jnp.zeros_like(layer["mlp"]["down"])}}
    fresh = dataclasses.replace(trained, params=trained.params | {"self_conditioning": idle})
    expected = hidden(plain, BATCH)
    np.testing.assert_array_equal(hidden(fresh, BATCH, self_condition=SIGNAL), expected)
    np.testing.assert_array_equal(hidden(trained, BATCH), expected)
    np.testing.assert_array_equal(hidden(trained, BATCH, self_condition=jnp.zeros_like(SIGNAL)), expected)
    assert np.abs(hidden(trained, BATCH, self_condition=SIGNAL) - expected).max() > 0.01
    added = run_self_conditioning(trained.spec, layer, SIGNAL.at[:, 3].set(0), lambda x, axes: x)
    assert not added[:, 3].any()
    assert np.abs(added[:, [2, 4]]).min(axis=-1).max() > 0
    # Gated, of the normalised signal: its size does not matter.
    twice = run_self_conditioning(trained.spec, layer, 2 * SIGNAL, lambda x, axes: x)
    np.testing.assert_allclose(twice[:, 2], added[:, 2], rtol=1e-3, atol=1e-4)


def test_an_encoder_decoder_reads_it_in_its_decoder():
    model = stubs.nano_encoder_decoder(**stubs.QUICK, self_conditioning=True)
    batch = stubs.make_batch([1, 1], [5, 7], 9, encoder=True)
    assert "self_conditioning" not in model.params["encoder"]
    assert np.abs(hidden(model, batch, self_condition=SIGNAL) - hidden(model, batch)).max() > 0.01
    np.testing.assert_array_equal(
        hidden(model, batch, self_condition=0 * SIGNAL), hidden(model, batch), "with biases or without"
    )


def test_biases_do_not_turn_zeros_into_a_signal():
    spec = dataclasses.replace(GPT, self_conditioning=True)
    params = jax.tree.map(lambda x: x + 0.1, network(spec).init(jax.random.key(0)))
    model = BoundModel(network(spec), params)
    np.testing.assert_array_equal(hidden(model, BATCH, self_condition=0 * SIGNAL), hidden(model, BATCH))


def test_a_network_without_the_layer_refuses_a_prediction():
    with pytest.raises(ConfigError, match="no layer that reads a previous prediction"):
        hidden(stubs.nano(**stubs.QUICK), BATCH, self_condition=SIGNAL)


def test_T35_expected_embedding_is_that_of_the_dense_distribution():
    """Of the input embedding also where the head has weights of its own; forbidden ids have no part in it."""
    for model in (stubs.nano(**stubs.QUICK), stubs.nano(**stubs.QUICK, tied_embeddings=False, logits_chunk=4)):
        states = model(BATCH.tokens, visibility=Full(), positions=BATCH.positions, segment_ids=BATCH.segment_ids)
        stats = model.token_stats(states, forbidden=(7,), expected=True)
        logits = model.logits(states).at[..., 7].set(-jnp.inf)
        table = model.params["embed"]["tokens"][: stubs.VOCAB]
        np.testing.assert_allclose(stats.expected[:, :, 0], jax.nn.softmax(logits) @ table, rtol=1e-4, atol=1e-5)
        assert model.token_stats(states).expected is None
