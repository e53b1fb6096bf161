import dataclasses
import itertools

import jax
import jax.numpy as jnp
import model_stubs as stubs
import numpy as np
import pytest
from sampler_stubs import sundae, without_ends

from diffusion_lm.core.alignment import Shifted
from diffusion_lm.core.errors import ConfigError
from diffusion_lm.core.rng import StreamKeys
from diffusion_lm.core.types import TokenStats
from diffusion_lm.nn.masks import Full
from diffusion_lm.samplers.candidates import candidate_keys, start_canvases
from diffusion_lm.samplers.stopping import settled

KEYS = StreamKeys.create(5)
PROMPT = stubs.as_prompt(stubs.make_batch([2, 5, 3, 4], [8, 3, 6, 5], 11))
TARGET = np.asarray(PROMPT.target_mask)
# The vocabulary has no MASK, which no sampler draws.
PROMPT = PROMPT.replace(special=dataclasses.replace(stubs.SPECIAL, mask_id=None))
OPEN = without_ends(PROMPT, mask_id=None)


def prefer(*tokens, strength=30.0):
    """A network that maps each token to the next of `tokens`, the last one to itself, and all others to the first."""
    table = np.zeros((stubs.VOCAB, stubs.VOCAB), np.float32)
    table[:, tokens[0]] = strength
    for before, after in zip(tokens, (*tokens[1:], tokens[-1]), strict=True):
        table[before] = 0
        table[before, after] = strength
    return stubs.table_model(table, by_token=True)


def test_every_target_token_is_redrawn_in_every_step():
    """Along the chain 10 -> 11 -> 12 every position moves on by one token per step, from wherever its noise is."""
    successor = {10: 11, 11: 12, 12: 12}
    for steps in (1, 2, 3):
        sampler = sundae(steps=steps, candidates=1, exit_tolerance=None)
        decoded = stubs.generate(sampler, prefer(10, 11, 12), OPEN, KEYS)
        expected = np.array(start_canvases(sampler.process, KEYS, OPEN, 1, vocab_size=stubs.VOCAB))
        for _ in range(steps):
            expected = np.vectorize(lambda token: successor.get(token, 10))(expected)
        np.testing.assert_array_equal(np.asarray(decoded.tokens)[TARGET], expected[TARGET])
        np.testing.assert_array_equal(np.asarray(decoded.tokens)[~TARGET], np.asarray(PROMPT.tokens)[~TARGET])


def test_the_start_is_uniform_noise_of_its_own_for_each_candidate():
    identity = stubs.table_model(50 * np.eye(stubs.VOCAB), by_token=True)
    prompt = without_ends(stubs.as_prompt(stubs.make_batch([1] * 300, [10] * 300, 11)), mask_id=None)
    sampler = sundae(steps=1, candidates=1)
    tokens = np.asarray(stubs.generate(sampler, identity, prompt, KEYS).tokens)[:, 1:]
    counts = np.bincount(tokens.ravel(), minlength=stubs.VOCAB)
    assert ((counts - 75) ** 2 / 75).sum() < 72.1, "99.9 % quantile of chi-square with 39 degrees of freedom"
    assert len({row.tobytes() for row in tokens}) == 300


def reference(model, prompt, sampler, keys):
    """The algorithm of the paper with Python loops, one candidate at a time; draws are argmaxes (temperature 0)."""
    apply = jax.jit(
        lambda params, tokens: jax.nn.log_softmax(
            (bound := stubs.BoundModel(model.architecture, params)).logits(
                bound(tokens, visibility=Full(), positions=prompt.positions, segment_ids=prompt.segment_ids)
            )
        )
    )
    results = []
    for candidate in range(sampler.candidates):
        own = keys.replace(root=jax.random.fold_in(keys.root, candidate))
        x = sampler.process.corrupt(own, prompt, jnp.ones(prompt.tokens.shape), vocab_size=stubs.VOCAB).tokens
        for _ in range(sampler.steps):
            log_p = apply(model.params, x)
            ce = -jnp.take_along_axis(log_p, x[..., None], axis=-1)[..., 0]
            score = -(ce * prompt.target_mask).sum(axis=1) / prompt.target_mask.sum(axis=1)
            x = jnp.where(prompt.target_mask, log_p.argmax(axis=-1), x)
        results.append((np.asarray(score), np.asarray(x)))
    scores = np.stack([score for score, _ in results])
    best = scores.argmax(axis=0)
    return np.stack([results[c][1][b] for b, c in enumerate(best)]), scores.max(axis=0)


