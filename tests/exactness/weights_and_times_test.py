"""Weights count every token once, times have the law they claim: closed forms, no network."""

import jax
import jax.numpy as jnp
import model_stubs as stubs
import numpy as np
import pytest
import tiny_worlds as tiny

from diffusion_lm.core.rng import StreamKeys
from diffusion_lm.data.rows import strata
from diffusion_lm.noise.schedules import Cosine, Geometric, Linear, LogLinear, Polynomial
from diffusion_lm.noise.time_sampling import DiscreteTime, UniformTime
from diffusion_lm.noise.weighting import Cart, InverseRate, LinearDecay, Nelbo

LEFT_OUT = {Linear(): 0, Cosine(): 0, Polynomial(2.0): 0, Polynomial(0.5): 0, LogLinear(): 1e-3, Geometric(): 1e-4}
"""What a schedule itself leaves of the unit mass: alpha(1), or 1 - alpha(0)."""


def replaced(t):
    return jnp.ones_like(t, bool)


@pytest.mark.parametrize("schedule", LEFT_OUT, ids=repr)
@pytest.mark.parametrize("weighting", [Nelbo(), InverseRate(), Nelbo(steps=10)], ids=repr)
def test_T12_weight_times_mask_rate_integrates_to_one(schedule, weighting):
    """Every token counts one. A forgotten factor pi/2 or a wrong sign of the cosine would not."""
    t, w = tiny.gauss_legendre(400)
    steps = getattr(weighting, "steps", None)
    if steps:
        t, w = np.arange(1, steps + 1) / steps, np.full(steps, 1 / steps)
    t = jnp.asarray(t, jnp.float32)
    weight = weighting.weigh(t, replaced(t), schedule)
    assert (weight >= 0).all()
    # 1 - t^2 is 1 in float32 below t = 2e-4.
    mass = float(jnp.asarray(w, jnp.float32) @ (weight * (1 - schedule.alpha(t))))
    np.testing.assert_allclose(
        mass, 1.0, atol=2e-3 if isinstance(schedule, Polynomial) else 1.5 * LEFT_OUT[schedule] + 2e-5
    )


@pytest.mark.parametrize("weighting", [Nelbo(), InverseRate(), LinearDecay()], ids=repr)
def test_weights_are_finite_at_the_ends_and_zero_on_what_is_kept(weighting):
    t = jnp.asarray([0.0, 1e-7, 1e-4, 1.0], jnp.float32)
    for schedule in LEFT_OUT:
        assert jnp.isfinite(weighting.weigh(t, replaced(t), schedule)).all()
        assert (weighting.weigh(t, ~replaced(t), schedule) == 0).all()


def test_T12_small_t_floor():
    """Times in (eps, 1] with the linear schedule keep the unit mass; what a floor costs under the cosine is known."""
    t, w = tiny.gauss_legendre(60)
    for low, schedule, expected in (
        (1e-3, Linear(), 1.0),
        (0.2, Linear(), 1.0),
        (0.2, Cosine(), float(Cosine().alpha(jnp.float32(0.2))) / 0.8),
    ):
        inside = jnp.asarray(low + (1 - low) * t, jnp.float32)
        mass = float(
            jnp.asarray(w) @ (Nelbo().weigh(inside, replaced(inside), schedule) * (1 - schedule.alpha(inside)))
        )
        np.testing.assert_allclose(mass, expected, rtol=1e-4)
    assert abs(expected - 1) > 0.1, "a floor is not harmless under every schedule"


def test_linear_decay_is_the_papers_sequence():
    t = jnp.arange(1, 6) / 5
    np.testing.assert_allclose(LinearDecay(steps=5).weigh(t, replaced(t), Linear()), [1, 0.8, 0.6, 0.4, 0.2], rtol=1e-6)
    np.testing.assert_allclose(LinearDecay().weigh(t, replaced(t), Linear()), [0.8, 0.6, 0.4, 0.2, 0], atol=1e-6)


def test_cart_is_the_sum_over_known_neighbours_also_in_packed_rows():
    batch = stubs.packed(stubs.make_batch([2, 3], [6, 5], 8))
    segments, p = np.asarray(batch.segment_ids)[0], 0.3
    masked = np.asarray(batch.target_mask)[0] & (np.random.default_rng(0).random(len(segments)) < 0.5)
    expected = np.zeros(len(segments))
    for n in np.flatnonzero(masked):
        for i in np.flatnonzero(~masked & (segments == segments[n])):
            expected[n] += 0.5 * p * (1 - p) ** (abs(n - i) - 1)
    got = Cart(p).weigh(jnp.ones_like(batch.loss_weights), jnp.asarray(masked[None]), Linear(), batch=batch)
    np.testing.assert_allclose(got[0], expected, rtol=1e-5)
    assert expected[masked].max() < 1


