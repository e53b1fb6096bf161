"""Prefix and dual cache (Fast-dLLM): exact where theory says so, in use, fresh at each block, and right about slots."""

import dataclasses

import gin_objects
import jax
import jax.numpy as jnp
import model_stubs as stubs
import numpy as np
import pytest
from sampler_stubs import masked, without_ends

from diffusion_lm.core.alignment import SamePosition, Shifted
from diffusion_lm.core.errors import ConfigError
from diffusion_lm.core.rng import StreamKeys
from diffusion_lm.core.special import SpecialTokens
from diffusion_lm.nn.masks import Conditioning, CopyPair, Full
from diffusion_lm.samplers.blocks import RowBlocks
from diffusion_lm.samplers.caching import CachedPass, CacheState, DualCache, PrefixCache
from diffusion_lm.samplers.counts import Even
from diffusion_lm.samplers.remasking_rates import Rescaled
from diffusion_lm.samplers.unmasking import Ancestral, EntropyBound, Factor, Ranked, Threshold

pytestmark = pytest.mark.thorough

MASK, LENGTH = 4, 18
KEYS = StreamKeys.create(7)
PROMPT = without_ends(stubs.as_prompt(stubs.make_batch([2, 5, 3, 4], [14, 7, 11, 9], LENGTH)))
WITH_ENDS = PROMPT.replace(special=SpecialTokens(stubs.VOCAB, eos_id=7, pad_id=9, mask_id=MASK))
CACHES = {"prefix": PrefixCache(programs=2), "dual": DualCache()}
ALIGNMENTS = {"same": SamePosition(), "shifted": Shifted()}
both_caches = pytest.mark.parametrize("cache", CACHES.values(), ids=CACHES)
both_alignments = pytest.mark.parametrize("alignment", ALIGNMENTS.values(), ids=ALIGNMENTS)


def sampler(cache=None, **fields):
    return masked(**({"unmask": Threshold(0.6), "temperature": 0.0, "block": 4, "cache": cache} | fields))


def without_cache(chosen):
    return dataclasses.replace(chosen, blocks=dataclasses.replace(chosen.blocks, cache=None))


def shallow(**fields):
    """One layer: keys and values depend on their slot's token and position alone, so what is kept stays true."""
    return stubs.nano(num_layers=1, scan_layers=False, **fields)


def deep(**fields):
    return stubs.nano(num_layers=3, scan_layers=False, **fields)


@dataclasses.dataclass(frozen=True)
class Watched(stubs.CountingModel):
    """Counts the slots of each network call, [rows, slots] a call."""

    def __call__(self, tokens, **inputs):
        jax.debug.callback(lambda shape=tokens.shape: self.calls.append(shape))
        return super(stubs.CountingModel, self).__call__(tokens, **inputs)


def watched(model):
    return Watched(model.architecture, model.params)


def shapes_of(chosen, model, prompt):
    model = watched(model)
    decoded = stubs.generate(chosen, model, prompt, KEYS)
    jax.effects_barrier()
    return decoded, list(model.calls)


RULES = {
    "threshold": {"unmask": Threshold(0.25)},
    "factor": {"unmask": Factor(1.6)},
    "low_confidence": {"unmask": Ranked("confidence", Even()), "steps": 9},
    "entropy_bound": {"unmask": EntropyBound(1.5)},
    "ancestral": {"unmask": Ancestral(), "steps": 9, "temperature": 1.0},
    "remdm": {"unmask": Ancestral(remasking=Rescaled(0.4)), "steps": 12, "temperature": 1.0},
    "defer": {"end": "defer"},
    "ban": {"forbidden": ("eos", "pad")},
    "stop": {"end": "stop", "temperature": 1.0},
    "guided": {"guidance": 0.7},
    "candidates": {"candidates": 3, "temperature": 1.0},
}


SHIFTS = {"prefix": "shifted", "dual": "same"}


