"""Predictions fed back inside the compiled loop, against a slow loop in Python; candidates, guidance, encoders."""

import dataclasses

import jax
import jax.numpy as jnp
import model_stubs as stubs
import numpy as np
import pytest
from sampler_stubs import canvas, masked, without_ends

from diffusion_lm.core.alignment import Shifted
from diffusion_lm.core.errors import ConfigError
from diffusion_lm.core.rng import StreamKeys, fold_in_each
from diffusion_lm.nn import sampling
from diffusion_lm.nn.masks import Full
from diffusion_lm.samplers.candidates import candidate_keys, start_canvases
from diffusion_lm.samplers.denoiser import blank_conditioning
from diffusion_lm.samplers.stopping import StableAndSure
from diffusion_lm.samplers.uniform import Renoised
from diffusion_lm.samplers.unmasking import AllSlots, Ranked

KEYS = StreamKeys.create(5)
PROMPT = without_ends(stubs.as_prompt(stubs.make_batch([2, 5, 3, 4], [8, 3, 6, 5], 11)), mask_id=None)
TARGET = np.asarray(PROMPT.target_mask)
MODEL = stubs.nano(**stubs.QUICK, self_conditioning=True)
PLAIN = dataclasses.replace(stubs.nano(**stubs.QUICK), params=MODEL.params)
MASK = 4
WITH_MASK = without_ends(PROMPT, MASK)


@jax.jit
def call(params, tokens, signal):
    """Logits of the network and the mean embedding at temperature 1, row by row."""
    model = dataclasses.replace(MODEL, params=params)
    fields = {"positions": PROMPT.positions, "segment_ids": PROMPT.segment_ids}
    return model.logits(model(tokens, visibility=Full(), self_condition=signal, **fields))


def expected_embedding(logits):
    return jax.nn.softmax(logits) @ MODEL.params["embed"]["tokens"][: stubs.VOCAB]


def no_signal():
    return jnp.zeros((*PROMPT.tokens.shape, MODEL.spec.model_dim))


def redrawn(sampler):
    """The loop of `AllSlots` in Python: all target tokens are drawn, all read what was predicted for them."""
    tokens = start_canvases(sampler.process, KEYS, PROMPT, 1, vocab_size=stubs.VOCAB)
    keys, signal = candidate_keys(KEYS, "sampler/token", PROMPT, 1), no_signal()
    for step in range(sampler.steps):
        logits = sampler.alignment.to_tokens(call(MODEL.params, tokens, signal))
        temperature = sampler.decoding.temperature
        draws = logits.argmax(axis=-1)
        if temperature > 0:
            numbered = fold_in_each(keys, jnp.full(keys.shape, step))
            # With the rows that pad the vocabulary: the draw depends on how many there are.
            padding = ((0, 0), (0, 0), (0, MODEL.spec.padded_vocab_size - stubs.VOCAB))
            padded = jnp.pad(logits, padding, constant_values=-1e30)
            draws = sampling.draw(numbered, sampling.filter_logits(padded, temperature))
        tokens = jnp.where(PROMPT.target_mask, draws, tokens)
        expected = expected_embedding(logits / (temperature or 1.0))
        signal = jnp.where(PROMPT.target_mask[..., None], expected, 0.0)
    return np.asarray(tokens)


@pytest.mark.parametrize(
    "fields",
    [{"temperature": 0.0}, {"temperature": 0.8, "alignment": Shifted()}],
    ids=["greedy", "tempered_shifted"],
)
@pytest.mark.thorough
def test_it_is_a_slow_python_loop(fields):
    sampler = canvas(AllSlots(), steps=4, exit_tolerance=None, **fields)
    tokens = np.asarray(stubs.generate(sampler, MODEL, PROMPT, KEYS).tokens)
    np.testing.assert_array_equal(tokens[TARGET], redrawn(sampler)[TARGET])
    off = stubs.generate(dataclasses.replace(sampler, self_conditioning=False), MODEL, PROMPT, KEYS)
    assert (np.asarray(off.tokens) != tokens).any(), "the prediction matters"
    np.testing.assert_array_equal(off.tokens, stubs.generate(sampler, PLAIN, PROMPT, KEYS).tokens)


def test_a_canvas_that_stands_is_no_fixed_point_while_predictions_change():
    sampler = canvas(AllSlots(), steps=30, temperature=0.0)
    rows = without_ends(stubs.as_prompt(stubs.make_batch([3] * 6, [1] * 6, 4)), mask_id=None)

    def passes(on):
        one = dataclasses.replace(sampler, self_conditioning=on)
        alone = (stubs.generate(one, MODEL, stubs.rows_of(rows, [row]), KEYS) for row in range(6))
        return [int(decoded.forward_passes[0]) for decoded in alone]

    assert min(passes(on=False)) < 30, "without them it is one"
    assert passes(on=True) == [30] * 6


