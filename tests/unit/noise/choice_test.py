"""Which tokens are chosen, and what a mixture makes of them."""

import dataclasses

import jax.numpy as jnp
import model_stubs as stubs
import numpy as np
import pytest

from diffusion_lm.core.errors import ConfigError
from diffusion_lm.core.rng import StreamKeys
from diffusion_lm.noise.choice import Bernoulli, ExactCount
from diffusion_lm.noise.process import Absorbing, MaskAndReplace
from diffusion_lm.noise.time_sampling import DiscreteTime, FixedTime
from diffusion_lm.noise.weighting import Cart

KEYS = StreamKeys.create(0, 5)
MASK = stubs.SPECIAL.mask


def masked(batch, rate, choice, keys=KEYS):
    rate_BT = jnp.broadcast_to(jnp.float32(rate), batch.tokens.shape)
    noisy = Absorbing(choice=choice).corrupt(keys, batch, rate_BT, vocab_size=stubs.VOCAB)
    return np.asarray(noisy.replaced)


@pytest.mark.parametrize(("rate", "count"), [(0.0, 0), (1e-6, 1), (0.1, 1), (0.3, 3), (0.301, 4), (0.7, 7), (1.0, 10)])
def test_an_exact_count_is_exact_for_every_row(rate, count):
    batch = stubs.make_batch([2] * 30, [10] * 30, 13)
    chosen = masked(batch, rate, ExactCount())
    assert (chosen.sum(axis=1) == count).all()
    assert not (chosen & ~np.asarray(batch.target_mask)).any()


def test_an_exact_count_has_no_favourite_tokens():
    chosen = masked(stubs.make_batch([2] * 3000, [6] * 3000, 9), 0.5, ExactCount())[:, 2:8]
    assert np.abs(chosen.mean(axis=0) - 0.5).max() < 4 * (0.25 / 3000) ** 0.5
    together = (chosen[:, 0] & chosen[:, 1]).mean()
    assert abs(together - 0.2) < 4 * (0.16 / 3000) ** 0.5, "3 of 6: both of two with probability 1/5, not 1/4"


def test_an_exact_count_is_one_of_each_packed_example_and_grows_with_the_rate():
    batch = stubs.make_batch([2, 3, 4], [5, 4, 8], 12)
    rows = masked(batch, 0.5, ExactCount())
    np.testing.assert_array_equal(rows.sum(axis=1), [3, 2, 4])
    packed = masked(stubs.packed(batch), 0.5, ExactCount())
    np.testing.assert_array_equal(packed[0], rows[np.asarray(batch.segment_ids) > 0])
    more = masked(batch, 0.8, ExactCount())
    assert (rows <= more).all()


@pytest.mark.parametrize("packed", [False, True])
def test_the_filler_behind_a_target_is_masked_as_a_whole(packed):
    batch = stubs.make_batch([2] * 60, [10] * 60, 14, filler=4)
    eos = jnp.where(batch.target_mask & (batch.tokens == stubs.PAD), stubs.EOS, batch.tokens)
    batch = batch.replace(tokens=eos.at[:, 3].set(stubs.EOS))
    if packed:
        batch = stubs.packed(batch)
    chosen = masked(batch, 0.5, Bernoulli(joint_tail="eos"))
    windows = chosen[np.asarray(batch.target_mask)].reshape(60, 10)
    tails, bodies = windows[:, 5:], windows[:, :5]
    assert (tails == tails[:, :1]).all()
    assert 0.25 < tails[:, 0].mean() < 0.75
    assert 0.1 < (bodies[:, 1] != tails[:, 0]).mean() < 0.9, "an EOS inside the content is no tail"
    np.testing.assert_array_equal(masked(batch, 1.0, Bernoulli(joint_tail="eos")), batch.target_mask)


