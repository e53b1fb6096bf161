"""A draw is a function of seed, step, stream, example and position: of nothing else, and of each of these."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_lm.core.rng import StreamKeys, example_number, fold_in_each, stream_number

IDS = jnp.asarray([[7, 7, 9], [11, 12, 12]], jnp.uint32)
POSITIONS = jnp.asarray([[0, 1, 0], [0, 0, 1]], jnp.int32)
KEYS = StreamKeys.create(3, 5)


def test_T26_a_token_draws_the_same_in_every_batch():
    whole = KEYS.token_uniform("noise", IDS, POSITIONS)
    row = KEYS.token_uniform("noise", IDS[1:], POSITIONS[1:])
    np.testing.assert_array_equal(whole[1:], row)
    moved = KEYS.token_uniform("noise", IDS[::-1, ::-1], POSITIONS[::-1, ::-1])
    np.testing.assert_array_equal(whole, moved[::-1, ::-1])


@pytest.mark.parametrize(
    ("keys", "stream"),
    [(StreamKeys.create(4, 5), "noise"), (StreamKeys.create(3, 6), "noise"), (KEYS, "dropout")],
    ids=["seed", "step", "stream"],
)
def test_seed_step_and_stream_change_every_draw(keys, stream):
    other, draws = keys.token_uniform(stream, IDS, POSITIONS), KEYS.token_uniform("noise", IDS, POSITIONS)
    assert not np.any(np.asarray(other == draws))


def test_tokens_draw_apart_and_examples_draw_once():
    assert len(np.unique(KEYS.token_uniform("noise", IDS, POSITIONS))) == IDS.size
    per_example = np.asarray(KEYS.example_uniform("time", IDS))
    assert per_example[0, 0] == per_example[0, 1] != per_example[0, 2]


def test_draws_are_uniform():
    ids = jnp.arange(20_000, dtype=jnp.uint32)[None]
    draws = np.asarray(KEYS.token_uniform("noise", ids, jnp.zeros_like(ids)))
    counts, _ = np.histogram(draws, bins=20, range=(0, 1))
    assert counts.sum() == draws.size
    assert ((counts - 1000) ** 2 / 1000).sum() < 43.8  # chi-square with 19 degrees of freedom, p = 0.001


def test_jit_changes_nothing():
    jitted = jax.jit(lambda keys: keys.token_uniform("noise", IDS, POSITIONS))(KEYS)
    np.testing.assert_array_equal(jitted, KEYS.token_uniform("noise", IDS, POSITIONS))


def test_numbers_of_names_are_stable_across_processes():
    """Recorded values: if one changes, noise and data order of every earlier run change with it."""
    assert stream_number("noise") == 2108266025
    assert example_number("task/train/17") == 1194213899


def test_fold_in_each_fans_out_a_single_key():
    key = jax.random.key(0)
    one = fold_in_each(key, jnp.asarray([4, 5]))
    many = fold_in_each(jnp.stack([key, key]), jnp.asarray([4, 5]))
    np.testing.assert_array_equal(jax.random.key_data(one), jax.random.key_data(many))
