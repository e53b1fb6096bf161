"""Rows of a vocabulary moved between networks: what is kept says the same before and after."""

import jax
import jax.numpy as jnp
import model_stubs as stubs
import numpy as np
import pytest

from diffusion_lm.architectures.base import BoundModel
from diffusion_lm.architectures.exponents import PART, WithTokenSchedules
from diffusion_lm.architectures.surgery import move_rows, move_vocabulary, vocabulary_rows
from diffusion_lm.core.errors import ConfigError
from diffusion_lm.nn.masks import Full

FULL, KEPT = 60, (0, 1, 2, 57, 5, 9, 11, 30, 31, 32, 50)


def networks(tied):
    fields = dict(tied_embeddings=tied, vocab_multiple=8)
    return stubs.nano(vocab_size=FULL, **fields).architecture, stubs.nano(vocab_size=len(KEPT), **fields).architecture


def logits(architecture, params, tokens):
    model = BoundModel(architecture, params)
    slots = dict(visibility=Full(), positions=jnp.arange(tokens.shape[1])[None], segment_ids=jnp.ones_like(tokens))
    return model.logits(model(tokens, **slots))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_logits_of_kept_tokens_are_those_of_the_whole_network(tied):
    whole, small = networks(tied)
    params = whole.init(jax.random.key(0))
    rows = vocabulary_rows(range(FULL), KEPT)
    pruned = move_vocabulary(params, small.init(jax.random.key(1)), small.logical_axes(), rows)
    new = jnp.array([[5, 3, 0, 10, 7, 6]])
    expected = logits(whole, params, jnp.asarray(KEPT)[new])[..., np.asarray(KEPT)]
    got = logits(small, pruned, new)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    # Up to the softmax over fewer ids: the odds of two tokens do not change.
    odds = jax.nn.log_softmax(got)[..., 4] - jax.nn.log_softmax(got)[..., 8]
    np.testing.assert_allclose(odds, expected[..., 4] - expected[..., 8], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_full_vocabulary_can_be_restored(tied):
    whole, small = networks(tied)
    params = whole.init(jax.random.key(0))
    fresh = small.init(jax.random.key(1))
    pruned = move_vocabulary(params, fresh, small.logical_axes(), vocabulary_rows(range(FULL), KEPT))
    tuned = jax.tree.map(lambda leaf: leaf + 1, pruned)
    back = move_vocabulary(tuned, params, whole.logical_axes(), vocabulary_rows(KEPT, range(FULL)))
    cut = np.setdiff1d(np.arange(FULL), KEPT)
    for name in ("embed", "head")[: 1 if tied else 2]:
        np.testing.assert_array_equal(back[name]["tokens"][np.asarray(KEPT)], tuned[name]["tokens"][: len(KEPT)])
        np.testing.assert_array_equal(back[name]["tokens"][cut], params[name]["tokens"][cut])
    np.testing.assert_array_equal(back["final_norm"]["scale"], tuned["final_norm"]["scale"])


def test_a_vector_a_token_moves_too():
    """A head's bias, or the exponents of learned schedules: whatever has the axis."""
    whole, small = (WithTokenSchedules(one) for one in networks(True))
    params = whole.init(jax.random.key(0))
    params[PART] = {"raw": jnp.arange(params[PART]["raw"].shape[0], dtype=jnp.float32)}
    rows = vocabulary_rows(range(FULL), KEPT)
    got = move_vocabulary(params, small.init(jax.random.key(1)), small.logical_axes(), rows)
    np.testing.assert_array_equal(got[PART]["raw"][: len(KEPT)], KEPT)


def test_rows_of_two_parts_of_one_vocabulary():
    assert vocabulary_rows([7, 3, 9], [3, 4, 7]).tolist() == [1, -1, 0]
    given, fresh = jnp.arange(6.0).reshape(3, 2), -jnp.ones((4, 2), jnp.bfloat16)
    moved = move_rows(given, fresh, ("vocab", "embed"), np.array([1, -1, 0]))
    np.testing.assert_array_equal(moved, jnp.array([[2, 3], [-1, -1], [0, 1], [-1, -1]]))
    assert moved.dtype == jnp.bfloat16
    across = move_rows(given.T, fresh.T, ("embed", "vocab"), np.array([1, -1, 0]))
    np.testing.assert_array_equal(across, moved.T)


def test_what_does_not_fit_is_said():
    given, rows = jnp.ones((3, 2)), np.array([0, 2])
    with pytest.raises(ConfigError, match=r"\[3, 2\] in the checkpoint and \[4, 5\]"):
        move_rows(given, jnp.ones((4, 5)), ("vocab", "embed"), rows)
    with pytest.raises(ConfigError, match="has row 3, and the checkpoint has 3 rows"):
        move_rows(given, jnp.ones((4, 2)), ("vocab", "embed"), np.array([0, 3]))
