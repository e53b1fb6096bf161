"""The law of what samplers write, against the enumerated one (trap T52). Each test also rejects a law that is wrong."""

import numpy as np
import pytest
import sampler_worlds as worlds
from sampler_stubs import masked

from diffusion_lm.core.rng import StreamKeys
from diffusion_lm.noise.schedules import Cosine, Linear
from diffusion_lm.samplers.counts import Even, Fixed, Fraction
from diffusion_lm.samplers.remasking_rates import Capped, LeastConfident, Plateau, Rescaled
from diffusion_lm.samplers.routing import Routed
from diffusion_lm.samplers.uniform import Renoised
from diffusion_lm.samplers.unmasking import AllSlots, Ancestral, EntropyBound, Ranked, Threshold

pytestmark = pytest.mark.thorough

ROWS = 20_000
WORLD = worlds.World.random(3, 3, seed=4)
STEPS = 3


def alphas(schedule, steps, last_time=0.0):
    t = 1 - (1 - last_time) * np.arange(steps + 1) / steps
    return np.asarray(schedule.alpha(t), np.float64)


def ancestral_law(world, alpha, sigma=None):
    law = worlds.all_masked(world)
    for i in range(len(alpha) - 1):
        last = i == len(alpha) - 2
        s = 0.0 if sigma is None else min(sigma(i, alpha), (1 - alpha[i + 1]) / max(alpha[i], 1e-30))
        reveal = (alpha[i + 1] - (1 - s) * alpha[i]) / (1 - alpha[i])
        law = worlds.coin_step(world, law, 1.0 if last else reveal, 0.0 if last else s)
    return law


@pytest.mark.parametrize(
    ("schedule", "last_time"),
    [(Linear(), 0.0), (Cosine(), 0.0), (Linear(), 0.3)],
    ids=["linear", "cosine", "ends_early"],
)
def test_T52_ancestral_law(schedule, last_time):
    tokens = worlds.decode(WORLD, Ancestral(last_time), ROWS, schedule=schedule, steps=STEPS)
    counts = worlds.histogram(WORLD, tokens)
    assert worlds.follows(counts, ancestral_law(WORLD, alphas(schedule, STEPS, last_time)))
    assert not worlds.follows(counts, ancestral_law(WORLD, alphas(schedule, 1))), "all at once is another law"


def first_hitting_law(world):
    law = worlds.all_masked(world)
    for _ in range(world.L):
        law = worlds.one_at_random(world, law)
    return law


def test_T52_first_hitting_law():
    rule = Ranked("random", Fixed(1))
    counts = worlds.histogram(WORLD, worlds.decode(WORLD, rule, ROWS))
    assert worlds.follows(counts, first_hitting_law(WORLD))
    assert not worlds.follows(counts, ancestral_law(WORLD, alphas(Linear(), STEPS)))


def test_T52_ancestral_goes_to_first_hitting():
    """The enumerated laws converge like 1/T; at T = 100 the sampler's draws cannot be told from the limit's."""
    distances = [
        np.abs(ancestral_law(WORLD, alphas(Linear(), steps)) - first_hitting_law(WORLD)).sum() / 2
        for steps in (4, 16, 64)
    ]
    assert distances[0] > 2.5 * distances[1] > 6 * distances[2]
    counts = worlds.histogram(WORLD, worlds.decode(WORLD, Ancestral(), 6000, steps=100))
    assert worlds.follows(counts, first_hitting_law(WORLD))


REMASKING = {
    "cap": (Capped(eta=0.3), lambda i, alpha: 0.3),
    "rescale": (Rescaled(eta=0.6), lambda i, alpha: 0.6 * min(1, (1 - alpha[i + 1]) / max(alpha[i], 1e-30))),
    "in_time": (Capped(eta=0.3, start=0.75, end=0.25), lambda i, alpha: 0.3 if i in (1, 2) else 0.0),
}


@pytest.mark.parametrize("name", REMASKING)
def test_T52_remdm_law(name):
    rule, sigma = REMASKING[name]
    alpha = alphas(Linear(), 4)
    counts = worlds.histogram(WORLD, worlds.decode(WORLD, Ancestral(remasking=rule), ROWS, steps=4))
    assert worlds.follows(counts, ancestral_law(WORLD, alpha, sigma))
    assert not worlds.follows(counts, ancestral_law(WORLD, alpha))