def test_a_mixture_is_mask_or_a_random_token():
    batch = stubs.make_batch([2] * 400, [10] * 400, 13)
    rate = jnp.full(batch.tokens.shape, 0.5)
    noisy = MaskAndReplace(p_uniform=0.3).corrupt(KEYS, batch, rate, vocab_size=stubs.VOCAB)
    replaced, tokens = np.asarray(noisy.replaced), np.asarray(noisy.tokens)
    np.testing.assert_array_equal(tokens[~replaced], np.asarray(batch.tokens)[~replaced])
    np.testing.assert_array_equal(replaced, masked(batch, 0.5, Bernoulli()), "all kinds of noise choose alike")
    random = tokens[replaced & (tokens != MASK)]
    assert abs(len(random) / replaced.sum() - 0.3) < 4 * (0.21 / replaced.sum()) ** 0.5
    assert len(np.unique(random)) == stubs.VOCAB - 1
    mixed = MaskAndReplace(p_uniform=0.0).corrupt(KEYS, batch, rate, vocab_size=stubs.VOCAB)
    only_mask = Absorbing().corrupt(KEYS, batch, rate, vocab_size=stubs.VOCAB)
    np.testing.assert_array_equal(mixed.tokens, only_mask.tokens)


def test_berts_noise_is_eight_parts_mask_one_random_and_one_untouched():
    batch = stubs.make_batch([2] * 600, [10] * 600, 13)
    clean = np.asarray(batch.tokens)
    rate = jnp.full(batch.tokens.shape, 0.5)
    noisy = MaskAndReplace(p_uniform=0.1, p_keep=0.1).corrupt(KEYS, batch, rate, vocab_size=stubs.VOCAB)
    replaced, tokens = np.asarray(noisy.replaced), np.asarray(noisy.tokens)
    chosen = replaced.sum()
    error = 4 * (0.09 / chosen) ** 0.5
    assert abs((tokens == MASK)[replaced].mean() - 0.8) < 4 * (0.16 / chosen) ** 0.5
    assert abs((tokens == clean)[replaced].mean() - (0.1 + 0.1 / stubs.VOCAB)) < error
    without = MaskAndReplace(p_uniform=0.1).corrupt(KEYS, batch, rate, vocab_size=stubs.VOCAB)
    assert (np.asarray(without.tokens) == clean)[replaced].mean() < 0.03


def test_random_tokens_of_a_mixture_are_never_mask_and_all_others_alike():
    """A corrected token is never MASK, so MASK in its place would be noise of the other kind."""
    batch = stubs.make_batch([2] * 400, [10] * 400, 13)
    mixture = MaskAndReplace(p_uniform=1.0)
    noisy = mixture.corrupt(KEYS, batch, jnp.ones(batch.tokens.shape), vocab_size=stubs.VOCAB)
    counts = np.bincount(np.asarray(noisy.tokens)[np.asarray(noisy.replaced)], minlength=stubs.VOCAB)
    assert counts[MASK] == 0
    others, expected = np.delete(counts, MASK), 4000 / (stubs.VOCAB - 1)
    assert np.abs(others - expected).max() < 5 * expected**0.5
    for mask in (0, stubs.VOCAB - 1):
        other = batch.replace(special=dataclasses.replace(stubs.SPECIAL, mask_id=mask))
        noisy = mixture.corrupt(KEYS, other, jnp.ones(batch.tokens.shape), vocab_size=stubs.VOCAB)
        tokens = np.asarray(noisy.tokens)[np.asarray(noisy.replaced)]
        assert (tokens.min(), tokens.max()) == ((1, stubs.VOCAB - 1) if mask == 0 else (0, stubs.VOCAB - 2))


def test_a_fixed_time_is_the_same_for_all():
    ids = jnp.arange(12, dtype=jnp.uint32).reshape(3, 4)
    np.testing.assert_array_equal(FixedTime(0.15).draw(KEYS, ids), np.full((3, 4), 0.15, np.float32))


@pytest.mark.parametrize(
    "build",
    [
        lambda: FixedTime(0.0),
        lambda: MaskAndReplace(p_uniform=0.6, p_keep=0.5),
        lambda: MaskAndReplace(p_uniform=1.5),
        lambda: DiscreteTime(0),
        lambda: Cart(0.0),
        lambda: Cart(1.0),
    ],
)
def test_impossible_settings_are_errors(build):
    with pytest.raises(ConfigError):
        build()
