"""What holds at every step of every masked sampler, over grids of lengths, steps and blocks."""

import itertools

import jax.numpy as jnp
import model_stubs as stubs
import numpy as np
import pytest
from sampler_rules import KEYS, LENGTHS, MASK, PROMPT, RULES, TARGET, decode

from diffusion_lm.core.types import TokenStats
from diffusion_lm.noise.process import Absorbing
from diffusion_lm.noise.schedules import Cosine
from diffusion_lm.samplers.blocks import RowBlocks
from diffusion_lm.samplers.counts import Even, Fixed, Fraction, Proportional, Scheduled
from diffusion_lm.samplers.unmasking import EntropyBound, Factor, Ranked, Threshold
from diffusion_lm.samplers.view import View

pytestmark = pytest.mark.thorough


def test_T39_transfer_counts():
    """Steps of the blocks, and commits of the steps, for all lengths, steps and blocks: whole, and nothing is left."""
    for length, steps, block in itertools.product((1, 2, 5, 7, 12), (None, 1, 3, 5, 8, 40), (0, 1, 3, 5, 20)):
        blocks = RowBlocks.of(jnp.ones((1, length), bool), block, steps)
        number = int(blocks.counts[0])
        assert number == (-(-length // block) if block else 1)
        every = jnp.arange(number)
        each = np.asarray(blocks.steps_in(every))
        sizes = np.asarray(blocks.active(every).sum(axis=1))
        assert each.min() >= 1
        assert sizes.sum() == length
        assert each.sum() == (length if steps is None else max(steps, number))
        assert steps is None or np.ptp(each) <= 1
        assert each.sum() <= blocks.most_steps()


def counted_view(length, open_slots, step, steps):
    active = np.ones((1, length), bool)
    return View(
        canvas=jnp.zeros((1, length), jnp.int32),
        active=jnp.asarray(active),
        open=jnp.asarray(np.arange(length)[None] < open_slots),
        step=jnp.array([step]),
        steps=jnp.array([steps]),
        log_prob=jnp.zeros((1, length)),
        keys=KEYS.per_token("t", jnp.zeros((1, length), jnp.uint32), jnp.arange(length)[None]),
        process=Absorbing(),
        vocab_size=stubs.VOCAB,
        mask_id=MASK,
    )


@pytest.mark.parametrize("count", [Even(), Scheduled(), Scheduled(Cosine())], ids=repr)
def test_T39_counts_sum_to_the_masks(count):
    for length, steps in itertools.product((1, 2, 5, 10, 12), (1, 2, 3, 10, 17)):
        left, taken = length, []
        for step in range(steps):
            taken.append(int(count.slots(counted_view(length, left, step, steps))[0, 0]))
            left -= taken[-1]
        assert min(taken) >= 0
        assert left == 0
        if isinstance(count, Even):
            assert taken == [length // steps + (i < length % steps) for i in range(steps)]


def test_T39_the_published_counts():
    """By hand: Dream's floor(n (1 - s/t)) with its last step, RDM's and DiffuLLaMA's floors, fractions rounded up."""
    left, taken = 10, []
    grid = np.linspace(1, 1e-3, 5)
    for step in range(3):
        taken.append(int(Proportional(1e-3).slots(counted_view(10, left, step, 4))[0, 0]))
        assert taken[-1] == int(left * (1 - grid[step + 1] / grid[step]))
        left -= taken[-1]
    assert [int(Scheduled().left_masked(counted_view(10, 10, i, 10))[0, 0]) for i in range(10)] == list(
        range(9, -1, -1)
    )
    rdm = [int(Scheduled(Cosine()).left_masked(counted_view(10, 10, i, 4))[0, 0]) for i in range(4)]
    assert rdm == [int(10 * np.cos(np.pi * t / 8) + 1e-9) for t in (1, 2, 3, 4)]
    assert [int(Fraction(0.3).slots(counted_view(n, n, 0, 1))[0, 0]) for n in (1, 3, 10, 11)] == [1, 1, 3, 4]


GRID = [(5, 2), (1, 4), (None, 3), (3, 0)]
WHOLE_GRID = ("ancestral", "low_confidence", "threshold")


@pytest.mark.parametrize("name", RULES)
def test_T45_stranded_masks_T46_minus_infinity_ties_T51_progress(name):
    """No MASK at the end; committed tokens stand; only the active block changes; steps are bounded and not idle."""
    rule = RULES[name]
    for steps, block in GRID if name in WHOLE_GRID else GRID[:1]:
        decoded = decode(rule, steps=steps, block=block, keep_trace=True)
        tokens, trace = np.asarray(decoded.tokens), np.asarray(decoded.trace.tokens)
        assert not (tokens[TARGET] == MASK).any(), "T45, T35: nothing is left masked"
        np.testing.assert_array_equal(trace[-1], tokens)
        assert decoded.forward_passes.max() <= len(trace)
        start = np.where(TARGET, MASK, np.asarray(PROMPT.tokens))
        canvases = np.concatenate([start[None], trace])
        for row, length in enumerate(LENGTHS):
            window = canvases[:, row, TARGET[row]]
            before, after = window[:-1], window[1:]
            open_before = before == MASK
            if not rule.remasks:
                assert (after[~open_before] == before[~open_before]).all(), "T46: committed tokens stand"
            changed = before != after
            size = block or length
            for step in np.flatnonzero(changed.any(axis=1)):
                touched = np.flatnonzero(changed[step]) // size
                assert len(set(touched)) == 1, "T45: one block at a time"
                assert not open_before[step, : touched[0] * size].any(), "T45: and those to its left are finished"
                if not rule.remasks:
                    assert not changed[step, (touched[0] + 1) * size :].any()
            if isinstance(rule, Threshold | Factor | EntropyBound):
                idle = open_before.any(axis=1) & ~changed.any(axis=1)
                assert not idle.any(), "T51: at least one commit a step"


@pytest.mark.parametrize("step", [1, -1], ids=["first", "last"])
def test_T46_more_asked_for_than_there_is(step):
    """Seven slots wanted, three open: the rest of the row, -inf or not, is left alone.

    The open slot of -inf is the first of the row, or the last: after all closed ones, which -inf as a key ties with it.
    """
    log_p = jnp.array([[-jnp.inf, -0.1, -jnp.inf, -3e30, -0.5, -0.2]])[:, ::step]
    is_open = jnp.array([[True, False, False, True, False, True]])[:, ::step]
    stats = TokenStats(jnp.ones((1, 6), int), jnp.ones((1, 6), int), log_p, log_p, -log_p, log_p)
    view = counted_view(6, 6, 0, 1).replace(open=is_open, draws=stats)
    for rule in (Ranked("confidence", Fixed(7)), Threshold(0.9, at_least=Fixed(7)), Ranked("entropy", Fixed(3))):
        np.testing.assert_array_equal(rule.decide(view).sample, is_open)
    expected = jnp.array([[False, False, False, True, False, True]])[:, ::step]
    np.testing.assert_array_equal(Ranked("confidence", Fixed(2)).decide(view).sample, expected)


def test_T04_confidence_in_bf16():
    """Probabilities that round to the same number keep their order, since logarithms are ranked."""
    log_p = jnp.array([[-3e-9, -1e-9, -2e-9]], jnp.float32)
    assert len(set(np.asarray(jnp.exp(log_p))[0])) == 1
    stats = TokenStats(jnp.ones((1, 3), int), jnp.ones((1, 3), int), log_p, log_p)
    view = counted_view(3, 3, 0, 3).replace(draws=stats)
    np.testing.assert_array_equal(Ranked("confidence", Fixed(1)).decide(view).sample, [[False, True, False]])


def test_T51_progress_of_thresholds():
    """Never met: one token a pass. Met by everything: one pass, a block each where there are blocks."""
    flat = stubs.table_model(np.zeros((12, stubs.VOCAB), np.float32))
    for rule in (Threshold(0.99), Factor(1e-9), EntropyBound(0.0)):
        decoded = decode(rule, model=flat, keep_trace=True)
        np.testing.assert_array_equal(decoded.forward_passes, max(LENGTHS))
        # One in each pass, and not all of them in the last, which fills what is left.
        left = ((np.asarray(decoded.trace.tokens) == MASK) & TARGET).sum(axis=2)
        np.testing.assert_array_equal(left, np.maximum(np.asarray(LENGTHS) - 1 - np.arange(len(left))[:, None], 0))
    for block, passes in ((0, 1), (2, 5)):
        decoded = decode(Threshold(0.0), model=flat, block=block)
        np.testing.assert_array_equal(decoded.forward_passes, passes)
    decoded = decode(Threshold(0.99, at_least=Even()), model=flat, steps=3)
    np.testing.assert_array_equal(decoded.forward_passes, 3)
