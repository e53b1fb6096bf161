"""The length beam against decoding every length by itself, on prompts laid out by hand."""

import jax
import jax.numpy as jnp
import model_stubs as stubs
import numpy as np
import pytest
from sampler_stubs import masked

from diffusion_lm.architectures.length_head import length_logits
from diffusion_lm.core.errors import ConfigError
from diffusion_lm.core.rng import StreamKeys
from diffusion_lm.samplers.length_beam import LengthBeam
from diffusion_lm.samplers.unmasking import Ranked

KEYS = StreamKeys.create(2)
MODEL = stubs.with_length_head(stubs.nano(**stubs.QUICK))
INNER = masked(Ranked(), temperature=0.0, forbidden=("eos", "pad"))
WINDOWS = [7, 4, 6]
PROMPT = stubs.as_prompt(stubs.make_batch([2, 5, 3], WINDOWS, 11))


def by_hand(row, length, closing):
    """Decodes one row in a window of `length` with EOS behind it: (text, score)."""
    one = stubs.rows_of(PROMPT, [row])
    start = int(np.argmax(np.asarray(one.target_mask)[0]))
    tokens, mask = np.array(one.tokens), np.zeros_like(np.asarray(one.target_mask))
    segments = np.array(one.segment_ids)
    mask[0, start : start + length] = True
    segments[0, start + length + closing :] = 0
    if closing:
        tokens[0, start + length] = stubs.EOS
    prompt = one.replace(tokens=jnp.asarray(tokens), target_mask=jnp.asarray(mask), segment_ids=jnp.asarray(segments))
    decoded = stubs.generate(INNER, MODEL, prompt, KEYS)
    return np.asarray(decoded.tokens)[0, start : start + length].tolist(), float(decoded.scores[0])


def texts(decoded):
    target = np.asarray(PROMPT.target_mask)
    return [
        row[mask][:count].tolist()
        for row, mask, count in zip(np.asarray(decoded.tokens), target, decoded.lengths, strict=True)
    ]


@pytest.mark.parametrize(("beam", "closing"), [(3, True), (12, False), (1, True)])
def test_the_best_of_the_likeliest_lengths_is_kept(beam, closing):
    decoded = stubs.generate(LengthBeam(INNER, beam, closing=closing), MODEL, PROMPT, KEYS)
    said = np.asarray(length_logits(MODEL, PROMPT, "full"))
    for row, window in enumerate(WINDOWS):
        possible = range(1, window + 1 - closing)
        likeliest = sorted(possible, key=lambda length, row=row: -said[row, length])[:beam]
        found = [by_hand(row, length, closing) for length in likeliest]
        text, score = max(found, key=lambda one: one[1])
        assert texts(decoded)[row] == text
        np.testing.assert_allclose(decoded.scores[row], score, rtol=1e-4)
        if closing:
            end = np.asarray(decoded.tokens)[row][np.asarray(PROMPT.target_mask)[row]][len(text) :]
            assert end.tolist() == [stubs.EOS] + [stubs.PAD] * (window - len(text) - 1)
    if beam == 12:
        assert len({len(text) for text in texts(decoded)}) > 1, "lengths differ from row to row"


def test_the_window_as_an_oracle_is_one_decode_of_that_length():
    decoded = stubs.generate(LengthBeam(INNER, 1, "window"), MODEL, PROMPT, KEYS)
    assert decoded.lengths.tolist() == [window - 1 for window in WINDOWS]
    assert texts(decoded) == [by_hand(row, window - 1, True)[0] for row, window in enumerate(WINDOWS)]
    plain = stubs.generate(LengthBeam(INNER, 1, "window"), stubs.nano(**stubs.QUICK), PROMPT, KEYS)
    np.testing.assert_array_equal(plain.tokens, decoded.tokens, "no head is needed")


def test_the_kept_candidates_trace_is_returned():
    decoded = stubs.generate(LengthBeam(INNER, 2, keep_trace=True), MODEL, PROMPT, KEYS)
    last = np.asarray(decoded.trace.tokens)[-1]
    for row, text in enumerate(texts(decoded)):
        mask = np.asarray(PROMPT.target_mask)[row]
        assert last[row][mask][: len(text)].tolist() == text


def test_candidates_of_the_inner_sampler_count_too():
    """Two drawn candidates at each of three lengths: six times the calls, and one pass for the lengths."""
    warm = masked(Ranked(), forbidden=("eos", "pad"), candidates=2)
    counted = stubs.counting(MODEL)
    decoded = stubs.generate(LengthBeam(warm, 3), counted, PROMPT, KEYS)
    assert counted.count() > 0
    assert int(decoded.forward_passes.sum()) == sum(counted.calls)
    assert (np.asarray(decoded.forward_passes) % 6 == 1).all()


def test_impossible_settings_are_errors():
    with pytest.raises(ConfigError, match="beam=2 with lengths='window'"):
        LengthBeam(INNER, 2, "window")
    with pytest.raises(ConfigError, match="guess"):
        LengthBeam(INNER, 1, "guess")
    with pytest.raises(ConfigError, match="has no length head"):
        jax.eval_shape(lambda: LengthBeam(INNER).generate(stubs.nano(**stubs.QUICK), PROMPT, KEYS))
