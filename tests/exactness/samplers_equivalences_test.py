"""Samplers that must agree: special cases of each other, limits, and the autoregressive sampler."""

import dataclasses

import jax.numpy as jnp
import model_stubs as stubs
import numpy as np
import pytest
import sampler_worlds as worlds
from sampler_stubs import left_to_right, masked, without_ends

from diffusion_lm.core.alignment import Shifted
from diffusion_lm.core.rng import StreamKeys
from diffusion_lm.samplers.counts import Even, Fixed, Scheduled
from diffusion_lm.samplers.remasking_rates import Capped, Rescaled
from diffusion_lm.samplers.routing import Routed
from diffusion_lm.samplers.unmasking import Ancestral, EntropyBound, Factor, Ranked, Threshold

pytestmark = pytest.mark.thorough

KEYS = StreamKeys.create(9)
WORLD = worlds.World.random(3, 3, seed=4)
MASK = 4
PROMPT = without_ends(stubs.as_prompt(stubs.make_batch([2, 5, 3, 4], [8, 3, 6, 5], 11)))


def nano_tokens(unmask, **fields):
    return np.asarray(stubs.generate(masked(unmask, **fields), stubs.nano(), PROMPT, KEYS).tokens)


def test_T53_remdm_without_rate_is_ancestral():
    plain = worlds.decode(WORLD, Ancestral(), 500, steps=4)
    for rule in (Capped(0.0), Rescaled(0.0)):
        np.testing.assert_array_equal(worlds.decode(WORLD, Ancestral(remasking=rule), 500, steps=4), plain)
    assert (worlds.decode(WORLD, Ancestral(remasking=Rescaled(0.5)), 500, steps=4) != plain).any()


def test_T53_entropy_bound_0_is_one_token_a_step():
    one = Ranked("entropy", Fixed(1))
    tokens = worlds.decode(WORLD, EntropyBound(0.0), 500)
    np.testing.assert_array_equal(tokens, worlds.decode(WORLD, one, 500))
    assert (worlds.decode(WORLD, EntropyBound(2.0), 500) != tokens).any()


def test_T53_threshold_1_is_one_token_a_step():
    one = worlds.decode(WORLD, Ranked("confidence", Fixed(1)), 500)
    np.testing.assert_array_equal(worlds.decode(WORLD, Threshold(1.0), 500), one)
    np.testing.assert_array_equal(worlds.decode(WORLD, Factor(1e-6), 500), one)
    assert (worlds.decode(WORLD, Threshold(0.5), 500) != one).any()


def test_T53_threshold_0_is_one_step():
    sampler = masked(Threshold(0.0))
    decoded = stubs.generate(sampler, WORLD.model, worlds.prompts(WORLD, 50), KEYS)
    np.testing.assert_array_equal(decoded.forward_passes, 1)


def sequential_greedy(world):
    """[W,L]: the most confident slot first, one at a time."""
    results = []
    for w in range(len(world.logits)):
        canvas = np.full(world.L, world.V)
        for _ in range(world.L):
            probs = world.probs[w, world.code(canvas)]
            best = np.where(canvas == world.V, probs.max(axis=-1), -1).argmax()
            canvas[best] = probs[best].argmax()
        results.append(canvas)
    return np.stack(results)


def joint_worlds(count=300, V=3, L=3):
    """Joint laws from nearly certain to loose."""
    rng = np.random.default_rng(0)
    joints = rng.dirichlet(np.full(V**L, 0.3), size=count)
    peaked = np.eye(V**L)[rng.integers(V**L, size=count)]
    share = rng.uniform(0.0, 1.0, (count, 1))
    return worlds.World.of_joints((share * peaked + (1 - share) * joints).reshape(count, *[V] * L))


