"""The masked-diffusion loss against everything that can be enumerated: masks, orders, likelihoods."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_worlds as tiny

from diffusion_lm.core.alignment import Shifted
from diffusion_lm.core.errors import ConfigError
from diffusion_lm.noise.choice import ExactCount
from diffusion_lm.noise.process import Absorbing, Uniform
from diffusion_lm.noise.schedules import Cosine, Geometric, Linear, LogLinear, Polynomial
from diffusion_lm.noise.time_sampling import DiscreteTime, UniformTime
from diffusion_lm.noise.weighting import InverseRate, InverseShare, Nelbo
from diffusion_lm.objectives.masked_diffusion import MaskedDiffusion
from diffusion_lm.objectives.rdm import Rdm

WORLD = tiny.World(V=3, L=3)
TARGET = (2, 0, 1)
MASKED = MaskedDiffusion()


def test_the_references_agree_and_the_bound_is_one():
    """Orders and masks are two ways to write the NELBO, and no target is likelier than its NELBO says."""
    t, w = tiny.gauss_legendre()
    for target in WORLD.targets:
        ce = WORLD.masked_ce(target)
        by_masks = sum(
            w_one / t_one * (WORLD.mask_probabilities(t_one) @ ce) for t_one, w_one in zip(t, w, strict=True)
        )
        np.testing.assert_allclose(by_masks, WORLD.nelbo(target), rtol=1e-9)
        assert WORLD.nll(target) < WORLD.nelbo(target)
    np.testing.assert_allclose(sum(np.exp(-WORLD.nll(target)) for target in WORLD.targets), 1.0, rtol=1e-9)


@pytest.mark.parametrize(
    ("schedule", "missing"),
    [(Linear(), 0), (Cosine(), 0), (Polynomial(2.0), 0), (LogLinear(1e-3), 1e-3), (Geometric(), 1e-4)],
    ids=repr,
)
def test_T06_expected_loss_is_the_bound_under_every_schedule(schedule, missing):
    """All masks, all t: the mean over generation orders. A schedule moves variance, not the value."""
    got = tiny.expected_loss(WORLD, TARGET, MASKED, schedule, tiny.gauss_legendre(200 if missing == 1e-4 else 40))
    np.testing.assert_allclose(got, WORLD.nelbo(TARGET), rtol=3 * missing + 1e-4)
    assert got > WORLD.nll(TARGET)


def test_T06_masked_count_times_1_over_t():
    """Dividing by the realised count with 1/t on top is another number, and the option says so."""
    code = dataclasses.replace(MASKED, weighting=InverseRate(), normaliser="replaced")
    t, w = tiny.gauss_legendre()
    share = np.maximum(WORLD.masks.sum(axis=1), 1)
    ratio = sum(
        w_one / t_one * (WORLD.mask_probabilities(t_one) @ (WORLD.masked_ce(TARGET) / share))
        for t_one, w_one in zip(t, w, strict=True)
    )
    assert ratio > 1.5 * WORLD.nelbo(TARGET) / WORLD.L, "the mean of the ratio is far above the bound per token"
    mask = (True, False, True)
    one = dataclasses.replace(code, process=tiny.Patterns(rows=((False, *mask),)), time=tiny.GivenTimes())
    terms = one.loss(WORLD.model, WORLD.batch([TARGET], times=[0.25]), tiny.KEYS)
    assert terms.weight == 2
    hidden = -WORLD.log_p(TARGET, np.array(mask))[list(mask)].sum()
    np.testing.assert_allclose(terms.loss_sum, 4 * hidden, rtol=1e-5)


@pytest.mark.parametrize("length", [1, 2, 4])
def test_T07_forced_mask_bias(length):
    """Drawing the count uniformly in 1..n and weighing by n / count is the bound; forcing one mask is not."""
    world = tiny.World(V=2, L=length)
    target = (1, 0, 1, 1)[:length]
    counts = world.masks.sum(axis=1)
    of_its_size = np.array([(counts == k).sum() for k in counts])
    law = np.where(counts > 0, 1 / (length * of_its_size), 0.0)
    patterns = tuple((False, *map(bool, mask)) for mask in world.masks)
    objective = dataclasses.replace(MASKED, process=tiny.Patterns(rows=patterns), weighting=InverseShare())
    batch = world.batch([target] * len(law), weights=law)
    got = float(jax.jit(lambda batch: objective.loss(world.model, batch, tiny.KEYS).loss_sum)(batch))
    np.testing.assert_allclose(got, world.nelbo(target), rtol=1e-5)

    ce, eps = world.masked_ce(target), 1e-3
    single = ce[counts == 1].mean()
    t = eps ** (1 - (np.arange(4000) + 0.5) / 4000)  # log-spaced, so that 1/t is integrated well
    forced = np.mean(-np.log(eps) * ((1 - t) ** length * single + [world.mask_probabilities(one) @ ce for one in t]))
    assert forced - world.nelbo(target) > 0.9 * single * (-np.log(eps) - sum(1 / k for k in range(1, length + 1)))


def test_T08_realised_fraction_shortfall():
    """One target token: every draw costs exactly its cross-entropy. With independent choices half of it is gone."""
    world = tiny.World(V=3, L=1)
    exact = MaskedDiffusion(Absorbing(choice=ExactCount()), weighting=InverseShare())
    batch = world.batch([(2,)] * 50)
    for step in range(3):
        keys = tiny.KEYS.replace(step=jnp.int32(step))
        np.testing.assert_allclose(exact.loss(world.model, batch, keys).loss, world.nll((2,)), rtol=1e-5)
    with pytest.raises(ConfigError, match="T08"):
        dataclasses.replace(exact, process=Absorbing())
    t, w = tiny.gauss_legendre()
    np.testing.assert_allclose(w @ (t * world.nll((2,))), world.nll((2,)) / 2, err_msg="the refused variant")


def test_T12_discrete_steps_converge_to_continuous_time():
    """D3PM's bound at T steps, enumerated, goes to the integral; weights of one kind need the times of that kind."""
    values = []
    for steps in (1, 4, 64):
        nodes = (np.arange(1, steps + 1) / steps, np.full(steps, 1 / steps))
        objective = dataclasses.replace(MASKED, weighting=Nelbo(steps=steps), time=DiscreteTime(steps))
        for schedule in (Linear(), Cosine()):
            values.append(tiny.expected_loss(WORLD, TARGET, objective, schedule, nodes, steps=steps))
    one_step = -WORLD.log_p(TARGET, np.ones(3, bool)).sum()
    np.testing.assert_allclose(values[:2], one_step, rtol=1e-5)
    gaps = np.abs(np.array(values) - WORLD.nelbo(TARGET)).reshape(3, 2).max(axis=1)
    assert gaps[0] > gaps[1] > gaps[2]
    assert gaps[2] < 0.02 * WORLD.nelbo(TARGET)
    with pytest.raises(ConfigError, match="T12"):
        dataclasses.replace(MASKED, weighting=Nelbo(steps=50))
    with pytest.raises(ConfigError, match="T12"):
        dataclasses.replace(MASKED, time=DiscreteTime(50))