def test_it_is_the_papers_algorithm():
    """Against plain loops: the trajectory, the model score of the last input under the last logits, the choice."""
    sampler = sundae(steps=4, candidates=3, temperature=0.0, exit_tolerance=None)
    tokens, scores = reference(stubs.nano(), OPEN, sampler, KEYS)
    decoded = stubs.generate(sampler, stubs.nano(), OPEN, KEYS)
    np.testing.assert_array_equal(decoded.tokens, tokens)
    np.testing.assert_allclose(decoded.scores, scores, rtol=1e-4, atol=1e-4)
    early = stubs.generate(dataclasses.replace(sampler, exit_tolerance=0.01), stubs.nano(), OPEN, KEYS)
    np.testing.assert_array_equal(early.tokens, tokens)
    np.testing.assert_allclose(early.scores, scores, rtol=1e-4, atol=1e-4)


def test_every_candidate_has_draws_of_its_own():
    keys = np.asarray(jax.random.key_data(candidate_keys(KEYS, "sampler/token", PROMPT, 3)))
    assert keys.shape[:2] == (12, 11)
    drawn = keys[np.repeat(TARGET, 3, axis=0)]
    assert len(np.unique(drawn, axis=0)) == 3 * TARGET.sum()
    again = np.asarray(jax.random.key_data(candidate_keys(KEYS, "sampler/token", stubs.rows_of(PROMPT, [2]), 3)))
    np.testing.assert_array_equal(again, keys[6:9])


def test_draws_follow_the_tempered_model():
    row = np.random.default_rng(1).normal(size=stubs.VOCAB).astype(np.float32)
    prompt = without_ends(stubs.as_prompt(stubs.make_batch([1] * 400, [10] * 400, 11)), mask_id=None)
    sampler = sundae(steps=2, candidates=1, temperature=0.5)
    tokens = np.asarray(stubs.generate(sampler, stubs.table_model(np.tile(row, (11, 1))), prompt, KEYS).tokens)[:, 1:]
    p = np.asarray(jax.nn.softmax(row / 0.5))
    chi_square = ((np.bincount(tokens.ravel(), minlength=stubs.VOCAB) - 4000 * p) ** 2 / (4000 * p)).sum()
    assert chi_square < 72.1


def test_T44_honest_nfe():
    """Calls times candidates, fewer after an early exit, and the counting network agrees."""
    model = stubs.counting(stubs.nano())
    decoded = stubs.generate(sundae(steps=3, candidates=2, exit_tolerance=None), model, PROMPT, KEYS)
    assert model.count() == 3
    np.testing.assert_array_equal(decoded.forward_passes, [6] * 4)

    model = stubs.counting(prefer(10, 11, 12))
    decoded = stubs.generate(sundae(steps=9, candidates=2), model, OPEN, KEYS)
    assert model.count() == 4, "10, 11, 12 and the step that changes nothing"
    np.testing.assert_array_equal(decoded.forward_passes, [8] * 4)
    assert (np.asarray(decoded.tokens)[TARGET] == 12).all()


def test_a_lucky_unchanged_draw_is_no_fixed_point():
    """Two equally likely tokens: a step that happens to change nothing must not stop the decode."""
    table = np.full((2, stubs.VOCAB), -50.0, np.float32)
    table[:, 10:12] = 0.0
    prompt = without_ends(stubs.as_prompt(stubs.make_batch([1] * 20, [1] * 20, 2)), mask_id=None)
    model = stubs.counting(stubs.table_model(table))
    decoded = stubs.generate(sundae(steps=6, candidates=1), model, prompt, KEYS)
    assert model.count() == 6
    assert len(set(np.asarray(decoded.tokens)[:, 1])) == 2