def test_T53_greedy_threshold_is_greedy_sequential_under_the_theorems_condition():
    """Fast-dLLM: every confidence above 1 - eps with (n + 1) eps <= 1, conditionals of one joint law."""
    world = joint_worlds()
    count, L = len(world.logits), world.L
    expected = sequential_greedy(world)
    first = world.probs[:, world.code(np.full(L, world.V))].max(axis=-1).min(axis=-1)
    condition = first > 1 - 1 / (L + 1)
    assert 50 < condition.sum() < count - 50
    greedy = {"temperature": 0.0}
    for rule in (Threshold(1 - 1 / (L + 1)), Factor(1.0)):
        sampler = masked(rule, **greedy)
        decoded = stubs.generate(sampler, world.model, worlds.prompts(world, count), KEYS)
        np.testing.assert_array_equal(np.asarray(decoded.tokens)[condition, 1:], expected[condition])
    np.testing.assert_array_equal(worlds.decode(world, Threshold(1.0), count, **greedy), expected)
    at_once = worlds.decode(world, Threshold(0.0), count, **greedy)
    np.testing.assert_array_equal(at_once[condition], expected[condition])
    assert (at_once[~condition] != expected[~condition]).any(), "beyond the condition they differ"


def test_T53_block_as_long_as_the_window_is_no_block():
    for rule in (Ancestral(), Ranked("confidence", Even()), Routed()):
        whole = nano_tokens(rule, steps=4)
        np.testing.assert_array_equal(nano_tokens(rule, steps=4, block=8), whole)
    assert (nano_tokens(Ranked("confidence", Even()), steps=4, block=2) != nano_tokens(Ranked(), steps=4)).any()


def test_T53_block_of_1_shifted_and_causal_is_autoregressive():
    for model, prompt in (
        (stubs.nano(), PROMPT.replace(special=stubs.SPECIAL)),
        (stubs.nano_encoder_decoder(), stubs.as_prompt(stubs.make_batch([1] * 4, [8, 3, 6, 5], 11, encoder=True))),
    ):
        greedy = left_to_right()
        expected = stubs.generate(greedy, model, prompt, KEYS)
        for rule in (Ranked("confidence", Even()), Threshold(0.9), Ancestral()):
            sampler = masked(rule, block=1, temperature=0.0, alignment=Shifted(), visibility="causal", end="stop")
            decoded = stubs.generate(sampler, model, prompt, KEYS)
            np.testing.assert_array_equal(decoded.tokens, expected.tokens)
            np.testing.assert_array_equal(decoded.lengths, expected.lengths)


def test_the_best_of_several_candidates_is_returned():
    one = masked(Ancestral(), steps=3)
    plain = stubs.generate(one, stubs.nano(), PROMPT, KEYS)
    several = stubs.generate(dataclasses.replace(one, candidates=4), stubs.nano(), PROMPT, KEYS)
    assert (np.asarray(several.scores) >= np.asarray(plain.scores) - 1e-6).all(), "candidate 0 is the lone one"
    assert (np.asarray(several.scores) > np.asarray(plain.scores)).any()
    np.testing.assert_array_equal(several.forward_passes, 4 * np.asarray(plain.forward_passes)[0])


def test_scores_of_masked_decodes_are_those_of_the_tokens_when_they_were_written():
    table = np.zeros((4, 7), np.float32)
    table[1:, 5] = [1.0, 2.0, 3.0]
    prompt = without_ends(stubs.as_prompt(stubs.make_batch([1], [3], 4)), mask_id=6)
    decoded = stubs.generate(masked(Ranked(), temperature=0.0), stubs.table_model(table), prompt, KEYS)
    np.testing.assert_array_equal(decoded.tokens[0, 1:], 5)
    log_p = [x - np.log(np.exp(x) + 5) for x in (1.0, 2.0, 3.0)]
    np.testing.assert_allclose(decoded.scores[0], np.mean(log_p), rtol=1e-5)


