"""Self-conditioning: two passes by hand, the first without gradient, by chance."""

import dataclasses

import jax
import jax.numpy as jnp
import model_stubs as stubs
import numpy as np
import pytest

from diffusion_lm.core.alignment import SamePosition, Shifted
from diffusion_lm.core.errors import ConfigError
from diffusion_lm.core.rng import StreamKeys
from diffusion_lm.nn.masks import Full
from diffusion_lm.noise.process import Absorbing, Uniform
from diffusion_lm.noise.weighting import Flat
from diffusion_lm.objectives.masked_diffusion import MaskedDiffusion
from diffusion_lm.objectives.mixture import ConstantFactor, Mixture
from diffusion_lm.objectives.self_conditioning import STREAM
from diffusion_lm.objectives.sundae import Sundae

KEYS = StreamKeys.create(1, 3)
BATCH = stubs.make_batch([3, 4, 2, 3], [6, 5, 7, 6], 10)
MODEL = stubs.nano(**stubs.QUICK, self_conditioning=True)
MASK = stubs.SPECIAL.mask


def by_hand(objective, noisy, coin):
    """Returns loss and gradient with the dense softmax of the first pass as a constant."""
    masked = objective.process.has_mask
    read = np.asarray(BATCH.target_mask) & coin & ((np.asarray(noisy) == MASK) if masked else True)

    def states(params, signal):
        model = dataclasses.replace(MODEL, params=params)
        fields = {"positions": BATCH.positions, "segment_ids": BATCH.segment_ids}
        return model, model(noisy, visibility=Full(), self_condition=signal, **fields)

    def loss(params):
        model, first = states(MODEL.params, None)
        logits = model.logits(first)
        logits = logits.at[..., MASK].set(-jnp.inf) if masked else logits
        expected = jax.nn.softmax(logits) @ MODEL.params["embed"]["tokens"][: stubs.VOCAB]
        signal = jnp.where(read[..., None], objective.alignment.to_tokens(expected), 0.0)
        model, second = states(params, signal)
        targets = objective.alignment.to_slots(BATCH.tokens)
        nll = objective.alignment.to_tokens(model.nll(second, targets, forbidden=(MASK,) if masked else ()))
        return (nll * BATCH.loss_weights * ((noisy == MASK) if masked else 1.0)).sum()

    return jax.jit(jax.value_and_grad(loss))(MODEL.params)


@pytest.mark.parametrize("alignment", [SamePosition(), Shifted()], ids=["same", "shifted"])
def test_loss_and_gradient_are_those_of_a_second_pass_on_a_constant(alignment):
    objective = Sundae(unrolls=0, self_conditioning=0.5, alignment=alignment)
    t = objective.time.draw(KEYS, BATCH.example_ids)
    noisy = objective.process.corrupt(KEYS, BATCH, t, vocab_size=stubs.VOCAB).tokens
    coin = np.asarray(KEYS.example_uniform(STREAM, BATCH.example_ids)) < 0.5
    assert 0 < coin[:, 0].sum() < 4, "some examples read a prediction and some do not"
    terms, grads = stubs.loss_and_grad(objective, MODEL, BATCH, KEYS)
    expected, expected_grads = by_hand(objective, noisy, coin)
    np.testing.assert_allclose(terms.loss_sum, expected, rtol=1e-5)
    stubs.assert_close(grads, expected_grads, scaled=1e-4)
    assert terms.weight == BATCH.loss_weights.sum()
    without, _ = by_hand(objective, noisy, np.zeros_like(coin))
    assert abs(without - expected) > 1e-3, "the prediction matters"


def test_with_mask_only_masked_tokens_are_predicted():
    objective = MaskedDiffusion(Absorbing(), weighting=Flat(), self_conditioning=1.0)
    t = objective.time.draw(KEYS, BATCH.example_ids)
    noisy = objective.process.corrupt(KEYS, BATCH, t, vocab_size=stubs.VOCAB).tokens
    terms, grads = stubs.loss_and_grad(objective, MODEL, BATCH, KEYS)
    expected, expected_grads = by_hand(objective, noisy, np.ones(BATCH.tokens.shape, bool))
    np.testing.assert_allclose(terms.loss_sum, expected, rtol=1e-5)
    stubs.assert_close(grads, expected_grads, scaled=1e-4)


def test_probability_0_is_the_plain_objective_and_evaluation_always_reads_a_prediction():
    plain, never, always = (Sundae(unrolls=0, self_conditioning=p) for p in (0.0, 1e-9, 1.0))
    losses = [stubs.loss_and_grad(one, MODEL, BATCH, KEYS)[0].loss_sum for one in (plain, never, always)]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-6)
    assert abs(losses[2] - losses[0]) > 1e-3
    half = Sundae(unrolls=0, self_conditioning=0.5)
    bounds = [stubs.bound(one, MODEL, BATCH, KEYS).loss_sum for one in (half, always, plain)]
    np.testing.assert_allclose(bounds[0], bounds[1], rtol=1e-6)
    assert abs(bounds[2] - bounds[0]) > 1e-3


def test_needs_say_what_it_costs_and_which_network():
    needs = Sundae(unrolls=0, self_conditioning=0.5).needs()
    assert needs.self_conditioning
    assert (needs.passes, needs.frozen_passes, needs.cost_in_forward_passes) == (2, 1, 4.0)
    assert not Sundae().needs().self_conditioning
    assert Sundae().needs().cost_in_forward_passes == 6.0
    both = Mixture(("a", "b"), (Sundae(unrolls=0, self_conditioning=0.5), Sundae()), (ConstantFactor(),) * 2, "a")
    assert both.needs().self_conditioning
    assert both.needs().cost_in_forward_passes == 10.0


def test_a_network_without_the_layer_is_refused():
    objective = Sundae(Uniform(), unrolls=0, self_conditioning=0.5)
    with pytest.raises(ConfigError, match="no layer that reads a previous prediction"):
        objective.loss(stubs.nano(**stubs.QUICK), BATCH, KEYS)


@pytest.mark.parametrize(("probability", "unrolls"), [(-0.1, 0), (1.1, 0), (0.5, 1)])
def test_impossible_settings_are_errors(probability, unrolls):
    with pytest.raises(ConfigError, match="self_conditioning"):
        Sundae(unrolls=unrolls, self_conditioning=probability)