def uniform_distance(values):
    """Kolmogorov-Smirnov distance from the uniform law, times sqrt(n); 1.63 at the 1 % level."""
    n = len(values)
    grid = np.arange(n) / n
    return max(np.abs(np.sort(values) - grid).max(), np.abs(np.sort(values) - grid - 1 / n).max()) * n**0.5


@pytest.mark.parametrize("rows", [1, 8])
def test_T13_strata_tied_to_position(rows):
    """Over the steps, the time of every row is uniform; that of a row in a stratum of its own would not be."""
    places = jnp.asarray(strata(np.ones((rows, 1), np.int32), 0, rows))
    ids, sampler, steps = jnp.arange(rows, dtype=jnp.uint32)[:, None], UniformTime(stratified=True), 800

    def at(step):
        return sampler.draw(StreamKeys.create(3).replace(step=step), ids, strata=places)[:, 0]

    times = np.asarray(jax.jit(jax.vmap(at))(jnp.arange(steps)))
    assert all(uniform_distance(times[:, row]) < 1.9 for row in range(rows))
    np.testing.assert_allclose(
        np.sort(times, axis=1) - np.sort(times, axis=1)[:, :1], [np.arange(rows) / rows] * steps, atol=1e-5
    )
    if rows > 1:
        tied = (np.random.default_rng(0).random((steps, rows)) + np.arange(rows)) / rows
        assert uniform_distance(tied[:, 0]) > 10


def test_T24_arange_length():
    """B places for every batch size, one in each stratum, also when each host makes its own slice."""
    for rows in range(1, 2049):
        places = strata(np.ones((rows, 1), np.int32), 0, rows)[:, 0]
        assert places.shape == (rows,)
        np.testing.assert_array_equal(np.floor(places.astype(np.float64) * rows + 0.5), np.arange(rows))
    wrong = [rows for rows in range(1, 2049) if len(np.arange(0, 1, 1 / rows)) != rows]
    assert wrong, "stepping by 1/B overshoots for some B"
    whole = strata(np.ones((12, 1), np.int32), 0, 12)
    parts = [strata(np.ones((3, 1), np.int32), start, 12) for start in range(0, 12, 3)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_T26_T27_spread_times_do_not_depend_on_the_split():
    places = jnp.asarray(strata(np.ones((8, 1), np.int32), 0, 8))
    ids, sampler = jnp.arange(8, dtype=jnp.uint32)[:, None], UniformTime(stratified=True)
    whole = sampler.draw(tiny.KEYS, ids, strata=places)
    order = np.array([5, 2, 7, 0, 1, 3, 4, 6])
    parts = [sampler.draw(tiny.KEYS, ids[rows], strata=places[rows]) for rows in order.reshape(4, 2)]
    np.testing.assert_array_equal(jnp.concatenate(parts), whole[order])
    assert (sampler.draw(tiny.KEYS.replace(step=jnp.int32(9)), ids, strata=places) != whole).all()
    alone = sampler.draw(tiny.KEYS, ids)
    np.testing.assert_array_equal(alone, UniformTime().draw(tiny.KEYS, ids), "without places: independent times")


def test_examples_that_share_a_row_have_times_of_their_own():
    places = strata(np.array([[1, 1, 2, 3, 0]]), 0, 4)[0]
    assert places[0] == places[1] == 0
    assert len(set(places[[0, 2, 3]])) == 3
    assert ((places >= 0) & (places < 1)).all()


@pytest.mark.parametrize("stratified", [False, True])
def test_discrete_times_are_uniform_over_the_steps(stratified):
    rows, steps = 3000, 6
    ids = jnp.arange(rows, dtype=jnp.uint32)[:, None]
    places = jnp.asarray(strata(np.ones((rows, 1), np.int32), 0, rows))
    t = np.asarray(DiscreteTime(steps, stratified=stratified).draw(tiny.KEYS, ids, strata=places))
    counts = np.bincount(np.rint(t[:, 0] * steps).astype(int), minlength=steps + 1)
    assert counts[0] == 0
    assert len(counts) == steps + 1
    assert np.abs(counts[1:] - rows / steps).max() < (3 if stratified else 100)