@pytest.mark.parametrize(
    ("rule", "cache", "alignment"),
    [("threshold", "prefix", "same"), ("threshold", "dual", "shifted")]
    + [(rule, cache, SHIFTS[cache]) for rule in RULES for cache in CACHES],
)
def test_T43_one_layer_makes_both_caches_exact(rule, cache, alignment):
    """Several blocks, ragged rows, every reveal rule: the tokens of the decode that reads whole rows."""
    prompt = WITH_ENDS if rule in ("defer", "ban", "stop") else PROMPT
    decoded = check_equal(shallow(), prompt, CACHES[cache], alignment=ALIGNMENTS[alignment], **RULES[rule])
    assert (np.asarray(decoded.forward_passes) > 4).all(), "blocks take more than their first step"


@both_caches
def test_T43_one_layer_with_an_encoder(cache):
    prompt = without_ends(stubs.as_prompt(stubs.make_batch([1, 1, 1], [14, 7, 11], LENGTH, encoder=True)))
    check_equal(stubs.nano_encoder_decoder(**stubs.QUICK), prompt, cache, alignment=Shifted())


@both_caches
def test_T43_one_layer_with_fixed_text_inside_the_window(cache):
    """A block then has holes, and its shifted states stand at more slots than a block has."""
    target = PROMPT.target_mask & ~jnp.isin(jnp.arange(LENGTH), jnp.array([7, 8, 10, 12]))
    tokens = jnp.where(PROMPT.target_mask & ~target, 11, PROMPT.tokens)
    check_equal(shallow(), PROMPT.replace(tokens=tokens, target_mask=target), cache, alignment=Shifted())


def test_T43_one_layer_that_reads_its_own_predictions():
    """The suffix reads a new prediction in each step, so it is not to be kept; the prefix is known and reads none."""
    check_equal(shallow(self_conditioning=True), PROMPT, PrefixCache(), alignment=Shifted())


def check_equal(model, prompt, cache, **fields):
    plain = stubs.generate(sampler(**fields), model, prompt, KEYS)
    cached = stubs.generate(sampler(cache, **fields), model, prompt, KEYS)
    np.testing.assert_array_equal(cached.tokens, plain.tokens)
    np.testing.assert_array_equal(cached.lengths, plain.lengths)
    np.testing.assert_allclose(cached.scores, plain.scores, rtol=1e-4)
    return cached


@both_caches
@pytest.mark.parametrize("often", [{"block": 1}, {"steps": 1}], ids=["blocks_of_1", "blocks_of_1_step"])
def test_T43_a_cache_that_is_filled_in_each_step_changes_nothing(cache, often):
    check_equal(deep(), PROMPT, cache, alignment=Shifted(), **often)


@pytest.mark.parametrize("fields", [{}, {"causal_context": True}, {"block": 2}], ids=str)
def test_T43_what_cannot_see_the_block_is_kept_exactly(fields):
    """Block diffusion: finished blocks never see later ones, so the dual cache is a cache of them; many layers."""
    chosen = {"visibility": f"blocks:{fields.get('block', 4)}", "alignment": Shifted()} | fields
    check_equal(deep(), PROMPT, DualCache(), **chosen)


def two_states(model, row, before, now, fed):
    """States of one row whose slots `fed` hold `now` while all others have the keys and values of `before`.

    One pass over [before ; now], in which the second copy sees itself at `fed` and the first copy elsewhere.
    """
    twice = jnp.tile(jnp.asarray(fed)[None], (1, 2))
    new = (CopyPair(1, 1) & Conditioning(twice)) | (CopyPair(1, 0) & Conditioning(~twice))
    hidden = model(
        jnp.concatenate([before, now])[None],
        visibility=CopyPair(0, 0) | new,
        positions=jnp.tile(row.positions, (1, 2)),
        segment_ids=jnp.tile(row.segment_ids, (1, 2)),
    )
    return model.logits(hidden)[0, LENGTH:]