@pytest.mark.thorough
def test_the_auxiliary_loss_of_d3pm_is_the_cross_entropy_of_all_tokens():
    """L_vb + lambda x CE of masked and intact tokens, over all masks and steps; the bound knows nothing of it."""
    steps, share = 4, 0.7
    plain = dataclasses.replace(MASKED, weighting=Nelbo(steps=steps), time=DiscreteTime(steps))
    both = dataclasses.replace(plain, auxiliary=share)
    nodes = (np.arange(1, steps + 1) / steps, np.full(steps, 1 / steps))
    losses = [tiny.expected_loss(WORLD, TARGET, one, Linear(), nodes, steps=steps) for one in (plain, both)]
    everything = masked = 0.0
    for t, weight in zip(*nodes, strict=True):
        for mask, probability in zip(WORLD.masks, WORLD.mask_probabilities(t), strict=True):
            nll = -WORLD.log_p(TARGET, mask)
            everything += weight * probability * nll.sum()
            masked += weight * probability * nll[mask].sum()
    np.testing.assert_allclose(losses[1] - losses[0], share * everything, rtol=1e-4)
    assert everything > 1.2 * masked, "intact tokens have a share in it"
    batch = WORLD.batch([TARGET] * 3)
    terms = [one.loss(WORLD.model, batch, tiny.KEYS) for one in (plain, both)]
    assert terms[1].loss_sum > terms[0].loss_sum
    jax.tree.map(np.testing.assert_array_equal, terms[1].metrics, terms[0].metrics)
    bounds = [one.bound(WORLD.model, batch, tiny.KEYS) for one in (plain, both)]
    jax.tree.map(np.testing.assert_array_equal, bounds[1], bounds[0])
    with pytest.raises(ConfigError, match="auxiliary"):
        dataclasses.replace(plain, auxiliary=-0.1)


