"""One update: microbatches, denominators, noise, empty batches, moving average, sharing of compiled programs."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training_stubs import AUTOREGRESSIVE, DIFFUSION, ONE_DEVICE, RaggedRows, nano

from diffusion_lm.architectures.base import BoundModel
from diffusion_lm.core.errors import ConfigError
from diffusion_lm.core.rng import StreamKeys
from diffusion_lm.core.types import LossTerms
from diffusion_lm.noise.weighting import Flat
from diffusion_lm.objectives.autoregressive import Autoregressive
from diffusion_lm.objectives.masked_diffusion import MaskedDiffusion
from diffusion_lm.objectives.mixture import ConstantFactor, Mixture, RampFactor
from diffusion_lm.objectives.objective import Needs
from diffusion_lm.parallel.rules import LogicalRules
from diffusion_lm.training.optimizers import Adafactor, AdamW
from diffusion_lm.training.schedules import Constant, Cosine
from diffusion_lm.training.step import TrainStep, ramped_decay

OBJECTIVES = pytest.mark.parametrize(
    "objective", [pytest.param(AUTOREGRESSIVE, marks=pytest.mark.thorough), DIFFUSION], ids=["ar", "diffusion"]
)
RATE = np.float32(1.0)


class PlainGradient:
    """An optimizer whose direction is the gradient itself, so that one step at rate 1 shows it."""

    schedule = Constant(1.0)

    def transformation(self, axes):
        import optax

        return optax.identity()


@dataclasses.dataclass(frozen=True)
class Sgd:
    """As above, configurable as an optimizer."""

    schedule: object = Constant(1.0)

    def transformation(self, axes):
        return PlainGradient().transformation(axes)


def _train_step(objective=AUTOREGRESSIVE, optimizer=Sgd(), model=None, **settings):
    return TrainStep(model or nano(), objective, optimizer, ONE_DEVICE, LogicalRules(), **settings).shared()


def _gradient(objective, batch, seed=0, model=None, **settings):
    """Returns (gradient, StepStats) of one step from fixed parameters."""
    train_step = _train_step(objective, model=model, **settings)
    state = train_step.init(jax.random.key(7))
    before = jax.tree.map(np.asarray, state.params)
    after, stats = train_step(state, batch, jax.random.key(seed), RATE)
    return jax.tree.map(lambda a, b: a - np.asarray(b), before, after.params), jax.device_get(stats)


def _assert_same(a, b, atol=1e-6):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, atol=atol)


@OBJECTIVES
def test_T10_local_denominator(objective):
    """Ragged rows: four microbatches give the gradient of the whole batch. A mean of four means would not."""
    batch = RaggedRows().batch(0, 8)
    whole, stats = _gradient(objective, batch)
    split, split_stats = _gradient(objective, batch, microbatches=4)
    _assert_same(whole, split)
    np.testing.assert_allclose(split_stats.terms.loss, stats.terms.loss, rtol=1e-6)
    assert split_stats.terms.weight == stats.terms.weight == batch.loss_weights.sum()
    assert set(split_stats.terms.metrics) == set(stats.terms.metrics) != set()
    weights = batch.loss_weights.reshape(2, 4, -1).sum((0, 2))
    assert weights.max() > 1.2 * weights.min(), "the microbatches must be ragged for this test to mean something"


@OBJECTIVES
def test_gradient_is_the_quotient_of_the_sums(objective):
    batch, model = RaggedRows().batch(0, 4), nano()
    params = model.init(jax.random.key(7))

    def loss(params):
        terms = objective.loss(BoundModel(model, params), batch, StreamKeys.create(0), train=True)
        return terms.loss_sum / batch.loss_weights.sum()

    got, stats = _gradient(objective, batch)
    expected = jax.jit(jax.grad(loss))(params)
    _assert_same(got, expected)
    norm = np.sqrt(sum(float(jnp.sum(g**2)) for g in jax.tree.leaves(expected)))
    np.testing.assert_allclose(stats.grad_norm, norm, rtol=1e-4)
    assert stats.tokens == (batch.segment_ids > 0).sum()


def test_T26_same_key_every_microbatch():
    """With dropout too, four microbatches see the noise of the whole batch, not one noise four times."""
    batch, model = RaggedRows().batch(0, 8), nano(dropout_rate=0.2, attention_dropout_rate=0.2)
    whole, stats = _gradient(DIFFUSION, batch, model=model)
    split, split_stats = _gradient(DIFFUSION, batch, model=model, microbatches=4)
    _assert_same(whole, split)
    np.testing.assert_allclose(split_stats.terms.loss, stats.terms.loss, rtol=1e-6)


MIXED = Mixture(
    ("diffusion", "autoregressive"),
    (MaskedDiffusion(weighting=Flat(), normaliser="replaced"), Autoregressive()),
    (ConstantFactor(1.0), RampFactor(0.0, 1.0, 0, 2)),
    "diffusion",
)


def test_parts_of_a_mixture_are_divided_by_their_own_global_weights():
    """Over four ragged microbatches, with dropout: the gradient of the sum of the two quotients of the whole batch."""
    batch, model = RaggedRows(mask_id=3).batch(0, 8), nano(dropout_rate=0.2, num_layers=1, scan_layers=False)
    at_step_one = StreamKeys(root=jax.random.key(0), step=jnp.int32(1))

    def loss(params):
        terms = MIXED.loss(BoundModel(model, params), batch, at_step_one, train=True)
        ((total, weight),) = [(other.total, other.weight) for other in terms.others]
        return terms.loss_sum / terms.weight + total / weight

    train_step = _train_step(MIXED, model=model, microbatches=4)
    state = train_step.init(jax.random.key(7))
    state = state.replace(step=jax.device_put(jnp.int32(1), state.step.sharding))
    before = jax.tree.map(np.asarray, state.params)
    value, gradient = jax.jit(jax.value_and_grad(loss))(before)
    after, stats = train_step(state, batch, jax.random.key(0), RATE)
    np.testing.assert_allclose(stats.terms.loss, value, rtol=1e-5)
    _assert_same(jax.tree.map(lambda a, b: a - np.asarray(b), before, after.params), gradient)


@pytest.mark.thorough
def test_the_weights_of_a_mixture_cost_no_forward_pass():
    """They are summed before the backward pass; what of the loss they do not need is not computed."""
    batch, model = RaggedRows(mask_id=3).batch(0, 8), nano()

    def flops(objective):
        train_step = _train_step(objective, model=model, microbatches=2)
        state = jax.eval_shape(train_step.init, jax.random.key(0))
        return train_step.compiled.lower(state, batch, jax.random.key(0), RATE).compile().cost_analysis()["flops"]

    parts = [flops(part) for part in MIXED.parts]
    assert flops(MIXED) < 1.05 * sum(parts)


def test_parts_that_an_objective_does_not_announce_are_an_error():
    @dataclasses.dataclass(frozen=True)
    class Silent(Mixture):
        def needs(self) -> Needs:
            return dataclasses.replace(super().needs(), several_weights=False)

    silent = Silent(MIXED.names, MIXED.parts, MIXED.weights, MIXED.primary)
    train_step = _train_step(silent)
    batch = RaggedRows(mask_id=3).batch(0, 4)
    with pytest.raises(ConfigError, match="several_weights"):
        jax.eval_shape(train_step.compiled, train_step.abstract_state, batch, jax.random.key(0), RATE)


def test_noise_is_fresh_at_every_step_and_seed():
    batch, train_step = RaggedRows().batch(0, 4), _train_step(DIFFUSION)
    losses = []
    for seed, step in [(0, 0), (0, 0), (0, 1), (1, 0)]:
        state = train_step.init(jax.random.key(7))
        state = state.replace(step=jax.device_put(jnp.int32(step), state.step.sharding))
        _, stats = train_step(state, batch, jax.random.key(seed), RATE)
        losses.append(float(stats.terms.loss))
    assert losses[0] == losses[1]
    assert len(set(losses)) == 3


@pytest.mark.parametrize(("optimizer", "microbatches"), [(AdamW(), 1), (Adafactor(), 2)], ids=["adamw", "adafactor"])
def test_T15_nothing_scored(optimizer, microbatches):
    """A batch without a scored token: loss 0, finite everything, and an update that changes nothing."""
    train_step = _train_step(optimizer=optimizer, microbatches=microbatches, ema_decay=0.9)
    state, _ = train_step(train_step.init(jax.random.key(0)), RaggedRows().batch(0, 4), jax.random.key(0), RATE)
    before = jax.tree.map(np.asarray, state)
    after, stats = train_step(state, RaggedRows(scored=False).batch(1, 4), jax.random.key(0), RATE)
    assert float(stats.terms.loss) == 0.0
    assert float(stats.grad_norm) == 0.0
    assert int(after.step) == int(before.step) + 1
    for old, new in zip(jax.tree.leaves(before.replace(step=0)), jax.tree.leaves(after.replace(step=0)), strict=True):
        np.testing.assert_array_equal(old, new)


@dataclasses.dataclass(frozen=True)
class ZeroOverZero:
    """An objective whose gradient is NaN where nothing is scored."""

    def needs(self) -> Needs:
        return Needs(visibility="full")

    def loss(self, model, batch, keys, *, train=True) -> LossTerms:
        weight = jnp.sum(batch.loss_weights)
        return LossTerms(jnp.sqrt(weight * jnp.sum(model.params["final_norm"]["scale"])), weight)


def test_T15_a_nan_gradient_of_an_empty_batch_does_not_reach_the_parameters():
    train_step = _train_step(ZeroOverZero(), AdamW())
    state = train_step.init(jax.random.key(0))
    state, _ = train_step(state, RaggedRows(scored=False).batch(0, 4), jax.random.key(0), RATE)
    assert all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize("limit", [0.9, 0.15])
def test_ema_follows_its_closed_form(limit):
    """The decay grows as (1 + n)/(10 + n) up to its limit: 0.1, 0.18, 0.25 where that is 0.9."""
    train_step = _train_step(optimizer=AdamW(), ema_decay=limit)
    state = train_step.init(jax.random.key(0))
    expected = np.asarray(state.params["final_norm"]["scale"])
    for step, ramp in enumerate((1 / 10, 2 / 11, 3 / 12)):
        decay = min(limit, ramp)
        state, _ = train_step(state, RaggedRows().batch(step, 4), jax.random.key(0), np.float32(0.1))
        expected = decay * expected + (1 - decay) * np.asarray(state.params["final_norm"]["scale"])
        np.testing.assert_allclose(state.ema["final_norm"]["scale"], expected, rtol=1e-6)
    assert state.final_params is state.ema
    assert not np.allclose(expected, state.params["final_norm"]["scale"])


def test_the_average_forgets_the_parameters_that_it_started_from():
    """At decay 0.9999 a constant decay leaves 99 % of them after 100 updates; the ramp leaves 9!/(101 ... 109)."""
    remaining = np.prod([float(ramped_decay(0.9999, jnp.int32(n))) for n in range(100)])
    exact = math.factorial(9) / np.prod(np.arange(101.0, 110.0))
    np.testing.assert_allclose(remaining, exact, rtol=1e-4)
    assert remaining < 1e-12
    assert ramped_decay(0.9999, jnp.int32(10**6)) == np.float32(0.9999)


def test_a_resumed_average_is_that_of_the_undisturbed_run():
    """The decay is a function of the step, which checkpoints hold."""
    train_step = _train_step(optimizer=AdamW(), ema_decay=0.9)

    def after(state, first, last):
        for step in range(first, last):
            state, _ = train_step(state, RaggedRows().batch(step, 4), jax.random.key(0), RATE)
        return jax.tree.map(np.asarray, state)

    whole = after(train_step.init(jax.random.key(0)), 0, 4)
    half = after(train_step.init(jax.random.key(0)), 0, 2)
    resumed = after(jax.device_put(half, train_step.state_shardings), 2, 4)
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)
    restarted = after(jax.device_put(half.replace(step=np.int32(0)), train_step.state_shardings), 2, 4)
    assert not np.array_equal(restarted.ema["final_norm"]["scale"], whole.ema["final_norm"]["scale"])


def test_adopted_parameters_survive_the_donation_of_the_state():
    train_step = _train_step(optimizer=AdamW(), ema_decay=0.9)
    given = nano().init(jax.random.key(3))
    state, _ = train_step(train_step.adopt(given), RaggedRows().batch(0, 4), jax.random.key(0), RATE)
    assert all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(given))
    assert int(state.step) == 1


def test_the_state_is_donated():
    train_step = _train_step(optimizer=AdamW(), ema_decay=0.9)
    state = train_step.init(jax.random.key(0))
    leaf = state.params["embed"]["tokens"]
    train_step(state, RaggedRows().batch(0, 4), jax.random.key(0), RATE)
    assert leaf.is_deleted()


def test_runs_that_differ_in_schedule_or_seed_share_one_compiled_step():
    one = _train_step(optimizer=AdamW(schedule=Cosine(peak=1e-3)), ema_decay=0.9)
    other = _train_step(model=nano(), optimizer=AdamW(schedule=Constant(peak=2e-3)), ema_decay=0.9)
    assert one is other
    assert _train_step(optimizer=AdamW(b1=0.8), ema_decay=0.9) is not one
    before = one.compiled._cache_size()
    for seed, rate in [(0, 1e-3), (1, 2e-3), (2, 3e-3)]:
        one(one.init(jax.random.key(seed)), RaggedRows().batch(seed, 4), jax.random.key(seed), np.float32(rate))
    assert one.compiled._cache_size() <= before + 1


def test_the_learning_rate_scales_the_update():
    batch, train_step = RaggedRows().batch(0, 4), _train_step()
    moved = []
    for rate in (0.5, 1.0):
        state = train_step.init(jax.random.key(7))
        before = np.asarray(state.params["final_norm"]["scale"])
        after, _ = train_step(state, batch, jax.random.key(0), np.float32(rate))
        moved.append(np.asarray(after.params["final_norm"]["scale"]) - before)
    np.testing.assert_allclose(2 * moved[0], moved[1], atol=1e-6)


def test_the_step_is_pure():
    assert TrainStep.update.__closure__ is None
