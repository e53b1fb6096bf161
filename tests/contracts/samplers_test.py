"""What every sampler of `gin/samplers/` owes; a new gin file is found and checked without a word here."""

import dataclasses

import gin_objects
import jax
import jax.numpy as jnp
import model_stubs as stubs
import numpy as np
import pytest

from diffusion_lm.core.rng import StreamKeys

pytestmark = pytest.mark.thorough

FILES = gin_objects.files("samplers")
KEYS = StreamKeys.create(9)
MODEL = stubs.counting(stubs.nano(**stubs.QUICK))
PROMPT = stubs.as_prompt(stubs.make_batch([2, 5, 3, 4], [8, 3, 6, 5], 11))
TARGET = np.asarray(PROMPT.target_mask)


@pytest.fixture(scope="module", params=FILES, ids=lambda path: path.stem)
def sampler(request):
    """One file after the other, as the scope arranges it, so that the programs of one are freed before the next."""
    yield gin_objects.build(request.param, "SAMPLER")
    stubs.forget()


def fitted(sampler, model):
    """The model with what the sampler needs of it."""
    if getattr(getattr(sampler, "unmask", None), "needs_token_schedules", False):
        model = stubs.with_token_schedules(model)
    return stubs.with_length_head(model) if getattr(sampler, "needs_length_head", False) else model


@pytest.fixture(scope="module")
def model(sampler):
    found = fitted(sampler, MODEL)
    return MODEL if found is MODEL else stubs.counting(found)


def check_shape_of(decoded, prompt):
    rows, length = prompt.tokens.shape
    target, tokens = np.asarray(prompt.target_mask), np.asarray(decoded.tokens)
    assert tokens.shape == (rows, length)
    assert tokens.dtype == np.int32
    assert decoded.lengths.shape == decoded.scores.shape == decoded.forward_passes.shape == (rows,)
    assert np.isfinite(decoded.scores).all()
    assert (np.asarray(decoded.forward_passes) >= 1).all()
    assert ((tokens >= 0) & (tokens < stubs.VOCAB)).all()
    np.testing.assert_array_equal(tokens[~target], np.asarray(prompt.tokens)[~target], "conditioning is untouched")
    for row, mask, count in zip(tokens, target, decoded.lengths, strict=True):
        window = row[mask]
        assert 0 <= count <= len(window)
        assert not np.isin(window[:count], (stubs.EOS, stubs.PAD)).any()
        assert np.isin(window[count : count + 1], (stubs.EOS, stubs.PAD)).all(), "the target ends where it says"
        assert (window[count + 1 :] == stubs.PAD).all(), "after the end comes PAD"


def test_there_are_samplers():
    assert {"greedy", "temperature", "top_p", "beam", "sundae"} <= {path.stem for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_built_twice_it_is_equal_and_hashable(path):
    sampler, again = (gin_objects.build(path, "SAMPLER") for _ in range(2))
    assert sampler == again
    assert hash(sampler) == hash(again)


def test_fills_the_window_and_is_deterministic_for_a_key(sampler, model):
    decoded = stubs.generate(sampler, model, PROMPT, KEYS)
    check_shape_of(decoded, PROMPT)
    again = stubs.generate(sampler, model, PROMPT, KEYS)
    jax.tree.map(np.testing.assert_array_equal, decoded, again)


def test_encoder_decoder(sampler):
    prompt = stubs.as_prompt(stubs.make_batch([1, 1, 1, 1], [8, 3, 6, 5], 11, encoder=True))
    encoder_decoder = fitted(sampler, stubs.nano_encoder_decoder(**stubs.QUICK))
    check_shape_of(stubs.generate(sampler, encoder_decoder, prompt, KEYS), prompt)


def test_the_reference_in_the_window_cannot_leak(sampler, model):
    """The sampler fills the window from nothing, even where a batch still holds the answer."""
    full = stubs.make_batch([2, 5, 3, 4], [8, 3, 6, 5], 11)
    np.testing.assert_array_equal(
        stubs.generate(sampler, model, full.replace(loss_weights=PROMPT.loss_weights), KEYS).tokens,
        stubs.generate(sampler, model, PROMPT, KEYS).tokens,
    )


def test_T40_T41_batch_padding_and_position_invariance(sampler, model):
    """A row alone with more padding, or elsewhere among others, is decoded as in the whole batch; drawn tokens too."""
    whole = stubs.generate(sampler, model, PROMPT, KEYS)
    order = [3, 1, 0, 2]
    shuffled = stubs.generate(sampler, model, stubs.rows_of(PROMPT, order), KEYS)
    np.testing.assert_array_equal(shuffled.tokens, np.asarray(whole.tokens)[order])
    alone = stubs.pad_right(stubs.rows_of(PROMPT, [2]), 7)
    alone = alone.replace(tokens=jnp.where(alone.segment_ids == 0, 9, alone.tokens))
    decoded = stubs.generate(sampler, model, alone, KEYS)
    np.testing.assert_array_equal(np.asarray(decoded.tokens)[0, :11][TARGET[2]], np.asarray(whole.tokens)[2][TARGET[2]])
    np.testing.assert_allclose(decoded.scores[0], whole.scores[2], rtol=1e-4, atol=1e-4)


def test_T44_honest_nfe(sampler, model):
    """The reported forward passes of all rows are the rows that the network was really called with."""
    jax.effects_barrier()
    model.calls.clear()
    decoded = stubs.generate(sampler, model, PROMPT, KEYS)
    assert model.count() >= 1
    assert np.asarray(decoded.forward_passes).sum() == sum(model.calls)


def test_a_row_without_a_window_is_left_alone(sampler, model):
    """Rows that only fill up the last batch: no tokens, no NaN, no effect on the others."""
    filler = stubs.rows_of(PROMPT, [1])
    empty = filler.replace(
        target_mask=jnp.zeros_like(filler.target_mask), segment_ids=jnp.zeros_like(filler.segment_ids)
    )
    joined = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), stubs.rows_of(PROMPT, [0, 2, 3]), empty)
    decoded = stubs.generate(sampler, model, joined, KEYS)
    check_shape_of(decoded, joined)
    assert decoded.lengths[3] == 0
    whole = stubs.generate(sampler, model, PROMPT, KEYS)
    np.testing.assert_array_equal(decoded.tokens[:3], np.asarray(whole.tokens)[[0, 2, 3]])


def test_is_one_program_that_lowers_ahead_of_time(sampler, model):
    def generate(params, prompt, keys):
        return sampler.generate(dataclasses.replace(model, params=params), prompt, keys)

    abstract = jax.eval_shape(lambda: (model.params, PROMPT, KEYS))
    assert "while" in jax.jit(generate).lower(*abstract).as_text()


def test_takes_guidance_and_predictions_fed_back_if_it_knows_them(sampler):
    """Whatever else it is made of; traced only."""
    if not hasattr(sampler, "guidance"):
        pytest.skip("decodes from left to right")
    model = fitted(sampler, stubs.nano(self_conditioning=True, **stubs.QUICK))
    for fields in ({"guidance": 0.5}, {"self_conditioning": True}, {"guidance": 0.5, "self_conditioning": True}):
        chosen = dataclasses.replace(sampler, **fields)
        decoded = jax.eval_shape(lambda chosen=chosen: chosen.generate(model, PROMPT, KEYS))
        assert decoded.tokens.shape == PROMPT.tokens.shape