@pytest.mark.parametrize("shifted", [False, True])
def test_T20_the_bound_reads_the_slots_that_predict(shifted):
    """`bound` of a hand-made model is the enumerated NELBO under its own alignment, and not under the other one."""
    world = tiny.World(V=3, L=2, shifted=shifted, seed=2)
    target, draws = (1, 2), 10_000
    batch = world.batch([target] * draws)
    mine = dataclasses.replace(MASKED, alignment=Shifted() if shifted else MASKED.alignment)
    other = dataclasses.replace(mine, alignment=MASKED.alignment if shifted else Shifted())
    assert mine.bound_kind == "nelbo"
    right, wrong = (
        float(jax.jit(lambda batch, one=one: one.bound(world.model, batch, tiny.KEYS).loss)(batch)) * world.L
        for one in (mine, other)
    )
    exact = world.nelbo(target)
    assert abs(right - exact) < 0.02
    assert abs(wrong - exact) > 0.1


def test_the_loss_as_it_is_drawn_has_the_expected_value():
    """Real draws of t and of masks, with both kinds of choice and with discrete and spread times."""
    draws, expected = 20_000, WORLD.nelbo(TARGET)
    batch = WORLD.batch([TARGET] * draws, times=(np.arange(draws) / draws).astype(np.float32))
    exact = Absorbing(choice=ExactCount())
    for objective, tolerance in (
        (dataclasses.replace(MASKED, time=UniformTime(low=1e-3, stratified=True)), 0.12),
        (dataclasses.replace(MASKED, process=Absorbing(Cosine())), 0.15),
        (dataclasses.replace(MASKED, process=exact, weighting=InverseShare()), 0.03),
    ):
        loss = jax.jit(lambda batch, one=objective: one.loss(WORLD.model, batch, tiny.KEYS).loss)(batch)
        assert abs(float(loss) * WORLD.L - expected) < tolerance


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({}, "nelbo"),
        ({"weighting": InverseRate(), "normaliser": "replaced", "alignment": Shifted()}, "nelbo"),
        ({"evaluation_draws": 1}, "nelbo"),
    ],
)
def test_what_is_called_a_bound_is_one_whatever_the_training_loss(changes, kind):
    objective = dataclasses.replace(MASKED, **changes)
    assert objective.bound_kind == kind
    with pytest.raises(ConfigError, match="InverseRate"):
        MaskedDiffusion(process=Uniform())
    assert Rdm().bound_kind == "pseudo", "EOS costs nothing"


def test_the_bound_does_not_depend_on_how_the_network_is_trained():
    batch = WORLD.batch([TARGET] * 6)
    trained = dataclasses.replace(
        MASKED, process=Absorbing(Cosine()), weighting=InverseRate(), normaliser="replaced", auxiliary=1.0
    )
    left, right = (
        jax.jit(lambda batch, one=one: one.bound(WORLD.model, batch, tiny.KEYS))(batch) for one in (MASKED, trained)
    )
    jax.tree.map(np.testing.assert_array_equal, left, right)