@pytest.mark.parametrize("temperature", [0.0, 0.2, 1.0, 1.5])
def test_settled_bounds_the_chance_of_a_later_change(temperature):
    """The bound is never below the true expected number of changes, for the worst rest and for a spread one."""
    for p, rest in ((0.9, [0.1]), (0.6, [0.4]), (0.6, [0.1] * 4), (0.4, [0.2] * 3), (0.999, [0.001])):
        log_p = jnp.full((1, 5), np.log(p), jnp.float32)
        stats = TokenStats(jnp.ones((1, 5), int), jnp.ones((1, 5), int), log_p, log_p)
        target = jnp.array([[False, True, True, True, False]])

        def done(tolerance, steps_left=4, canvas=jnp.ones((1, 5), int), stats=stats, target=target):
            return bool(
                settled(
                    canvas,
                    stats.sample,
                    stats,
                    target,
                    temperature=temperature,
                    steps_left=jnp.int32(steps_left),
                    tolerance=tolerance,
                )[0]
            )

        assert not done(0.99, canvas=jnp.array([[1, 2, 1, 1, 1]])), "the step changed the target"
        if temperature == 0:
            assert done(0.0)
        elif temperature > 1:
            assert not done(0.99)
        else:
            weights = np.array([p, *rest]) ** (1 / temperature)
            truth = 4 * 3 * (1 - weights[0] / weights.sum())
            assert not done(truth * 0.99 - 1e-6)
            worst = p ** (1 / temperature) / (p ** (1 / temperature) + (1 - p) ** (1 / temperature))
            assert done(4 * 3 * (1 - worst) * 1.01 + 1e-6)
            assert done(0.0, steps_left=0)


def test_the_best_candidate_and_what_is_scored():
    """Two fixed points, one of them padding: the window's score and that of the real tokens choose differently."""
    table = np.zeros((stubs.VOCAB, stubs.VOCAB), np.float32)
    table[:20, stubs.PAD] = 8.0
    table[20:, 30] = 6.0
    model = stubs.table_model(table, by_token=True)
    prompt = stubs.as_prompt(stubs.make_batch([1] * 8, [1] * 8, 2)).replace(special=PROMPT.special)

    def first_tokens(**fields):
        sampler = sundae(steps=5, temperature=0.0, **({"candidates": 8} | fields))
        decoded = stubs.generate(sampler, model, prompt, KEYS)
        return np.asarray(decoded.tokens)[:, 1], np.asarray(decoded.scores)

    by_window, scores = first_tokens()
    assert (by_window == stubs.PAD).all(), "the padding is the more certain of the two"
    p = np.exp(8.0) / (np.exp(8.0) + stubs.VOCAB - 1)
    np.testing.assert_allclose(scores, np.log(p), rtol=1e-4)
    by_real, real_scores = first_tokens(score_over="real")
    np.testing.assert_array_equal(by_real, by_window), "a candidate without real tokens is scored over the window"
    np.testing.assert_allclose(real_scores, scores)
    single, _ = first_tokens(candidates=1)
    assert set(single) == {stubs.PAD, 30}, "both fixed points are reached"


def test_the_score_of_real_tokens_leaves_the_padding_out():
    table = np.zeros((7, stubs.VOCAB), np.float32)
    table[1:3, 10], table[3, stubs.EOS], table[4:, stubs.PAD] = 5.0, 6.0, 9.0
    prompt = stubs.as_prompt(stubs.make_batch([1], [6], 7)).replace(special=PROMPT.special)
    log_p = [5 - np.log(np.exp(5) + 39)] * 2 + [6 - np.log(np.exp(6) + 39)] + [9 - np.log(np.exp(9) + 39)] * 3
    for score_over, expected in (("window", np.mean(log_p)), ("real", np.mean(log_p[:3]))):
        sampler = sundae(steps=3, candidates=2, temperature=0.0, score_over=score_over)
        decoded = stubs.generate(sampler, stubs.table_model(table), prompt, KEYS)
        np.testing.assert_allclose(decoded.scores[0], expected, rtol=1e-4)
        assert decoded.lengths[0] == 2
        np.testing.assert_array_equal(decoded.tokens[0, 1:], [10, 10, 1, 0, 0, 0])


