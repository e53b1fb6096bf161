import itertools

import jax
import jax.numpy as jnp
import model_stubs as stubs
import numpy as np
import pytest
from sampler_stubs import left_to_right

from diffusion_lm.core.errors import ConfigError
from diffusion_lm.core.rng import StreamKeys
from diffusion_lm.core.special import SpecialTokens
from diffusion_lm.nn.named_masks import named_visibility
from diffusion_lm.samplers import incremental

KEYS = StreamKeys.create(5)
PROMPT = stubs.as_prompt(stubs.make_batch([2, 5, 3, 4], [8, 3, 6, 5], 11))
RARE_ENDS = SpecialTokens(stubs.VOCAB, eos_id=38, pad_id=39, bos_id=stubs.BOS)
RARELY_ENDS = PROMPT.replace(special=RARE_ENDS)


def greedy_by_hand(model, prompt, visibility, eos=stubs.EOS, pad=stubs.PAD):
    """Full forward passes over growing rows, one row at a time, no sampler code."""

    @jax.jit
    def logits(params, row):
        bound = stubs.BoundModel(model.architecture, params)
        hidden = bound(
            row.tokens,
            visibility=named_visibility(visibility, row.target_mask),
            positions=jnp.arange(row.tokens.shape[1])[None],
            segment_ids=row.segment_ids,
            encoder=row.encoder,
        )
        return jax.nn.log_softmax(bound.logits(hidden))

    out, scores = np.where(prompt.target_mask, pad, prompt.tokens), []
    for b in range(len(out)):
        row, score = stubs.rows_of(prompt, [b]), 0.0
        for slot in np.flatnonzero(prompt.target_mask[b]):
            log_p = np.asarray(logits(model.params, row.replace(tokens=jnp.asarray(out[b : b + 1]))))[0, slot - 1]
            out[b, slot] = log_p.argmax()
            score += log_p.max()
            if out[b, slot] in (eos, pad):
                break
        scores.append(score)
    return out, scores


