"""Exponents beside a network: where they stand, who sees them, and that nothing else changes."""

import dataclasses

import jax
import jax.numpy as jnp
import model_stubs as stubs
import numpy as np
import pytest

from diffusion_lm.architectures.base import BoundModel
from diffusion_lm.architectures.exponents import WithTokenSchedules, token_exponents
from diffusion_lm.architectures.extended import layer_of
from diffusion_lm.architectures.length_head import length_logits
from diffusion_lm.core.rng import StreamKeys
from diffusion_lm.objectives.autoregressive import Autoregressive
from diffusion_lm.objectives.masked_diffusion import MaskedDiffusion
from diffusion_lm.objectives.mixture import ConstantFactor, Mixture
from diffusion_lm.objectives.token_schedules import TokenSchedules
from diffusion_lm.samplers.decoding import Decoding
from diffusion_lm.samplers.masked import MaskedSampler
from diffusion_lm.samplers.unmasking import Ancestral
from diffusion_lm.training.transfer import transfer

KEYS = StreamKeys.create(3)
PLAIN = stubs.nano(**stubs.QUICK)
MODEL = stubs.with_token_schedules(PLAIN)
BATCH = stubs.make_batch([2, 5, 3], [6, 2, 4], 11)
MASK = 4


def test_fresh_exponents_are_one_and_all_that_is_added():
    architecture = MODEL.architecture
    fresh = architecture.init(jax.random.key(0))
    np.testing.assert_allclose(architecture.exponents(fresh), np.ones(stubs.VOCAB), rtol=1e-6)
    assert fresh["exponents"]["raw"].shape == (PLAIN.spec.padded_vocab_size,)
    got, report = transfer(PLAIN.params, fresh, architecture.logical_axes())
    assert report.added == ("exponents/raw",)
    assert report.resized == report.dropped == ()
    np.testing.assert_array_equal(got["embed"]["tokens"], PLAIN.params["embed"]["tokens"])
    counts = architecture.count_parameters()
    assert counts["total"] == PLAIN.architecture.count_parameters()["total"] + PLAIN.spec.padded_vocab_size
    half = WithTokenSchedules(stubs.nano(**stubs.QUICK, param_dtype="bfloat16").architecture)
    assert half.abstract_params()["exponents"]["raw"].dtype == jnp.float32


def test_exponents_are_found_under_a_length_head_and_nowhere_else():
    headed = stubs.with_length_head(MODEL)
    np.testing.assert_array_equal(token_exponents(headed), token_exponents(MODEL))
    assert token_exponents(MODEL).min() < 0.6
    assert token_exponents(MODEL).max() > 1.8
    assert token_exponents(PLAIN) is None
    assert layer_of(stubs.with_length_head(PLAIN).architecture, WithTokenSchedules) is None


def test_exponents_around_a_length_head_leave_it_in_reach():
    headed = stubs.with_length_head(PLAIN)
    both = BoundModel(
        WithTokenSchedules(headed.architecture), {**headed.params, "exponents": MODEL.params["exponents"]}
    )
    np.testing.assert_array_equal(token_exponents(both), token_exponents(MODEL))
    logits, expected = (jax.jit(lambda model=model: length_logits(model, BATCH, "full"))() for model in (both, headed))
    np.testing.assert_array_equal(logits, expected)


def test_other_objectives_and_samplers_do_not_see_them():
    """The same loss, gradient and tokens, bit for bit; the exponents' own gradient is 0."""
    objective = MaskedDiffusion()
    (terms, gradient), (expected, expected_gradient) = (
        stubs.loss_and_grad(objective, model, BATCH, KEYS) for model in (MODEL, PLAIN)
    )
    gradient = dict(gradient)
    assert not np.asarray(gradient.pop("exponents")["raw"]).any()
    jax.tree.map(np.testing.assert_array_equal, (terms, gradient), (expected, dict(expected_gradient)))
    sampler = MaskedSampler(unmask=Ancestral(), steps=4, decoding=Decoding(temperature=1.0))
    decoded = [stubs.generate(sampler, model, stubs.as_prompt(BATCH), KEYS) for model in (MODEL, PLAIN)]
    jax.tree.map(np.testing.assert_array_equal, *decoded)


@pytest.mark.parametrize("raw", [-20.0, 20.0])
def test_the_ends_are_finite(raw):
    """Exponents near 0 and far above 1, at t = 1 and at the smallest times, with masks of small probability."""
    objective = TokenSchedules()
    first = jnp.asarray(BATCH.target_mask)
    other = first & (jnp.arange(11) % 2 == 0)

    def loss(raw, t):
        params = {**MODEL.params, "exponents": {"raw": raw}}
        model = stubs.BoundModel(MODEL.architecture, params)
        t_BT = jnp.full(BATCH.tokens.shape, t)
        return objective.terms(t_BT, (first, other), model, BATCH, KEYS, train=False, low=1e-3).loss_sum

    both = jax.jit(jax.value_and_grad(loss))
    for t in (1e-3, 0.5, 1.0):
        value, gradient = both(jnp.full(MODEL.params["exponents"]["raw"].shape, raw), t)
        assert np.isfinite(value)
        assert np.isfinite(gradient).all()


def test_what_is_needed_is_said():
    objective = TokenSchedules()
    assert objective.needs().token_schedules
    assert objective.needs().passes == 2
    assert not MaskedDiffusion().needs().token_schedules
    both = Mixture(("a", "b"), (Autoregressive(), objective), (ConstantFactor(),) * 2, "a")
    assert both.needs().token_schedules
    assert hash(MODEL.architecture) == hash(dataclasses.replace(MODEL.architecture))