@pytest.mark.parametrize("name", ["plain", "cap", "rescale", "loop"])
def test_T52_remdm_keeps_the_marginals(name):
    """After each step the expected share of committed slots is alpha_s, remasking or not."""
    schedule, rule, steps = Linear(), None, 5
    if name == "loop":
        schedule, rule, steps = Plateau(0.8, start=0.6, end=0.2), Capped(0.2, start=0.6, end=0.2), 10
    elif name != "plain":
        rule = REMASKING[name][0]
    sampler = masked(Ancestral(remasking=rule), schedule=schedule, steps=steps, keep_trace=True)
    decoded = worlds.stubs.generate(sampler, WORLD.model, worlds.prompts(WORLD, 8000), StreamKeys.create(1))
    committed = (np.asarray(decoded.trace.tokens)[:, :, 1:] != WORLD.V).mean(axis=(1, 2))
    alpha = alphas(schedule, steps)[1:]
    error = 5 * np.sqrt(alpha * (1 - alpha) / 24_000) + 1e-6
    assert (np.abs(committed - alpha) < error).all(), (committed, alpha)


def test_T52_remdm_conf_masks_the_unsure_and_no_more_than_its_rate():
    """Two slots, one written with certainty: softmax(-p) takes the other back more often, both at the right rate."""
    logits = np.zeros((1, 9, 2, 3), np.float32)
    logits[0, :, 0, 0] = 30.0
    world = worlds.World(logits)
    sampler = masked(Ancestral(remasking=LeastConfident(eta=1.0)), steps=4, keep_trace=True)
    decoded = worlds.stubs.generate(sampler, world.model, worlds.prompts(world, 30_000), StreamKeys.create(2))
    trace = np.asarray(decoded.trace.tokens)[:, :, 1:]
    both = (trace[1] != 2).all(axis=1)
    taken = (trace[2][both] == 2).mean(axis=0)
    weights = np.exp([-1.0, -0.5]) / np.exp([-1.0, -0.5]).sum()
    limit = 0.25 / 0.5
    error = 5 * np.sqrt(0.25 / both.sum())
    np.testing.assert_allclose(taken, weights * limit, atol=error)
    assert taken[1] - taken[0] > 2 * error


def lowest_first(values, among):
    return sorted(np.flatnonzero(among), key=lambda i: values[i])


def test_T52_rdm_law():
    """Fresh draws and scores at all slots; the floor(N (1 - alpha_s)) lowest are MASK afterwards."""

    def move_leaving(k):
        def move(canvas, draws, log_p):
            low = lowest_first(log_p, np.ones(3, bool))[:k]
            after = np.where(canvas == WORLD.V, draws, canvas)
            after[low] = WORLD.V
            yield after, 1.0

        return move

    law = worlds.all_masked(WORLD)
    for k in (2, 1, 0):
        law = worlds.draw_step(WORLD, law, move_leaving(k))
    counts = worlds.histogram(WORLD, worlds.decode(WORLD, Routed(Linear()), ROWS, steps=3))
    assert worlds.follows(counts, law)
    assert not worlds.follows(counts, confident_law(WORLD)), "without taking tokens back it is another law"


def confident_law(world):
    def move(canvas, draws, log_p):
        masked = canvas == world.V
        best = lowest_first(-log_p, masked)[:1]
        yield np.where(np.isin(np.arange(world.L), best), draws, canvas), 1.0

    law = worlds.all_masked(world)
    for _ in range(world.L):
        law = worlds.draw_step(world, law, move)
    return law


def test_T52_low_confidence_law():
    """One token a step, the most probable of the draws."""
    counts = worlds.histogram(WORLD, worlds.decode(WORLD, Ranked("confidence", Even()), ROWS))
    assert worlds.follows(counts, confident_law(WORLD))
    assert not worlds.follows(counts, first_hitting_law(WORLD))


def test_T52_order_temperature_draws_slots_without_replacement():
    """`alg_temp`: the first slot follows softmax(confidence / temperature) over the masked slots' own draws."""
    temperature, first = 0.3, np.zeros(3)
    for draws in np.ndindex(3, 3, 3):
        p = WORLD.probs[0, -1][np.arange(3), list(draws)]
        weights = np.exp(p / temperature)
        first += p.prod() * weights / weights.sum()
    rule = Ranked("confidence", Even(), order_temperature=temperature)
    sampler = masked(rule, keep_trace=True)
    decoded = worlds.stubs.generate(sampler, WORLD.model, worlds.prompts(WORLD, ROWS), StreamKeys.create(3))
    written = np.asarray(decoded.trace.tokens)[0, :, 1:] != WORLD.V
    assert (written.sum(axis=1) == 1).all()
    assert worlds.follows(written.sum(axis=0), first)
    assert not worlds.follows(written.sum(axis=0), np.full(3, 1 / 3))


