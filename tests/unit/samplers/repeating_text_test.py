"""BD3-LM's stop at low entropy, and Dream's ranks of tempered probabilities."""

import jax.numpy as jnp
import model_stubs as stubs
import numpy as np
import pytest
from sampler_stubs import masked, without_ends

from diffusion_lm.core.errors import ConfigError
from diffusion_lm.core.rng import StreamKeys
from diffusion_lm.core.special import SpecialTokens
from diffusion_lm.samplers.counts import Fixed
from diffusion_lm.samplers.stopping import LowEntropy
from diffusion_lm.samplers.unmasking import Ranked

KEYS = StreamKeys.create(2)
MASK, LENGTH = 4, 20
REPEATS_FROM = 9
# Slot i says token 5 + i, from slot 9 on always token 30; all of it for certain.
SAID = np.where(np.arange(LENGTH) < REPEATS_FROM, 5 + np.arange(LENGTH), 30)
TABLE = stubs.table_model(np.where(np.arange(stubs.VOCAB) == SAID[:, None], 50.0, 0.0))
PROMPT = stubs.as_prompt(stubs.make_batch([2, 4], [18, 6], LENGTH))
# PAD ends a text, but no EOS does.
PROMPT = PROMPT.replace(special=SpecialTokens(stubs.VOCAB, pad_id=stubs.PAD, eos_id=stubs.PAD, mask_id=MASK))


def entropy(tokens):
    share = np.unique(tokens, return_counts=True)[1] / len(tokens)
    return -(share * np.log(share)).sum()


def decode(**stop):
    rule = LowEntropy(**stop) if stop else None
    sampler = masked(Ranked(count=Fixed(4)), block=4, temperature=0.0, stop=rule)
    return stubs.generate(sampler, stubs.counting(TABLE), PROMPT, KEYS)


@pytest.mark.parametrize("drop", [True, False])
def test_a_row_ends_after_the_block_in_which_its_text_repeats_itself(drop):
    """Blocks of row 0 end at slots 6, 10, 14, 18 and 20; the first of whose last 6 tokens repeat ends at 14."""
    decoded = decode(min_entropy=1.0, window=6, drop=drop)
    tokens = np.asarray(decoded.tokens)
    prompt = np.asarray(PROMPT.tokens)[0, :2]
    text = np.concatenate([prompt, SAID[2:14]])
    assert entropy(text[-6:]) < 1.0 < entropy(np.concatenate([prompt, SAID[2:10]])[-6:])
    end = 8 if drop else 14
    np.testing.assert_array_equal(tokens[0, 2:end], SAID[2:end])
    assert (tokens[0, end:] == stubs.PAD).all()
    assert decoded.lengths[0] == end - 2
    np.testing.assert_allclose(decoded.scores, 0.0, atol=1e-4)
    # Row 1 (slots 4 to 9) does not repeat itself.
    whole = decode()
    np.testing.assert_array_equal(tokens[1], np.asarray(whole.tokens)[1])
    assert decoded.forward_passes[0] < whole.forward_passes[0]
    np.testing.assert_array_equal(np.asarray(whole.tokens)[0, 2:], SAID[2:])


def test_a_text_that_is_no_longer_than_the_window_does_not_end():
    decoded = decode(min_entropy=2.9, window=20)
    np.testing.assert_array_equal(decoded.tokens, decode().tokens)


def test_entropies_are_those_of_the_last_tokens():
    rng = np.random.default_rng(0)
    canvas = rng.integers(0, 6, (40, 30))
    length = rng.integers(12, 31, 40)
    written = np.arange(30) < length[:, None]
    target = np.broadcast_to(np.arange(30) >= 3, canvas.shape)
    rule = LowEntropy(min_entropy=1.4, window=12)
    over, kept = (np.asarray(x) for x in rule.ends(jnp.asarray(canvas), jnp.asarray(written), jnp.asarray(target)))
    expected = [n > 12 and entropy(row[n - 12 : n]) < 1.4 for row, n in zip(canvas, length, strict=True)]
    np.testing.assert_array_equal(over, expected)
    assert 0 < over.sum() < 40
    np.testing.assert_array_equal(kept, target & (np.arange(30) < length[:, None] - 12))


def test_impossible_settings_are_errors():
    with pytest.raises(ConfigError, match=r"LowEntropy\.min_entropy"):
        LowEntropy(min_entropy=4.0, window=32)
    with pytest.raises(ConfigError, match=r"LowEntropy\.window"):
        LowEntropy(window=1)


# Slot 2 has one token of 0.55 and ten of 0.045, slot 3 two of 0.48: slot 3 has the lower entropy, and a nucleus of 0.5
# leaves one token at slot 2.
WIDE, TWO = np.full(stubs.VOCAB, 1e-9), np.full(stubs.VOCAB, 1e-9)
WIDE[10], WIDE[11:21] = 0.55, 0.045
TWO[30], TWO[31], TWO[32] = 0.48, 0.48, 0.04
RANKED = stubs.table_model(np.log(np.stack([WIDE, WIDE, WIDE, TWO])))


@pytest.mark.parametrize(("rank", "top_p"), [("entropy", 0.5), ("margin", 0.5), ("confidence", 0.5)])
def test_tempered_ranks_are_those_of_the_distribution_that_is_drawn_from(rank, top_p):
    prompt = without_ends(stubs.as_prompt(stubs.make_batch([2], [2], 4)))
    first = {}
    for tempered in (False, True):
        rule = Ranked(rank, Fixed(1), tempered=tempered)
        sampler = masked(rule, top_p=top_p, keep_trace=True)
        decoded = stubs.generate(sampler, RANKED, prompt, KEYS)
        first[tempered] = int(np.flatnonzero(np.asarray(decoded.trace.tokens)[0, 0, 2:] != MASK)[0])
    # By its nucleus slot 2 is certain: entropy 0, margin 1, confidence 1.
    assert first[True] == 0
    if rank == "entropy":
        assert first[False] == 1, "the model's own entropy is lower at slot 3"


def test_dream_released_takes_the_ranks_of_the_released_code():
    """Ranks of softmax(top-p(logits / temperature)), computed here in float64 for a random network."""
    rng = np.random.default_rng(1)
    logits = rng.normal(scale=2.0, size=(9, stubs.VOCAB))
    prompt = without_ends(stubs.as_prompt(stubs.make_batch([1], [8], 9)))
    for temperature in (0.2, 1.5):
        rule = Ranked("entropy", Fixed(1), tempered=True)
        sampler = masked(rule, temperature=temperature, top_p=0.9, keep_trace=True)
        trace = np.asarray(stubs.generate(sampler, stubs.table_model(logits), prompt, KEYS).trace.tokens)[:8, 0, 1:]
        before = np.concatenate([np.full((1, 8), MASK), trace[:-1]])
        order = (trace != before).argmax(axis=1)
        entropies = []
        for row in np.delete(logits[1:], MASK, axis=1):
            p = np.sort(np.exp((row - row.max()) / temperature))[::-1]
            p /= p.sum()
            p = p[: (np.cumsum(p) - p < 0.9).sum()]
            p /= p.sum()
            entropies.append(-(p * np.log(p)).sum())
        np.testing.assert_array_equal(order, np.argsort(entropies, kind="stable"))
