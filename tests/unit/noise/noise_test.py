import dataclasses

import jax
import jax.numpy as jnp
import model_stubs as stubs
import numpy as np
import pytest

from diffusion_lm.core.errors import ConfigError
from diffusion_lm.core.rng import StreamKeys
from diffusion_lm.noise.process import Absorbing, Uniform
from diffusion_lm.noise.schedules import Cosine, Geometric, Linear, LogLinear, Polynomial
from diffusion_lm.noise.time_sampling import DiscreteTime, FixedTime, UniformTime
from diffusion_lm.noise.weighting import Flat

KEYS = StreamKeys.create(0, 5)


def many(rows=400, prefix=2, window=10):
    return stubs.make_batch([prefix] * rows, [window] * rows, prefix + window + 1)


def corrupt(batch, rate, keys=KEYS, **fields):
    rate_BT = jnp.broadcast_to(jnp.float32(rate), batch.tokens.shape)
    return Uniform(**fields).corrupt(keys, batch, rate_BT, vocab_size=stubs.VOCAB)


SCHEDULES = (Linear(), Cosine(), Polynomial(2.0), Polynomial(0.5), LogLinear(), Geometric())


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_schedules_fall_from_signal_to_noise_with_the_derivative_they_state(schedule):
    t = jnp.linspace(0.01, 0.99, 50)
    alpha = schedule.alpha(t)
    assert (jnp.diff(alpha) < 0).all()
    assert abs(float(schedule.alpha(jnp.float32(0.0))) - 1) < 2e-4
    assert float(schedule.alpha(jnp.float32(1.0))) < 2e-3
    slope = jax.vmap(jax.grad(lambda t: schedule.alpha(t).sum()))(t)
    np.testing.assert_allclose(schedule.alpha_derivative(t), slope, rtol=1e-4)


def test_schedules_at_a_point():
    """Closed forms, written out: cos(pi/4), sigma = sqrt(1e-4 x 20)."""
    half = jnp.float32(0.5)
    np.testing.assert_allclose(Cosine().alpha(half), 1 - 0.5**0.5, rtol=1e-6)
    np.testing.assert_allclose(Polynomial(3.0).alpha(half), 0.875)
    np.testing.assert_allclose(LogLinear(0.1).alpha(half), 0.55, rtol=1e-6)
    np.testing.assert_allclose(Geometric().alpha(half), np.exp(-(0.002**0.5)), rtol=1e-6)


def test_absorbing_noise_is_mask_and_touches_no_conditioning():
    batch = many()
    rate = jnp.full(batch.tokens.shape, 0.4)
    noisy = Absorbing().corrupt(KEYS, batch, rate, vocab_size=stubs.VOCAB)
    np.testing.assert_array_equal(noisy.tokens, np.where(noisy.replaced, 4, batch.tokens))
    assert not (np.asarray(noisy.replaced) & ~np.asarray(batch.target_mask)).any()
    np.testing.assert_array_equal(noisy.replaced, corrupt(batch, 0.4).replaced, "all kinds of noise choose alike")
    with pytest.raises(ConfigError, match="MASK is token 4, and the model has 4 tokens"):
        Absorbing().corrupt(KEYS, batch, rate, vocab_size=4)
    without = batch.replace(special=dataclasses.replace(stubs.SPECIAL, mask_id=None))
    with pytest.raises(ConfigError, match="no MASK token"):
        Absorbing().corrupt(KEYS, without, rate, vocab_size=stubs.VOCAB)


def test_times_are_uniform_shared_inside_an_example_and_reach_one():
    ids = jnp.broadcast_to(jnp.arange(4000, dtype=jnp.uint32)[:, None], (4000, 3))
    t = np.asarray(UniformTime().draw(KEYS, ids))
    assert (t[:, 0] == t[:, 2]).all()
    assert 0 < t.min() < 0.002
    assert 0.998 < t.max() <= 1
    # Kolmogorov-Smirnov distance from the uniform law, 1.63/sqrt(n) at the 1 % level.
    assert np.abs(np.sort(t[:, 0]) - np.arange(4000) / 4000).max() < 1.63 / 4000**0.5


@pytest.mark.parametrize(
    "build",
    [
        lambda: UniformTime(low=0.5, high=0.5),
        lambda: UniformTime(high=1.5),
        lambda: DiscreteTime(0),
        lambda: FixedTime(0.0),
        lambda: Polynomial(0.0),
        lambda: LogLinear(1.0),
        lambda: Geometric(2.0, 1.0),
    ],
)
def test_impossible_settings_are_errors(build):
    with pytest.raises(ConfigError):
        build()