def slow_decode(chosen, states, row):
    """Tokens and passes of one row, block by block, threshold rule and greedy; `states` is `two_states`."""
    target, tokens = np.asarray(row.target_mask)[0], np.array(row.tokens)[0]
    tokens[target], passes, back = MASK, 0, chosen.alignment.back
    slots = np.flatnonzero(target)
    for first in range(0, len(slots), chosen.blocks.size):
        block = slots[first : first + chosen.blocks.size]
        before, fed = tokens.copy(), np.ones(LENGTH, bool)
        while (tokens[block] == MASK).any():
            probs = np.asarray(jax.nn.softmax(states(row, before, tokens, fed).at[:, MASK].set(-jnp.inf)))
            masked = block[tokens[block] == MASK]
            best = probs[masked - back].max(axis=-1)
            sure = (best >= chosen.unmask.threshold) | (np.arange(len(best)) == best.argmax())
            tokens[masked[sure]] = probs[masked - back].argmax(axis=-1)[sure]
            passes += 1
            fed = np.arange(LENGTH) >= block[0] - back
            if chosen.blocks.cache == DualCache():
                fed &= np.arange(LENGTH) <= block[-1]
    return tokens, passes


@both_caches
@pytest.mark.parametrize(("position", "alignment"), [("relative_bias", Shifted()), ("rope", SamePosition())], ids=str)
def test_T40_T41_T43_decoding_is_a_slow_loop_with_the_block_starts_keys(cache, alignment, position):
    """Three layers, where the caches approximate: rows as if alone, filled anew at each block, read at their slots."""
    model = deep(position=position)
    chosen = sampler(cache, alignment=alignment, unmask=Threshold(0.4))
    states = jax.jit(lambda *inputs: two_states(model, *inputs))
    decoded = stubs.generate(chosen, model, PROMPT, KEYS)
    slowest = total = 0
    for number in range(4):
        row = stubs.rows_of(PROMPT, [number])
        tokens, passes = slow_decode(chosen, states, row)
        target = np.asarray(row.target_mask)[0]
        np.testing.assert_array_equal(np.asarray(decoded.tokens)[number][target], tokens[target])
        slowest, total = max(slowest, passes), total + passes
    assert total < np.asarray(PROMPT.target_mask).sum(), "the threshold lets several tokens through at once"
    assert (np.asarray(decoded.forward_passes) >= slowest).all()
    plain = stubs.generate(without_cache(chosen), model, PROMPT, KEYS)
    assert (plain.tokens != decoded.tokens).any(), "an approximation shows somewhere"


@pytest.mark.parametrize("cache", [PrefixCache(), DualCache()], ids=CACHES)
def test_T44_the_slots_that_a_pass_reads(cache):
    """Whole rows once a block for the whole batch, though rows take their blocks at different speed; then a part."""
    decoded, shapes = shapes_of(sampler(cache, alignment=Shifted()), deep(), PROMPT)
    rows, widths = {rows for rows, _ in shapes}, [width for _, width in shapes]
    assert rows == {4}
    assert (np.asarray(decoded.forward_passes) == len(shapes)).all()
    if cache == DualCache():
        assert widths.count(LENGTH) == 4, "14 slots are 4 blocks"
        assert set(widths) == {LENGTH, 5}, "a block of 4, and the slot before it"
    else:
        assert {LENGTH, 14, 9} <= set(widths) <= {LENGTH, 14, 9, 5}, "quarters of the row"
        assert widths[0] == LENGTH
    assert len(widths) > 6


def stored(model, canvas, wanted, cache):
    cached = CachedPass(cache, wanted, (LENGTH,))
    return cached.run(
        model, canvas, self_condition=None, time=None, visibility=Full(), segment_ids=PROMPT.segment_ids, encoder=None
    )


