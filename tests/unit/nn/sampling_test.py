import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from diffusion_lm.nn.sampling import draw, filter_logits, most_likely


def _draws(logits, count, seed=0):
    keys = jax.random.split(jax.random.key(seed), count)
    return np.asarray(jax.jit(lambda keys: draw(keys, jnp.broadcast_to(logits, (count, logits.shape[0]))))(keys))


def test_T01_tail_of_half_the_mass_is_drawn_exactly():
    """One token of mass 0.5, and a tail of 8191 tokens with the other half, log-uniform over 9 orders of magnitude."""
    vocab, count, bins = 8192, 20_000, 64
    tail = 10 ** np.random.default_rng(0).uniform(-9, 0, vocab - 1)
    p = np.concatenate([[0.5], 0.5 * tail / tail.sum()])
    draws = _draws(jnp.log(jnp.asarray(p, jnp.float32)), count)
    np.testing.assert_allclose((draws == 0).mean(), 0.5, atol=0.015)
    order = np.argsort(p[1:]) + 1
    groups = np.array_split(order[np.argsort(np.arange(vocab - 1) % bins)], bins)
    observed = [np.isin(draws, group).sum() for group in groups] + [(draws == 0).sum()]
    expected = np.array([p[group].sum() for group in groups] + [p[0]]) * count
    assert scipy.stats.chisquare(observed, expected * sum(observed) / expected.sum()).pvalue > 1e-3


def test_T01_every_tail_token_keeps_its_share_of_the_uniforms(monkeypatch):
    """8064 tokens of 1e-8 behind one of mass 1: float32 Gumbel noise, at most 16 against a gap of 18, loses them.

    The uniforms travel in the bits of the keys, so all values of the float32 grid below 1 are tried, not sampled.
    """
    vocab, block, grid, tried = 8192, 128, 2.0**-23, 1000
    monkeypatch.setattr(
        jax.random, "uniform", lambda key, shape: jax.lax.bitcast_convert_type(jax.random.key_data(key), jnp.float32)
    )
    first = 1 - grid * np.arange(1, tried + 1)
    second = np.tile([0.0, 0.25, 0.5, 1 - grid], tried // 4)
    bits = np.stack([first, second], axis=-1).astype(np.float32).view(np.uint32)
    logits = jnp.full(vocab, np.log(1e-8), jnp.float32).at[0].set(0.0)
    draws = np.asarray(draw(jax.random.wrap_key_data(bits), jnp.broadcast_to(logits, (tried, vocab))))
    per_block = np.bincount(draws // block, minlength=vocab // block)[1:]
    np.testing.assert_allclose(per_block.sum(), (vocab - block) * 1e-8 / grid, rtol=0.02)
    np.testing.assert_allclose(per_block, block * 1e-8 / grid, atol=2.5)
    tail = draws >= block
    np.testing.assert_allclose(draws[tail] % block, (second[tail] * block).astype(int), atol=1)


def test_T05_removed_tokens_are_never_drawn():
    logits = jnp.full(300, -jnp.inf).at[jnp.array([0, 17, 299])].set(0.0)
    draws = _draws(logits, 3000)
    values, counts = np.unique(draws, return_counts=True)
    assert values.tolist() == [0, 17, 299]
    assert scipy.stats.chisquare(counts).pvalue > 1e-3


def test_T40_draws_do_not_depend_on_neighbours():
    logits = jax.random.normal(jax.random.key(0), (2, 5, 33))
    keys = jax.random.split(jax.random.key(1), (2, 5))
    whole = draw(keys, logits)
    assert draw(keys[1:, 2:4], logits[1:, 2:4]).tolist() == whole[1:, 2:4].tolist()


@pytest.mark.parametrize("temperature", [1e-3, 1e-6, 1e-30])
def test_T50_temperature_to_zero_is_greedy(temperature):
    logits = 5 * jax.random.normal(jax.random.key(0), (200, 500))
    keys = jax.random.split(jax.random.key(1), 200)
    assert (draw(keys, filter_logits(logits, temperature)) == logits.argmax(-1)).all()


def test_T50_filters():
    logits = jnp.log(jnp.array([0.1, 0.4, 0.05, 0.3, 0.15]))
    identity = filter_logits(logits, 1.0, 0, 1.0)
    np.testing.assert_allclose(jax.nn.softmax(identity), jax.nn.softmax(logits), rtol=1e-6)

    def kept(**filters):
        return np.flatnonzero(np.isfinite(filter_logits(logits, **filters))).tolist()

    assert kept(top_k=2) == [1, 3]
    assert kept(top_p=0.69) == [1, 3]
    assert kept(top_p=0.71) == [1, 3, 4]
    assert kept(top_p=0.0) == [1]
    assert kept(top_k=3, top_p=0.4) == [1], "top-p counts mass among what top-k left"
    assert kept(temperature=0.1, top_p=0.9) == [1], "temperature comes before top-p"


def test_most_likely_is_the_first_argmax():
    logits = jnp.asarray([[0.0, 3.0, 3.0, -1.0], [-jnp.inf, -jnp.inf, -2.0, -3.0], [5.0, 5.0, 5.0, 5.0]])
    np.testing.assert_array_equal(most_likely(logits), [1, 2, 0])
    wide = jax.random.normal(jax.random.key(0), (4, 3, 1000)).round(1)
    np.testing.assert_array_equal(most_likely(wide), np.argmax(wide, axis=-1), "with ties")
    assert most_likely(wide).dtype == jnp.int32