def test_with_mask_and_blocks_open_slots_read_and_a_block_begins_without():
    """One most probable slot a step in blocks of 3 slots; what is written is no longer predicted."""
    sampler = masked(Ranked(), block=3, temperature=0.0)
    decoded = stubs.generate(sampler, MODEL, WITH_MASK, KEYS)
    tokens, signal = jnp.where(PROMPT.target_mask, MASK, PROMPT.tokens), no_signal()
    rank = np.where(TARGET, TARGET.cumsum(axis=1) - 1, -1)
    for step in range(8):
        noisy = PROMPT.target_mask & (tokens == MASK)
        read = noisy & (step % 3 > 0)
        logits = call(MODEL.params, tokens, jnp.where(read[..., None], signal, 0.0)).at[..., MASK].set(-jnp.inf)
        log_p = np.where(noisy & (rank // 3 == step // 3), jax.nn.log_softmax(logits).max(axis=-1), -np.inf)
        chosen = (np.arange(11) == log_p.argmax(axis=1)[:, None]) & np.isfinite(log_p)
        tokens, signal = jnp.where(chosen, logits.argmax(axis=-1), tokens), expected_embedding(logits)
    # Rows with shorter windows end earlier, and their blocks begin at the same steps.
    np.testing.assert_array_equal(np.asarray(decoded.tokens)[TARGET], np.asarray(tokens)[TARGET])
    off = stubs.generate(dataclasses.replace(sampler, self_conditioning=False), MODEL, WITH_MASK, KEYS)
    assert (np.asarray(off.tokens) != np.asarray(decoded.tokens)).any()


def test_each_pass_of_guidance_reads_its_own_prediction():
    sampler = canvas(AllSlots(), steps=3, temperature=0.0, exit_tolerance=None, guidance=0.7)
    model = stubs.CountingModel(MODEL.architecture, MODEL.params)
    decoded = stubs.generate(sampler, model, PROMPT, KEYS)
    assert model.calls == [8, 8, 8]
    np.testing.assert_array_equal(decoded.forward_passes, 6)
    blank = blank_conditioning(sampler.process, PROMPT, KEYS, stubs.VOCAB).tokens
    opening = np.asarray(PROMPT.positions == 0) & ~TARGET
    assert (np.asarray(blank) == PROMPT.tokens)[opening].all()
    assert (np.asarray(blank) != PROMPT.tokens)[~TARGET & (PROMPT.positions > 0)].any()
    tokens = start_canvases(sampler.process, KEYS, PROMPT, 1, vocab_size=stubs.VOCAB)
    signals = [no_signal(), no_signal()]
    for _ in range(3):
        c = call(MODEL.params, tokens, signals[0])
        u = call(MODEL.params, jnp.where(PROMPT.target_mask, tokens, blank), signals[1])
        signals = [jnp.where(PROMPT.target_mask[..., None], expected_embedding(x), 0.0) for x in (c, u)]
        tokens = jnp.where(PROMPT.target_mask, (c + 0.7 * (c - u)).argmax(axis=-1), tokens)
    np.testing.assert_array_equal(np.asarray(decoded.tokens)[TARGET], np.asarray(tokens)[TARGET])
    nothing = dataclasses.replace(sampler, guidance=1e-9)
    np.testing.assert_array_equal(
        stubs.generate(nothing, MODEL, PROMPT, KEYS).tokens,
        stubs.generate(dataclasses.replace(sampler, guidance=0.0), MODEL, PROMPT, KEYS).tokens,
    )


def renoising_sampler(**fields):
    chosen = {"temperature": 0.8, "steps": 6, "candidates": 2, "stop": StableAndSure(1.0)}
    return canvas(Renoised(final_temperature=0.4), **(chosen | fields))


def test_T40_rows_and_candidates_do_not_depend_on_each_other():
    """Also once some have stopped: a finished row stands, and its neighbours are decoded as they are alone."""
    sampler = renoising_sampler(block=4, steps=None)
    whole = stubs.generate(sampler, MODEL, PROMPT, KEYS)
    order = [3, 1, 0, 2]
    shuffled = stubs.generate(sampler, MODEL, stubs.rows_of(PROMPT, order), KEYS)
    np.testing.assert_array_equal(shuffled.tokens, np.asarray(whole.tokens)[order])
    alone = stubs.generate(sampler, MODEL, stubs.rows_of(PROMPT, [1]), KEYS)
    np.testing.assert_array_equal(alone.tokens[0], whole.tokens[1])
    assert alone.forward_passes[0] < whole.forward_passes[1], "the short row is done before the long one"


@pytest.mark.thorough
def test_an_encoder_decoder_feeds_back_with_candidates_and_guidance():
    model = stubs.nano_encoder_decoder(**stubs.QUICK, self_conditioning=True)
    prompt = without_ends(stubs.as_prompt(stubs.make_batch([1, 1, 1], [8, 3, 6], 11, encoder=True)), mask_id=None)
    sampler = renoising_sampler(guidance=0.5)
    whole = stubs.generate(sampler, model, prompt, KEYS)
    alone = stubs.generate(sampler, model, stubs.rows_of(prompt, [2]), KEYS)
    np.testing.assert_array_equal(alone.tokens[0], whole.tokens[2])
    source = prompt.encoder
    other = prompt.replace(encoder=dataclasses.replace(source, tokens=jnp.where(source.tokens > 4, 9, source.tokens)))
    assert (stubs.generate(sampler, model, other, KEYS).tokens != whole.tokens).any()


def test_asking_for_it_without_the_layer_is_an_error_and_not_asking_is_none():
    sampler = canvas(AllSlots(), steps=1, self_conditioning=True)
    with pytest.raises(ConfigError, match="no layer that reads a previous prediction"):
        sampler.generate(stubs.nano(**stubs.QUICK), PROMPT, KEYS)
    plain = dataclasses.replace(sampler, self_conditioning=None)
    plain.generate(stubs.nano(**stubs.QUICK), PROMPT, KEYS)