@both_caches
@both_alignments
def test_T43_the_first_pass_of_a_block_is_the_whole_pass_whatever_was_kept(cache, alignment):
    model, rows = deep(), PROMPT.tokens.shape[0]
    blocks = RowBlocks.of(PROMPT.target_mask, 4, None)
    used = PROMPT.segment_ids > 0
    canvas = jnp.where(PROMPT.target_mask, MASK, PROMPT.tokens)
    whole = model(canvas, visibility=Full(), positions=PROMPT.positions, segment_ids=PROMPT.segment_ids)
    stale = jax.tree.map(lambda x: x + 3.0, model.init_cache(rows, LENGTH))
    kept, block = CacheState(stale, jnp.zeros(rows, jnp.int32)), jnp.ones(rows, jnp.int32)
    active = blocks.active(block)

    def cached_pass(block, active):
        return CachedPass.of(cache, kept, block=block, block_size=4, active=active, used=used, alignment=alignment)

    first = cached_pass(block, active)
    np.testing.assert_array_equal(first.wanted, used)
    hidden = stored(model, canvas, first.wanted, stale)
    seen = np.asarray(used)
    np.testing.assert_allclose(
        np.asarray(hidden.values_BTD)[seen], np.asarray(whole.values_BTD)[seen], rtol=1e-4, atol=1e-5
    )
    kept = kept.after(hidden.cache, block, active)
    second = cached_pass(block, active)
    assert not np.asarray(second.wanted).all()
    changed = canvas.at[:, 7].set(13)
    approximate = stored(model, changed, second.wanted, kept.cache)
    exact = model(changed, visibility=Full(), positions=PROMPT.positions, segment_ids=PROMPT.segment_ids)
    at = np.asarray(alignment.to_slots(active))
    error = np.abs(np.asarray(approximate.values_BTD) - np.asarray(exact.values_BTD))[at].max()
    assert error > 1e-3, "two layers and more: what is kept is not what a whole pass would find"
    print(f"largest error of a state: {error:.3f}")
    waiting = cached_pass(block + 1, jnp.zeros_like(active))
    assert not np.asarray(waiting.wanted).any(), "rows that wait are neither read nor stored"


def test_seeds_are_the_rule_of_the_released_code_for_shifted_networks():
    """The pass over the whole row takes the block's first token alone, whatever the others' confidence."""
    decoded = {
        seeds: stubs.generate(
            sampler(DualCache(), alignment=Shifted(), unmask=Threshold(0.0), seeds=seeds, keep_trace=True),
            deep(),
            PROMPT,
            KEYS,
        )
        for seeds in (False, True)
    }
    np.testing.assert_array_equal(decoded[False].forward_passes, 4)
    np.testing.assert_array_equal(decoded[True].forward_passes, 8)
    after_one = np.asarray(decoded[True].trace.tokens)[0]
    target = np.asarray(PROMPT.target_mask)
    written = (after_one != MASK) & target
    np.testing.assert_array_equal(written.argmax(axis=1), target.argmax(axis=1))
    np.testing.assert_array_equal(written.sum(axis=1), 1)


@pytest.mark.parametrize("name", ["fast_dllm_prefix_cache", "fast_dllm_dual_cache"])
def test_the_files_are_the_threshold_file_and_a_cache(name):
    folder = gin_objects.GIN / "samplers"
    cached = gin_objects.build(folder / f"{name}.gin", "SAMPLER")
    assert cached.blocks.cache == {"prefix": PrefixCache(), "dual": DualCache()}[name.split("_")[2]]
    plain = gin_objects.build(folder / "threshold.gin", "SAMPLER")
    assert without_cache(cached) == plain


def test_programs_of_the_prefix_cache():
    assert PrefixCache().widths(384, 32) == (96, 192, 288, 384)
    assert PrefixCache(1).widths(384, 32) == (384,)
    assert PrefixCache().widths(3, 32) == (1, 2, 3)
    assert DualCache().widths(384, 33) == (33, 384)
    assert DualCache().widths(20, 33) == (20,)
    with pytest.raises(ConfigError, match="programs"):
        PrefixCache(0)