def test_T21_shift_off_by_one():
    """With the AR alignment the draw of slot i is written to slot i + 1."""
    table = np.zeros((11, stubs.VOCAB), np.float32)
    table[np.arange(11), np.arange(11) + 10] = 30.0
    for temperature in (0.0, 0.2):
        sampler = sundae(steps=2, candidates=2, temperature=temperature, alignment=Shifted())
        tokens = np.asarray(stubs.generate(sampler, stubs.table_model(table), PROMPT, KEYS).tokens)
        slots = np.broadcast_to(np.arange(11), tokens.shape)
        np.testing.assert_array_equal(tokens[TARGET], slots[TARGET] - 1 + 10)


def test_T50_temperature_limit():
    model = stubs.nano()

    def tokens(**fields):
        sampler = sundae(steps=3, candidates=2, exit_tolerance=None, **fields)
        return np.asarray(stubs.generate(sampler, model, OPEN, KEYS).tokens)

    greedy = tokens(temperature=0.0)
    np.testing.assert_array_equal(tokens(temperature=1e-4), greedy)
    np.testing.assert_array_equal(tokens(temperature=2.0, top_k=1), greedy)
    assert (tokens(temperature=2.0) != greedy).any()


def test_T55_token_counting():
    """EOS, PAD and what a model generates after the end do not count."""
    table = np.zeros((9, stubs.VOCAB), np.float32)
    table[np.arange(9), [5, 10, 11, stubs.PAD, 12, stubs.EOS, 13, 14, 15]] = 30.0
    prompt = stubs.as_prompt(stubs.make_batch([1, 4], [8, 5], 9))
    sampler = sundae(steps=2, candidates=1)
    decoded = stubs.generate(sampler, stubs.table_model(table), prompt, KEYS)
    np.testing.assert_array_equal(decoded.lengths, [2, 1])
    np.testing.assert_array_equal(decoded.tokens[0, 1:], [10, 11, 0, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(decoded.tokens[1, 4:], [12, stubs.EOS, 0, 0, 0])


def test_encoder_decoder_candidates_attend_to_the_source_of_their_prompt():
    model = stubs.nano_encoder_decoder()
    prompt = stubs.as_prompt(stubs.make_batch([1, 1, 1, 1], [8, 3, 6, 5], 11, encoder=True))
    sampler = sundae(steps=2, candidates=3)
    whole = stubs.generate(sampler, model, prompt, KEYS)
    for row in (0, 3):
        alone = stubs.generate(sampler, model, stubs.rows_of(prompt, [row]), KEYS)
        np.testing.assert_array_equal(alone.tokens[0], whole.tokens[row])


def test_the_trace_holds_every_canvas_and_repeats_the_last():
    sampler = sundae(steps=7, candidates=2, keep_trace=True)
    decoded = stubs.generate(sampler, prefer(10, 11, 12), OPEN, KEYS)
    trace = np.asarray(decoded.trace.tokens)
    assert trace.shape == (7, 4, 11)
    for before, after in itertools.pairwise(trace[:, TARGET]):
        np.testing.assert_array_equal(after, np.minimum(before + 1, 12))
    assert (trace[2:, TARGET] == 12).all()


@pytest.mark.parametrize(
    "fields",
    [
        {"steps": 0},
        {"candidates": 0},
        {"temperature": -0.1},
        {"score_over": "all"},
        {"visibility": "ful"},
        {"exit_tolerance": 1.0},
    ],
)
def test_impossible_settings_are_errors(fields):
    with pytest.raises(ConfigError):
        sundae(**fields)
