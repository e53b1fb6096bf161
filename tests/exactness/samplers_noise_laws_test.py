"""Samplers of score entropy, of hybrid noise and of uniform noise with corrections, against enumerated laws.

Laws are made from rate matrices and posteriors in float64, not from the formulas of the samplers. `Exact` networks know
the data's law at every noise level: with them many steps must give the data's law itself.
"""

import dataclasses
import itertools
import types
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import sampler_worlds as worlds
import scipy.linalg
from sampler_stubs import canvas, masked

from diffusion_lm.architectures.base import BoundModel, Hidden
from diffusion_lm.core.rng import StreamKeys
from diffusion_lm.nn.head import Head
from diffusion_lm.noise.process import Absorbing, Hybrid, Uniform
from diffusion_lm.noise.schedules import Geometric, LogLinear
from diffusion_lm.samplers.hybrid import HybridAncestral, SelfCorrected
from diffusion_lm.samplers.ratios import ScoreEuler, ScoreTweedie
from diffusion_lm.samplers.uniform import PredictorCorrector, UniformAncestral

pytestmark = pytest.mark.thorough

ROWS, V, L = 20_000, 3, 2
WORLD = worlds.World.random(V, L, seed=7)
LOW = worlds.World(WORLD.logits - 2.5)
"""Ratios so small that a MASK does not change for certain in one step."""
COUPLED = worlds.World.random(V, L, seed=1, scale=2.5)
"""Slots that depend on each other, so that a corrector changes the law."""
GEOMETRIC, LAST_TIME, STEPS = Geometric(0.1, 3.0), 0.2, 3


def per_slot(law, cell):
    """One step in which every slot follows a law of its own, `cell(canvas code, slot)`: f[V + 1]."""
    after = np.zeros_like(law)
    for k in np.flatnonzero(law):
        after += law[k] * np.multiply.outer(*(cell(k, slot) for slot in range(L))).reshape(-1)
    return after


def uniform_start():
    return (WORLD.canvases < V).all(axis=1) / V**L


def rates(masked):
    """Q[j,i], the rate from token i to j: to MASK, or among the V ordinary tokens."""
    Q = np.zeros((V + 1, V + 1))
    if masked:
        Q[V] = 1.0
        Q -= np.eye(V + 1)
        Q[V, V] = 0.0
    else:
        Q[:V, :V] = 1.0 / V - np.eye(V)
    return Q


def ratio_law(kind, masked, scaled=False, reading="ratios", world=WORLD):
    """The released sampler: `kind` steps on an even grid from 1 to `LAST_TIME`, then a Tweedie step without MASK."""
    Q = rates(masked)
    times = np.linspace(1.0, LAST_TIME, STEPS)
    law = worlds.all_masked(WORLD) if masked else uniform_start()

    def sigma(t):
        return float(GEOMETRIC.sigma(t))

    def ratios(k, slot, t):
        z, s = world.canvases[k, slot], world.logits[0, k, slot].astype(np.float64)
        if scaled:
            alpha = np.exp(-sigma(t))
            s = s + np.log(alpha / (1 - alpha)) - np.log(V)
        r = np.exp(s)
        if reading == "softmax":
            return z, r / r[:V].sum()
        r[z] = 1.0
        if not masked:
            r[V] = 0.0
        return z, r

    def tweedie(k, slot, t, s):
        z, r = ratios(k, slot, t)
        d = sigma(t) - (0.0 if s is None else sigma(s))
        weights = np.maximum(scipy.linalg.expm(-d * Q) @ r, 0) * scipy.linalg.expm(d * Q)[z]
        if s is None:
            weights[V] = 0.0
        return weights / weights.sum()

    def euler(k, slot, t, s):
        z, r = ratios(k, slot, t)
        rate = sigma(t) * np.log(GEOMETRIC.sigma_max / GEOMETRIC.sigma_min)
        weights = (t - s) * rate * Q[z] * r
        weights[z] = 0.0
        weights[z] = max(1.0 - weights.sum(), 0.0)
        return weights / weights.sum()

    steps = {"tweedie": tweedie, "euler": euler}
    for t, s in itertools.pairwise(times):
        law = per_slot(law, lambda k, slot, t=t, s=s: steps[kind](k, slot, t, s))
    return per_slot(law, lambda k, slot: tweedie(k, slot, times[-1], None))


@pytest.mark.parametrize("scaled", [False, True], ids=["raw", "scaled"])
@pytest.mark.parametrize("absorbing", [True, False], ids=["absorbing", "uniform"])
@pytest.mark.parametrize("kind", ["tweedie", "euler"])
def test_T52_score_entropy_law(kind, absorbing, scaled):
    rule = {"tweedie": ScoreTweedie, "euler": ScoreEuler}[kind](scaled, LAST_TIME)
    world = LOW if absorbing and not scaled else WORLD
    if absorbing:
        tokens = worlds.decode(world, rule, ROWS, schedule=GEOMETRIC, steps=STEPS)
    else:
        tokens = worlds.decode_canvas(world, rule, ROWS, process=Uniform(GEOMETRIC), steps=STEPS)
    counts = worlds.histogram(world, tokens)
    assert worlds.follows(counts, ratio_law(kind, absorbing, scaled, world=world))
    # With their scale, large ratios leave little between the two rules under MASK noise.
    other = kind if absorbing and scaled else {"tweedie": "euler", "euler": "tweedie"}[kind]
    assert not worlds.follows(counts, ratio_law(other, absorbing, scaled and not absorbing, world=world))
    if not absorbing:
        assert not worlds.follows(counts, ratio_law(kind, absorbing, scaled, "softmax", world))