def test_T38_guidance_0_is_no_guidance():
    """Bit for bit, though both passes run; and strength w is c + w (c - u) on a model with a known answer."""
    from diffusion_lm.architectures.base import Hidden
    from diffusion_lm.nn.cross_entropy import chunked_token_stats
    from diffusion_lm.nn.head import Head

    rng = np.random.default_rng(0)
    c, u = (Hidden(jnp.asarray(rng.normal(size=(2, 3, 9)), jnp.float32)) for _ in range(2))
    head = Head(jnp.eye(9), vocab_size=8)
    tokens = jnp.asarray(rng.integers(0, 7, (2, 3)))
    plain = chunked_token_stats(c.values_BTD, head, 64, score=tokens, forbidden=(7,))
    off, on = (
        chunked_token_stats(
            c.values_BTD,
            head,
            64,
            score=tokens,
            forbidden=(7,),
            unconditional_BTD=u.values_BTD,
            guidance=w,
        )
        for w in (0.0, 1.5)
    )
    np.testing.assert_array_equal(off.target_log_prob, plain.target_log_prob)
    mixed = (2.5 * c.values_BTD - 1.5 * u.values_BTD)[..., :7]
    expected = mixed - np.log(np.exp(mixed).sum(axis=-1, keepdims=True))
    np.testing.assert_allclose(
        on.target_log_prob,
        np.take_along_axis(np.asarray(expected), np.asarray(tokens)[..., None], -1)[..., 0],
        rtol=1e-4,
    )


def test_T38_guided_law():
    """Rows that ask network 0 are guided away from network MASK, which answers once slot 0 holds MASK (T34)."""
    V, L, rows = 3, 2, 8000
    networks = [worlds.World.random(V, L, seed).logits for seed in range(V + 1)]
    world = worlds.World(np.concatenate(networks))
    prompt = worlds.prompts(world, rows)
    prompt = prompt.replace(tokens=prompt.tokens.at[:, 0].set(0))
    start = world.code(np.full(L, V))
    c, u = (world.logits[w, start, :, :V].astype(np.float64) for w in (0, V))

    def law(w):
        mixed = np.exp(c + w * (c - u))
        mixed /= mixed.sum(axis=-1, keepdims=True)
        joint = np.multiply.outer(*np.concatenate([mixed, np.zeros((L, 1))], axis=1))
        return joint.reshape(-1)

    for w in (0.0, 0.7, -1.0):
        sampler = masked(Ancestral(), steps=1, guidance=w)
        decoded = stubs.generate(sampler, world.model, prompt, KEYS)
        counts = worlds.histogram(world, np.asarray(decoded.tokens)[:, 1:])
        assert worlds.follows(counts, law(w))
        assert not worlds.follows(counts, law(w + 0.7))
        np.testing.assert_array_equal(np.asarray(decoded.tokens)[:, 0], 0)
        np.testing.assert_array_equal(decoded.forward_passes, 1 if w == 0 else 2)


def test_T38_the_unconditional_half_sees_no_source():
    """At w = -1 what is left is u: the decode of a prompt whose source, BOS included, is MASK."""
    prompt = without_ends(stubs.as_prompt(stubs.make_batch([1, 1, 1], [8, 3, 6], 11, encoder=True)))
    source, model = prompt.encoder, stubs.nano_encoder_decoder()
    blank = source.replace(tokens=jnp.where(source.segment_ids > 0, MASK, source.tokens))
    nothing = prompt.replace(tokens=jnp.where(prompt.segment_ids > 0, MASK, prompt.tokens), encoder=blank)
    target = np.asarray(prompt.target_mask)

    def tokens(prompt, **fields):
        sampler = masked(Ranked(), steps=1, temperature=0.0, **fields)
        return np.asarray(stubs.generate(sampler, model, prompt, KEYS).tokens)[target]

    unconditional = tokens(nothing)
    np.testing.assert_array_equal(tokens(prompt, guidance=-1.0), unconditional)
    assert (tokens(prompt) != unconditional).any()


def test_T50_temperature_limit():
    for rule in (Ancestral(), Ranked("confidence", Scheduled())):
        greedy = nano_tokens(rule, steps=4, temperature=0.0)
        np.testing.assert_array_equal(nano_tokens(rule, steps=4, temperature=1e-4), greedy)
        np.testing.assert_array_equal(nano_tokens(rule, steps=4, temperature=2.0, top_k=1), greedy)
        np.testing.assert_array_equal(nano_tokens(rule, steps=4, temperature=2.0, top_p=1e-6), greedy)
        warm = nano_tokens(rule, steps=4, temperature=2.0)
        assert (warm != greedy).any()