@pytest.mark.parametrize("layout", ["causal", "prefix", "encoder_decoder", "rope_grouped_queries"])
def test_greedy_equals_full_forward_passes_over_growing_rows(layout):
    """T43: cached decoding of ragged prompts is exact in every layout, and so is the decoder without a cache."""
    visibility, prompt = "prefix" if layout == "prefix" else "causal", PROMPT
    match layout:
        case "encoder_decoder":
            model = stubs.nano_encoder_decoder()
            prompt = stubs.as_prompt(stubs.make_batch([1, 1, 1, 1], [8, 3, 6, 5], 11, encoder=True))
        case "rope_grouped_queries":
            model = stubs.nano(position="rope", num_kv_heads=1, attention_scale="inverse_sqrt", mlp="swiglu")
        case _:
            model = stubs.nano()
    expected, scores = greedy_by_hand(model, prompt, visibility, eos=38, pad=39)
    for use_cache in (True, False):
        sampler = left_to_right(visibility=visibility, use_cache=use_cache)
        decoded = stubs.generate(sampler, model, prompt.replace(special=RARE_ENDS), KEYS)
        np.testing.assert_array_equal(decoded.tokens, expected)
        np.testing.assert_allclose(decoded.scores, scores, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("pieces", [1, 3, 4, 100])
@pytest.mark.parametrize("network", ["relative bias", "rope, windows of 3"])
def test_a_prompt_is_read_in_pieces_where_the_canvas_is_long(pieces, network, monkeypatch):
    """Pieces of one slot, of what divides neither prompts nor canvas, and of more than there is."""
    windowed = {"position": "rope", "num_kv_heads": 1, "window": 3}
    model = stubs.nano(**({} if network == "relative bias" else windowed))
    prompt = stubs.as_prompt(stubs.make_batch([2, 9, 1, 6], [8, 2, 6, 5], 11)).replace(special=RARE_ENDS)
    expected, scores = greedy_by_hand(model, prompt, "causal", eos=38, pad=39)
    sampler = left_to_right()
    whole = stubs.generate(sampler, model, prompt, KEYS)
    monkeypatch.setattr(incremental, "PREFILL_SLOTS", pieces)
    decoded = jax.jit(lambda params: sampler.generate(stubs.BoundModel(model.architecture, params), prompt, KEYS))(
        model.params
    )
    np.testing.assert_array_equal(decoded.tokens, expected)
    np.testing.assert_allclose(decoded.scores, scores, rtol=1e-4, atol=1e-3)
    np.testing.assert_array_equal(decoded.forward_passes, whole.forward_passes, "the prompt counts as one pass")


def test_draws_with_and_without_cache_agree():
    drawn = [
        stubs.generate(left_to_right(temperature=1.5, use_cache=cache), stubs.nano(), PROMPT, KEYS).tokens
        for cache in (True, False)
    ]
    np.testing.assert_array_equal(*drawn)


def table_after(sequence):
    """A network that continues its own last token along `sequence` (each token must occur once)."""
    table = np.zeros((stubs.VOCAB, stubs.VOCAB), np.float32)
    for before, after in itertools.pairwise(sequence):
        table[before, after] = 30.0
    return stubs.table_model(table, by_token=True)


def decode_table(sequence, prompt=PROMPT, **fields):
    return stubs.generate(left_to_right(use_cache=False, **fields), table_after(sequence), prompt, KEYS)


def test_T55_token_counting():
    """EOS, PAD, the prompt and what comes after the end do not count."""
    prompt = stubs.as_prompt(stubs.make_batch([1, 1, 1], [8, 8, 3], 9))
    decoded = decode_table([stubs.BOS, 10, 11, 12, stubs.EOS, 13], prompt)
    np.testing.assert_array_equal(decoded.lengths, [3, 3, 3])
    np.testing.assert_array_equal(decoded.tokens[0], [stubs.BOS, 10, 11, 12, stubs.EOS, 0, 0, 0, 0])
    np.testing.assert_array_equal(decoded.tokens[2], [stubs.BOS, 10, 11, 12, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(decode_table([stubs.BOS, 10, 11, stubs.PAD, 12], prompt).lengths, [2, 2, 2])
    np.testing.assert_array_equal(decode_table([stubs.BOS, stubs.EOS], prompt).lengths, [0, 0, 0])


def test_T39_the_window_is_always_filled_to_its_end_and_nothing_else_is_written():
    decoded = stubs.generate(left_to_right(temperature=1.0), stubs.nano(), RARELY_ENDS, KEYS)
    target, tokens = np.asarray(PROMPT.target_mask), np.asarray(decoded.tokens)
    for row, mask in zip(tokens, target, strict=True):
        written = row[mask]
        ended = np.flatnonzero(np.isin(written, (38, 39)))
        assert len(ended) or len(written) == mask.sum()
    np.testing.assert_array_equal(tokens[~target], np.asarray(PROMPT.tokens)[~target])


def test_T44_honest_nfe():
    """The reported passes are those that a counting network saw: the prefill and one for each further token."""
    for use_cache in (True, False):
        model = stubs.counting(stubs.nano())
        decoded = stubs.generate(left_to_right(use_cache=use_cache), model, RARELY_ENDS, KEYS)
        assert (np.asarray(decoded.forward_passes) == model.count()).all()
        assert model.count() <= 8
    prompt = stubs.as_prompt(stubs.make_batch([1, 1], [8, 8], 9))
    decoded = decode_table([stubs.BOS, 10, 11, stubs.EOS], prompt)
    np.testing.assert_array_equal(decoded.forward_passes, [3, 3])


def test_T50_temperature_limit():
    """Temperature to 0 is greedy, top_k 1 is greedy, top_p 1 and top_k V change nothing."""
    model = stubs.nano()

    def tokens(**fields):
        return np.asarray(stubs.generate(left_to_right(**fields), model, PROMPT, KEYS).tokens)

    greedy, free = tokens(), tokens(temperature=2.0)
    np.testing.assert_array_equal(tokens(temperature=1e-4), greedy)
    np.testing.assert_array_equal(tokens(temperature=2.0, top_k=1), greedy)
    np.testing.assert_array_equal(tokens(temperature=2.0, top_k=stubs.VOCAB), free)
    assert (free != greedy).any()


def test_draws_follow_the_model():
    """One token drawn for each of 4,000 prompts has the table's frequencies."""
    table = np.tile(np.random.default_rng(1).normal(size=stubs.VOCAB).astype(np.float32), (3, 1))
    prompt = stubs.as_prompt(stubs.make_batch([1] * 4000, [1] * 4000, 3)).replace(special=RARE_ENDS)
    sampler = left_to_right(temperature=0.7, use_cache=False)
    tokens = np.asarray(stubs.generate(sampler, stubs.table_model(table), prompt, KEYS).tokens)[:, 1]
    p = np.asarray(jax.nn.softmax(table[0] / 0.7))
    chi_square = ((np.bincount(tokens, minlength=stubs.VOCAB) - 4000 * p) ** 2 / (4000 * p)).sum()
    assert chi_square < 72.1, "99.9 % quantile of chi-square with 39 degrees of freedom"


def test_forbidden_tokens_are_never_emitted():
    forbidden = tuple(range(3, 30))
    sampler = left_to_right(temperature=3.0, forbidden=list(forbidden))
    target = np.asarray(PROMPT.target_mask)
    tokens = np.asarray(stubs.generate(sampler, stubs.nano(), RARELY_ENDS, KEYS).tokens)
    assert not np.isin(tokens[target], forbidden).any()


def test_the_trace_grows_by_one_token_a_pass():
    decoded = stubs.generate(left_to_right(keep_trace=True), stubs.nano(), RARELY_ENDS, KEYS)
    trace, tokens = np.asarray(decoded.trace.tokens), np.asarray(decoded.tokens)
    np.testing.assert_array_equal(trace[-1], tokens)
    np.testing.assert_array_equal(trace[1][0, :4], tokens[0, :4])
    assert (trace[1][0, 4:10] == 39).all()


@pytest.mark.parametrize(
    "fields", [{"visibility": "full"}, {"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}, {"top_k": -1}]
)
def test_impossible_settings_are_errors(fields):
    with pytest.raises(ConfigError):
        left_to_right(**fields)