HYBRID = Hybrid(uniform_share=0.4)


def decode_hybrid(rule, steps, process=HYBRID):
    sampler = canvas(rule, process=process, steps=steps)
    decoded = worlds.stubs.generate(sampler, WORLD.model, worlds.prompts(WORLD, ROWS), StreamKeys.create(0))
    return np.asarray(decoded.tokens)[:, 1:]


def hybrid_step(law, t, s, noise=HYBRID):
    """q(z_s | z_t, p) = q(z_t | z_s) q(z_s | p) / norm."""
    now, before = ([float(x) for x in noise.marginal(jnp.float32(time))] for time in (t, s))
    pi_t, pi_s = (np.append(np.full(V, level[2] / V), level[1]) for level in (now, before))
    r = now[0] / before[0]

    def cell(k, slot):
        z = WORLD.canvases[k, slot]
        p = np.append(WORLD.probs[0, k, slot], 0.0)
        q = (r * (np.arange(V + 1) == z) + pi_t[z] - r * pi_s[z]) * (before[0] * p + pi_s)
        return q / q.sum()

    return per_slot(law, cell)


def hybrid_law(steps, noise=HYBRID):
    law = worlds.all_masked(WORLD)
    for i in range(steps):
        law = hybrid_step(law, 1 - i / steps, 1 - (i + 1) / steps, noise)
    return law


def test_T52_hybrid_ancestral_law():
    """GIDD's posterior: MASK, wrong tokens and corrections of them."""
    counts = worlds.histogram(WORLD, decode_hybrid(HybridAncestral(), STEPS))
    assert worlds.follows(counts, hybrid_law(STEPS))
    assert not worlds.follows(counts, hybrid_law(STEPS, Hybrid(uniform_share=0.0)))


def test_T53_hybrid_without_wrong_tokens_is_ancestral_sampling_of_mask_noise():
    noise = Hybrid(uniform_share=0.0)
    counts = worlds.histogram(WORLD, decode_hybrid(HybridAncestral(), STEPS, noise))
    law = worlds.all_masked(WORLD)
    for i in range(STEPS):
        law = worlds.coin_step(WORLD, law, 1 / (STEPS - i))
    assert worlds.follows(counts, law)


def corrected(law, temperature, best=1):
    """Draws at every slot; of those that differ, the most probable one is written."""
    after = np.zeros_like(law)
    for k in np.flatnonzero(law):
        canvas = WORLD.canvases[k]
        q = WORLD.probs[0, k] ** (1 / temperature)
        q /= q.sum(axis=-1, keepdims=True)
        for draws in itertools.product(range(V), repeat=L):
            p = q[np.arange(L), list(draws)]
            differs = [i for i in range(L) if draws[i] != canvas[i]]
            written = canvas.copy()
            for i in sorted(differs, key=lambda i: -p[i])[:best]:
                written[i] = draws[i]
            after[WORLD.code(written)] += law[k] * p.prod()
    return after


def test_T52_self_correction_law():
    rule = SelfCorrected(HybridAncestral(), corrections=2, tokens=1, correction_temperature=0.6)
    counts = worlds.histogram(WORLD, decode_hybrid(rule, STEPS + 2))
    filled = hybrid_law(STEPS)
    once = corrected(filled, 0.6)
    assert worlds.follows(counts, corrected(once, 0.6))
    for wrong in (filled, once, corrected(corrected(filled, 1.0), 1.0), corrected(corrected(filled, 0.6, 2), 0.6, 2)):
        assert not worlds.follows(counts, wrong)


def psi_law(kappa, steps, start=1.0, end=0.0):
    law = uniform_start()
    for i in range(steps):
        t, s = 1 - i / steps, 1 - (i + 1) / steps
        share = kappa if end < t <= start and i < steps - 1 else 1.0

        def cell(k, slot, t=t, s=s, share=share):
            z, p = COUPLED.canvases[k, slot], COUPLED.probs[0, k, slot]

            def posterior(alpha_t, alpha_s):
                r = alpha_t / alpha_s
                q = (r * (np.arange(V) == z) + (1 - r) / V) * (alpha_s * p + (1 - alpha_s) / V)
                return q / q.sum()

            mixed = share * posterior(1 - t, 1 - s) + (1 - share) * ((1 - s) * posterior(1 - t, 1.0) + s / V)
            return np.append(mixed, 0.0)

        law = per_slot(law, cell)
    return law


