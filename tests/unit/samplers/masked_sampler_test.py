"""Idle steps, rules with a state of their own, and rules that read the logits."""

import dataclasses

import jax
import jax.numpy as jnp
import model_stubs as stubs
import numpy as np
import pytest
from sampler_stubs import canvas, masked, without_ends

from diffusion_lm.core.rng import StreamKeys
from diffusion_lm.nn.masks import Full
from diffusion_lm.samplers.masked import MaskedLoop
from diffusion_lm.samplers.remasking_rates import Capped
from diffusion_lm.samplers.rule import SlotRule
from diffusion_lm.samplers.token_ancestral import TokenAncestral
from diffusion_lm.samplers.unmasking import Ancestral
from diffusion_lm.samplers.view import Decision, ranks

KEYS = StreamKeys.create(5)
MASK = 4
OPEN = without_ends(stubs.as_prompt(stubs.make_batch([2, 5, 3, 4], [8, 3, 6, 5], 11)), MASK)
TARGET = np.asarray(OPEN.target_mask)
TABLE = stubs.table_model(np.random.default_rng(2).normal(scale=2.0, size=(11, stubs.VOCAB)))


@pytest.mark.parametrize(
    "rule",
    [
        pytest.param(Ancestral(), marks=pytest.mark.thorough),
        Ancestral(remasking=Capped(0.04)),
        pytest.param(TokenAncestral(), marks=pytest.mark.thorough),
    ],
    ids=["ancestral", "remdm", "token_ancestral"],
)
def test_T42_cache_decided_for_the_whole_batch(rule, monkeypatch):
    """Steps that change nothing of a row cost it no pass, whatever other rows do, and the result stays the same."""
    sampler = masked(rule, steps=60)
    model = stubs.with_token_schedules(stubs.nano(**stubs.QUICK))
    quick = stubs.generate(sampler, model, OPEN, KEYS)
    alone = stubs.generate(sampler, model, stubs.rows_of(OPEN, [1]), KEYS)
    monkeypatch.setattr(MaskedLoop, "skip_idle_steps", lambda self, state: state)
    every = jax.jit(lambda prompt: sampler.generate(model, prompt, KEYS))(OPEN)
    np.testing.assert_array_equal(quick.tokens, every.tokens)
    np.testing.assert_allclose(quick.scores, every.scores, rtol=1e-5)
    np.testing.assert_array_equal(alone.tokens[0], quick.tokens[1])
    if rule.ignores_logits and not rule.remasks:
        assert quick.forward_passes[0] <= TARGET.sum(1).max(), "no more passes than the longest window has slots"
        assert alone.forward_passes[0] <= TARGET[1].sum()
    assert quick.forward_passes[0] < every.forward_passes[0]


@dataclasses.dataclass(frozen=True)
class OneMoreEachStep(SlotRule):
    """Samples one slot in the first step of a row, two in the second and so on, leftmost first.

    The state i32[R] counts the steps of each row over all its blocks, which `View.step` does not.
    """

    def init(self, rows):
        return jnp.zeros(rows, jnp.int32)

    def __call__(self, view, state):
        leftmost = ranks(-jnp.arange(view.open.shape[1])[None] + jnp.zeros(view.open.shape), view.open)
        return Decision(view.open & (leftmost <= state[:, None])), state + 1


def unmasked_at(decoded, steps):
    """i[rows,slots], the step after which each target slot is unmasked."""
    trace = np.asarray(decoded.trace.tokens)[:steps]
    return np.where(TARGET, (trace != MASK).argmax(axis=0), -1)


def by_counting(length, block):
    """The step at which each slot of a window is unmasked, written without a sampler."""
    found, step = [], 0
    for first in range(0, length, block or length):
        left = min(block or length, length - first)
        while left:
            taken = min(step + 1, left)
            found += [step] * taken
            left, step = left - taken, step + 1
    return found


@pytest.mark.parametrize("block", [0, 4])
def test_a_rule_keeps_a_state_of_its_own_for_each_row(block):
    """Across blocks, and whatever the other rows of the batch do."""
    sampler = masked(OneMoreEachStep(), block=block, keep_trace=True)
    at = unmasked_at(stubs.generate(sampler, TABLE, OPEN, KEYS), 11)
    for row, length in enumerate(TARGET.sum(axis=1)):
        assert at[row][TARGET[row]].tolist() == by_counting(length, block)


def test_rows_that_wait_for_a_cache_keep_their_state():
    """With a cache rows enter a block together; a waiting row takes no step, so its state must not count one."""
    from diffusion_lm.samplers.caching import PrefixCache

    model = stubs.nano(**stubs.QUICK)
    tokens = [
        np.asarray(stubs.generate(masked(OneMoreEachStep(), block=4, **cache), model, OPEN, KEYS).tokens)
        for cache in ({}, {"cache": PrefixCache()})
    ]
    np.testing.assert_array_equal(*tokens)


@dataclasses.dataclass(frozen=True)
class ThirdBest(SlotRule):
    """Samples the open slot whose third most likely token has the highest logit."""

    reads_logits = True

    def from_logits(self, logits, draws):
        return jnp.sort(logits, axis=-1)[..., -3]

    def decide(self, view):
        return Decision(view.open & (ranks(view.logit_values, view.open) < 1))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_rule_reads_its_own_function_of_the_logits(temperature):
    """Step by step against logits that are computed here; MASK is never among them."""
    model = stubs.nano(**stubs.QUICK)
    sampler = masked(ThirdBest(), temperature=temperature, keep_trace=True)
    decoded = stubs.generate(sampler, model, OPEN, KEYS)
    before = np.where(TARGET, MASK, np.asarray(OPEN.tokens))
    for after in np.asarray(decoded.trace.tokens)[:8]:
        hidden = model(jnp.asarray(before), visibility=Full(), positions=OPEN.positions, segment_ids=OPEN.segment_ids)
        third = np.sort(np.delete(np.asarray(model.logits(hidden)), MASK, axis=-1), axis=-1)[..., -3]
        for row in range(4):
            is_open = TARGET[row] & (before[row] == MASK)
            if is_open.any():
                expected = np.where(is_open, third[row], -np.inf).argmax()
                assert np.flatnonzero(before[row] != after[row]).tolist() == [expected]
        before = after


def test_a_slot_rule_works_on_canvases_too():
    sampler = canvas(OneMoreEachStep(), steps=4, keep_trace=True)
    prompt = without_ends(OPEN, mask_id=None)
    trace = np.asarray(stubs.generate(sampler, TABLE, prompt, KEYS).trace.tokens)
    changed = (trace[1:] != trace[:-1]).any(axis=0)
    leftmost = np.cumsum(TARGET, axis=1) <= 4
    assert not changed[~(TARGET & leftmost)].any(), "of the first four steps, at most four slots are sampled"
