"""The laws of rules that write several tokens a step: the factor rule, and random slots in even counts."""

import itertools

import numpy as np
import pytest
import sampler_worlds as worlds

from diffusion_lm.samplers.counts import Even
from diffusion_lm.samplers.unmasking import Factor, Ranked

pytestmark = pytest.mark.thorough

ROWS = 20_000
WORLD = worlds.World.random(3, 3, seed=4)


def repeated(move, steps):
    law = worlds.all_masked(WORLD)
    for _ in range(steps):
        law = worlds.draw_step(WORLD, law, move)
    return law


def most_confident(canvas, log_p):
    masked = np.flatnonzero(canvas == WORLD.V)
    return masked[np.argsort(-log_p[masked], kind="stable")]


def test_T52_factor_law():
    """The n most confident draws with (n + 1)(1 - p_n) below the factor, and at least one."""
    factor = 1.4

    def move(canvas, draws, log_p):
        order = most_confident(canvas, log_p)
        chosen = [slot for n, slot in enumerate(order, 1) if n == 1 or (n + 1) * (1 - np.exp(log_p[slot])) < factor]
        yield np.where(np.isin(np.arange(WORLD.L), chosen), draws, canvas), 1.0

    def single(canvas, draws, log_p):
        yield np.where(np.isin(np.arange(WORLD.L), most_confident(canvas, log_p)[:1]), draws, canvas), 1.0

    counts = worlds.histogram(WORLD, worlds.decode(WORLD, Factor(factor), ROWS))
    assert worlds.follows(counts, repeated(move, WORLD.L))
    assert not worlds.follows(counts, repeated(single, WORLD.L)), "one token a step is another law"


def test_T52_random_slots_in_even_counts_law():
    """Two slots drawn without replacement, then the last one: three slots in two steps."""

    def move(canvas, draws, log_p):
        masked = np.flatnonzero(canvas == WORLD.V)
        pairs = list(itertools.combinations(masked, min(2, len(masked))))
        for chosen in pairs:
            yield np.where(np.isin(np.arange(WORLD.L), chosen), draws, canvas), 1 / len(pairs)

    counts = worlds.histogram(WORLD, worlds.decode(WORLD, Ranked("random", Even()), ROWS, steps=2))
    assert worlds.follows(counts, repeated(move, 2))
    one_by_one = worlds.one_at_random(WORLD, worlds.one_at_random(WORLD, worlds.all_masked(WORLD)))
    assert not worlds.follows(counts, worlds.one_at_random(WORLD, one_by_one)), "one token a step is another law"