@pytest.mark.parametrize("times", [{}, {"start": 0.6, "end": 0.3}], ids=["always", "in_time"])
def test_T52_predictor_corrector_law(times):
    rule = PredictorCorrector(kappa=0.1, **times)
    counts = worlds.histogram(COUPLED, worlds.decode_canvas(COUPLED, rule, ROWS, steps=8))
    assert worlds.follows(counts, psi_law(0.1, 8, **times))
    assert not worlds.follows(counts, psi_law(1.0, 8))
    if times:
        assert not worlds.follows(counts, psi_law(0.1, 8))


def test_T53_kappa_1_is_ancestral_sampling_bit_for_bit():
    rules = UniformAncestral(), PredictorCorrector(kappa=1.0)
    plain, with_rule = (worlds.decode_canvas(WORLD, rule, 500, steps=4) for rule in rules)
    np.testing.assert_array_equal(plain, with_rule)


JOINT = np.random.default_rng(3).dirichlet(np.full(V**L, 0.4)).reshape(V, V)


@dataclasses.dataclass(frozen=True, eq=False)
class Exact:
    """Knows `JOINT` under a noise: reads the rate of noise and says ratios, or p(x_i | the other noisy tokens)."""

    noise: Any
    says: str

    @property
    def spec(self) -> Any:
        return types.SimpleNamespace(
            vocab_size=self.size, logits_chunk=1 << 22, self_conditioning=False, time_conditioning=True
        )

    @property
    def size(self) -> int:
        return V + self.noise.has_mask

    def hidden(self, params, inputs):
        rate = inputs.time.max(axis=1)
        grid = jnp.linspace(0.0, 1.0, 20_001)
        t = jnp.interp(rate, 1.0 - self.noise.marginal(grid).signal, grid)
        level = self.noise.marginal(t)
        # q[row,z,x], the probability of a noisy token given a clean one.
        ordinary = (level.uniform / V)[:, None, None] + level.signal[:, None, None] * jnp.eye(V)
        q = jnp.concatenate([ordinary, jnp.broadcast_to(level.mask[:, None, None], (len(rate), 1, V))], axis=1)
        z = inputs.tokens[:, 1:]
        seen = [jnp.take_along_axis(q, z[:, i, None, None], axis=1)[:, 0] for i in range(L)]
        joint = jnp.asarray(JOINT, jnp.float32)
        # Of each slot's clean token with the other slot's noisy one.
        clean = jnp.stack([seen[1] @ joint.T, seen[0] @ joint], axis=1)
        if self.says == "clean":
            values = jnp.pad(jnp.log(clean), ((0, 0), (0, 0), (0, 1)), constant_values=9.0)
        else:
            noisy = jnp.einsum("rzx,rix->riz", q, clean)
            values = jnp.log(jnp.maximum(noisy, 1e-12)) - jnp.log(jnp.take_along_axis(noisy, z[..., None], axis=2))
            # What is at the slot's own token must not matter.
            values = jnp.where(jnp.arange(V + 1) == z[..., None], 7.0, values)
        return Hidden(jnp.pad(values[..., : self.size], ((0, 0), (1, 0), (0, 0))))

    def head(self, params):
        return Head(jnp.eye(self.size), vocab_size=self.size)


MANY = {
    "sedd_tweedie": (Absorbing(LogLinear()), ScoreTweedie(last_time=1e-3), "ratios"),
    "sedd_euler": (Absorbing(LogLinear()), ScoreEuler(last_time=1e-3), "ratios"),
    "sedd_tweedie_uniform": (Uniform(Geometric(1e-2, 9.0)), ScoreTweedie(last_time=1e-3), "ratios"),
    "sedd_euler_uniform": (Uniform(Geometric(1e-2, 9.0)), ScoreEuler(last_time=1e-3), "ratios"),
    "gidd": (Hybrid(uniform_share=0.4, gamma=2.0), HybridAncestral(), "clean"),
    "udlm": (Uniform(), UniformAncestral(), "clean"),
    "psi": (Uniform(), PredictorCorrector(kappa=0.97), "clean"),
}


@pytest.mark.parametrize("name", MANY)
def test_an_exact_network_and_many_steps_give_the_law_of_the_data(name):
    process, rule, says = MANY[name]
    model = BoundModel(Exact(process, says), {})

    def distance(steps, rows=12_000):
        if isinstance(process, Absorbing):
            sampler = masked(rule, schedule=process.schedule, steps=steps)
        else:
            sampler = canvas(rule, process=process, steps=steps)
        prompt = worlds.prompts(WORLD, rows, V if process.has_mask else None)
        decoded = worlds.stubs.generate(sampler, model, prompt, StreamKeys.create(steps))
        counts = np.bincount(np.asarray(decoded.tokens)[:, 1:] @ (V, 1), minlength=V**L)
        return 0.5 * np.abs(counts / rows - JOINT.reshape(-1)).sum()

    few, many = distance(2), distance(64)
    # The Monte-Carlo error of 12,000 draws over 9 cells is about 0.01.
    assert many < 0.03 < 0.1 < few, (few, many)