def test_T52_threshold_law():
    def move(canvas, draws, log_p):
        masked = canvas == WORLD.V
        chosen = masked & (np.exp(log_p) >= 0.6)
        chosen[lowest_first(-log_p, masked)[:1]] = True
        yield np.where(chosen, draws, canvas), 1.0

    law = worlds.all_masked(WORLD)
    for _ in range(3):
        law = worlds.draw_step(WORLD, law, move)
    counts = worlds.histogram(WORLD, worlds.decode(WORLD, Threshold(0.6), ROWS))
    assert worlds.follows(counts, law)
    assert not worlds.follows(counts, confident_law(WORLD))


def test_T52_entropy_bound_law():
    entropy = -(WORLD.probs[0] * np.log(WORLD.probs[0])).sum(axis=-1)

    def move(canvas, draws, log_p):
        H = entropy[WORLD.code(canvas)]
        order = lowest_first(H, canvas == WORLD.V)
        chosen = [i for n, i in enumerate(order) if sum(H[order[:n]]) <= 0.7]
        yield np.where(np.isin(np.arange(3), chosen), draws, canvas), 1.0

    law = worlds.all_masked(WORLD)
    for _ in range(3):
        law = worlds.draw_step(WORLD, law, move)
    counts = worlds.histogram(WORLD, worlds.decode(WORLD, EntropyBound(0.7), ROWS))
    assert worlds.follows(counts, law)
    every = worlds.draw_step(WORLD, worlds.all_masked(WORLD), lambda canvas, draws, log_p: [(draws, 1.0)])
    assert not worlds.follows(counts, every)


def test_T52_block_law():
    """Blocks of 2 and 1 slots, two ancestral steps and one: the second block sees a finished first one."""
    law = worlds.all_masked(WORLD)
    for slots, reveals in (((0, 1), (0.5, 1.0)), ((2,), (1.0,))):
        for reveal in reveals:

            def move(canvas, draws, log_p, slots=slots, reveal=reveal):
                free = [i for i in slots if canvas[i] == WORLD.V]
                for coins in np.ndindex(*[2] * len(free)):
                    after = canvas.copy()
                    after[[i for i, coin in zip(free, coins, strict=True) if coin]] = draws[
                        [i for i, coin in zip(free, coins, strict=True) if coin]
                    ]
                    share = np.prod([reveal if coin else 1 - reveal for coin in coins])
                    if share:
                        yield after, share

            law = worlds.draw_step(WORLD, law, move)
    counts = worlds.histogram(WORLD, worlds.decode(WORLD, Ancestral(), ROWS, steps=None, block=2))
    assert worlds.follows(counts, law)
    assert not worlds.follows(counts, ancestral_law(WORLD, alphas(Linear(), 3)))


@pytest.mark.parametrize("name", ["everything", "partial", "renoised"])
def test_T52_uniform_noise_law(name):
    """Noise of ordinary tokens: redraw all slots, two of three, or keep what the entropy bound accepts."""
    V, world = WORLD.V, WORLD
    entropy = -(world.probs[0] * np.log(world.probs[0])).sum(axis=-1)
    subsets = [(0, 1), (0, 2), (1, 2)]

    def move(canvas, draws, log_p, last=False):
        if name == "everything":
            yield draws, 1.0
        elif name == "partial":
            for chosen in subsets:
                yield np.where(np.isin(np.arange(3), chosen), draws, canvas), 1 / 3
        elif last:
            yield world.probs[0, world.code(canvas)].argmax(axis=-1), 1.0
        else:
            order = lowest_first(entropy[world.code(canvas)], np.ones(3, bool))
            H = entropy[world.code(canvas)]
            kept = [i for n, i in enumerate(order) if sum(H[order[:n]]) <= 0.7]
            free = [i for i in range(3) if i not in kept]
            for noise in np.ndindex(*[V] * len(free)):
                after = draws.copy()
                after[free] = noise
                yield after, V ** -len(free)

    rule = {
        "everything": AllSlots(),
        "partial": Ranked("random", Fraction(0.5)),
        "renoised": Renoised(EntropyBound(0.7)),
    }[name]
    start = np.where((world.canvases < V).all(axis=1), V**-3.0, 0.0)
    law = worlds.draw_step(world, start, move)
    law = worlds.draw_step(world, law, lambda *step: move(*step, last=True))
    counts = worlds.histogram(world, worlds.decode_canvas(world, rule, ROWS, seed=4, steps=2, exit_tolerance=None))
    assert worlds.follows(counts, law)
    other = worlds.draw_step(world, start, lambda *step: move(*step, last=True))
    assert not worlds.follows(counts, other), "one step is another law than two"