@pytest.mark.parametrize("time", [UniformTime(0.1, 0.7), DiscreteTime(7), FixedTime(0.15)], ids=repr)
def test_evenly_spaced_times_have_the_law_of_the_drawn_ones(time):
    ids = jnp.arange(2000, dtype=jnp.uint32)[:, None]
    drawn = np.sort(np.asarray(time.draw(KEYS, ids))[:, 0])
    spaced = np.sort(np.asarray(time.at((jnp.arange(2000) + 0.5) / 2000)))
    assert np.abs(drawn - spaced).max() < 1.63 / 2000**0.5 + 1 / 7 * isinstance(time, DiscreteTime)
    np.testing.assert_allclose(drawn.mean(), spaced.mean(), atol=0.02)
    assert spaced.min() > 0


def test_flat_weights_are_one_everywhere():
    t = jnp.array([[0.1, 0.9]])
    np.testing.assert_array_equal(Flat().weigh(t, t > 0.5, Linear()), [[1, 1]])


def test_T34_prompt_must_stay_clean():
    batch = many()
    noisy = corrupt(batch, 1.0)
    conditioning = ~np.asarray(batch.target_mask)
    np.testing.assert_array_equal(np.asarray(noisy.tokens)[conditioning], np.asarray(batch.tokens)[conditioning])
    assert not np.asarray(noisy.replaced)[conditioning].any()
    assert np.asarray(noisy.replaced)[~conditioning].all()


@pytest.mark.parametrize("rate", [0.0, 0.3, 0.8])
def test_tokens_are_chosen_independently_at_the_rate(rate):
    batch = many()
    chosen = np.asarray(corrupt(batch, rate).replaced)[:, 2:12]
    assert abs(chosen.mean() - rate) < 4 * (rate * (1 - rate) / chosen.size) ** 0.5 + 1e-9
    if 0 < rate < 1:
        together = np.mean(chosen[:, 0] & chosen[:, 1])
        assert abs(together - rate**2) < 0.1
        assert chosen.sum(axis=1).std() > 1, "a Bernoulli count varies; an exact count would not"


def test_replacements_are_uniform_over_the_whole_vocabulary():
    tokens = np.asarray(corrupt(many(), 1.0).tokens)[:, 2:12].ravel()
    counts = np.bincount(tokens, minlength=stubs.VOCAB)
    assert len(counts) == stubs.VOCAB
    assert counts.min() > 0, "special tokens are inside the draw"
    chi_square = ((counts - tokens.size / stubs.VOCAB) ** 2 / (tokens.size / stubs.VOCAB)).sum()
    assert chi_square < 72.1, "99.9 % quantile of chi-square with 39 degrees of freedom"


def test_T26_same_key_every_microbatch():
    """Splitting a batch changes no draw, and two rows never share theirs."""
    batch = many(8)
    whole = corrupt(batch, 0.5).tokens
    parts = [corrupt(stubs.rows_of(batch, range(i, i + 2)), 0.5).tokens for i in range(0, 8, 2)]
    np.testing.assert_array_equal(whole, jnp.concatenate(parts))
    replaced = np.asarray(corrupt(batch, 0.5).replaced)[:, 2:12]
    assert len({row.tobytes() for row in replaced}) == 8


def test_T27_noise_depends_on_topology():
    """The noise of an example does not depend on its row, its neighbours or on packing."""
    batch = stubs.make_batch([2, 3, 4], [5, 4, 3], 9)
    noisy = np.asarray(corrupt(batch, 0.5).tokens)
    order = [2, 0, 1]
    np.testing.assert_array_equal(corrupt(stubs.rows_of(batch, order), 0.5).tokens, noisy[order])
    in_one_row = stubs.packed(batch)
    np.testing.assert_array_equal(corrupt(in_one_row, 0.5).tokens[0], noisy[np.asarray(batch.segment_ids) > 0])
    t = UniformTime().draw(KEYS, batch.example_ids)
    np.testing.assert_array_equal(
        UniformTime().draw(KEYS, in_one_row.example_ids)[0], np.asarray(t)[np.asarray(batch.segment_ids) > 0]
    )


def test_T30_frozen_noise_per_example():
    """The same example gets new noise in every step."""
    batch = many(8)
    first, second = corrupt(batch, 0.5), corrupt(batch, 0.5, StreamKeys.create(0, 6))
    assert (np.asarray(first.replaced) != np.asarray(second.replaced)).any(axis=1).all()
    ids = batch.example_ids
    assert (
        np.asarray(UniformTime().draw(KEYS, ids)) != np.asarray(UniformTime().draw(StreamKeys.create(0, 6), ids))
    ).all()
