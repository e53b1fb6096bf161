import itertools

import jax
import model_stubs as stubs
import numpy as np
import pytest

from diffusion_lm.core.errors import ConfigError
from diffusion_lm.core.rng import StreamKeys
from diffusion_lm.core.special import SpecialTokens
from diffusion_lm.nn.masks import Causal
from diffusion_lm.samplers.autoregressive import AutoregressiveSampler
from diffusion_lm.samplers.beam import BeamSearch

KEYS = StreamKeys.create(5)
PROMPT = stubs.as_prompt(stubs.make_batch([2, 5, 3, 4], [8, 3, 6, 5], 11))
SMALL = {"vocab_size": 6, "vocab_multiple": 8}


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_one_beam_is_greedy(alpha):
    greedy = stubs.generate(AutoregressiveSampler(), stubs.nano(), PROMPT, KEYS)
    beam = stubs.generate(BeamSearch(beams=1, length_penalty=alpha), stubs.nano(), PROMPT, KEYS)
    np.testing.assert_array_equal(beam.tokens, greedy.tokens)
    np.testing.assert_array_equal(beam.lengths, greedy.lengths)


@pytest.mark.parametrize("alpha", [0.0, 0.6, 2.0])
def test_enough_beams_find_the_best_sequence_there_is(alpha):
    """All sequences of at most 3 of 6 tokens, scored by full forward passes."""
    model = stubs.nano(**SMALL)
    batch = stubs.make_batch([2], [3], 5)
    prompt = stubs.as_prompt(batch.replace(tokens=batch.tokens % 6, special=SpecialTokens(6)))
    ends = (stubs.EOS, stubs.PAD)
    sequences = [
        s
        for length in (1, 2, 3)
        for s in itertools.product(range(6), repeat=length)
        if not set(s[:-1]) & set(ends) and (length == 3 or s[-1] in ends)
    ]
    rows = np.tile(np.asarray(prompt.tokens), (len(sequences), 1))
    for row, sequence in zip(rows, sequences, strict=True):
        row[2 : 2 + len(sequence)] = sequence
    many = stubs.rows_of(prompt, [0] * len(sequences))

    @jax.jit
    def log_probs(params, tokens):
        bound = stubs.BoundModel(model.architecture, params)
        hidden = bound(
            tokens, visibility=Causal(), positions=jax.numpy.arange(5)[None] + 0 * tokens, segment_ids=many.segment_ids
        )
        return jax.nn.log_softmax(bound.logits(hidden))

    log_p = np.asarray(log_probs(model.params, jax.numpy.asarray(rows)))
    scores = [
        sum(log_p[i, 1 + j, token] for j, token in enumerate(s)) / ((5 + len(s)) / 6) ** alpha
        for i, s in enumerate(sequences)
    ]
    best = sequences[int(np.argmax(scores))]
    decoded = stubs.generate(BeamSearch(beams=len(sequences), length_penalty=alpha), model, prompt, KEYS)
    np.testing.assert_allclose(decoded.scores[0], max(scores), rtol=1e-4)
    assert tuple(np.asarray(decoded.tokens)[0, 2 : 2 + len(best)]) == best


def test_more_beams_score_no_worse_and_the_cache_follows_its_hypothesis():
    """The score that is reported is the sequence's own, recomputed by a full forward pass."""
    model, prompt = stubs.nano(), PROMPT.replace(special=SpecialTokens(stubs.VOCAB, eos_id=38, pad_id=39))
    greedy = stubs.generate(AutoregressiveSampler(), model, prompt, KEYS)
    beam = stubs.generate(BeamSearch(beams=4, length_penalty=0.0), model, prompt, KEYS)
    assert (np.asarray(beam.scores) >= np.asarray(greedy.scores) - 1e-4).all()
    assert (np.asarray(beam.tokens) != np.asarray(greedy.tokens)).any()

    @jax.jit
    def score(params, tokens):
        bound = stubs.BoundModel(model.architecture, params)
        slots = jax.numpy.arange(11)[None] + 0 * tokens
        hidden = bound(tokens, visibility=Causal(), positions=slots, segment_ids=PROMPT.segment_ids)
        return -bound.nll(hidden, jax.numpy.roll(tokens, -1, axis=1))

    log_p = np.roll(np.asarray(score(model.params, beam.tokens)), 1, axis=1)
    for b in range(4):
        window = np.flatnonzero(PROMPT.target_mask[b])
        end = [i for i in window if beam.tokens[b, i] in (38, 39)]
        used = [i for i in window if not end or i <= end[0]]
        np.testing.assert_allclose(beam.scores[b], log_p[b, used].sum(), rtol=1e-3, atol=1e-3)


def test_T44_honest_nfe():
    model = stubs.counting(stubs.nano())
    decoded = stubs.generate(BeamSearch(beams=3), model, PROMPT, KEYS)
    model.count()
    # Each call reports its rows: the prefill one a prompt, the others `beams` a prompt.
    assert (np.asarray(decoded.forward_passes) * 4 == sum(model.calls)).all()


def test_encoder_decoder_beams_share_their_prompts_source():
    model = stubs.nano_encoder_decoder()
    prompt = stubs.as_prompt(stubs.make_batch([1, 1, 1, 1], [8, 3, 6, 5], 11, encoder=True))
    greedy = stubs.generate(AutoregressiveSampler(), model, prompt, KEYS)
    beam = stubs.generate(BeamSearch(beams=1), model, prompt, KEYS)
    np.testing.assert_array_equal(beam.tokens, greedy.tokens)


def test_forbidden_tokens_are_never_emitted():
    forbidden = tuple(range(3, 30))
    decoded = stubs.generate(BeamSearch(beams=2, forbidden=forbidden), stubs.nano(), PROMPT, KEYS)
    assert not np.isin(np.asarray(decoded.tokens)[np.asarray(PROMPT.target_mask)], forbidden).any()


@pytest.mark.parametrize("fields", [{"visibility": "full"}, {"beams": 0}, {"length_penalty": -1.0}])
def test_impossible_settings_are_errors(fields):
    with pytest.raises(ConfigError):
        BeamSearch(**fields)
