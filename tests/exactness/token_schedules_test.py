"""Learned schedules (GenMD4): bound, gradient and sampler against worlds in which every mask and path is summed."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sampler_stubs
import sampler_worlds as worlds
import scipy.linalg
import scipy.special
import tiny_world
import tiny_worlds

from diffusion_lm.architectures.base import BoundModel
from diffusion_lm.architectures.exponents import ONE, WithTokenSchedules
from diffusion_lm.core.errors import ConfigError
from diffusion_lm.core.rng import StreamKeys
from diffusion_lm.core.special import SpecialTokens
from diffusion_lm.noise.time_sampling import DiscreteTime, UniformTime
from diffusion_lm.objectives.masked_diffusion import MaskedDiffusion
from diffusion_lm.objectives.token_schedules import TokenSchedules
from diffusion_lm.samplers.token_ancestral import TokenAncestral
from diffusion_lm.samplers.unmasking import Ancestral

V, L = 3, 3
WORLD = worlds.World.random(V, L, seed=4)
MASKS = np.array(list(itertools.product((False, True), repeat=L)))
TARGETS = np.array(list(itertools.product(range(V), repeat=L)))
TARGET = np.array([2, 0, 1])
KEYS = StreamKeys.create(5)
W = np.array([0.5, 1.2, 2.5])
SPECIAL = SpecialTokens(V + 1, mask_id=V)
OBJECTIVE = TokenSchedules(time=UniformTime())


def model_of(w) -> BoundModel:
    """The world's network with exponents w; that of MASK is another number, which nothing may read."""
    raw = np.append(np.log(np.expm1(np.asarray(w, np.float64))), 4.0)
    params = {"exponents": {"raw": jnp.asarray(raw, jnp.float32)}}
    return BoundModel(WithTokenSchedules(WORLD.model.architecture), params)


# The references: numpy in float64, which knows nothing of the library.


def integrand(w, target) -> np.ndarray:
    """f64[2^L], t times the cost of all masked slots, mask by mask."""
    values = []
    for masked in MASKS:
        mu = WORLD.probs[0, WORLD.code(np.where(masked, V, target))]
        own = mu[np.arange(L), target]
        values.append(((mu * w).sum(axis=-1) - w[target] * (1 + np.log(own)))[masked].sum())
    return np.array(values)


def mask_law(w, target, t) -> np.ndarray:
    """f64[2^L], q(mask | target) at time t."""
    rate = t ** w[target]
    return np.where(MASKS, rate, 1 - rate).prod(axis=1)


def nodes(low=0.0, points=40) -> tuple[np.ndarray, np.ndarray]:
    """Times and weights of the mean over (low, 1); in t^(1/4), so that no power of t is singular at 0."""
    x, weight = np.polynomial.legendre.leggauss(points)
    v = low**0.25 + (1 - low**0.25) * 0.5 * (x + 1)
    weight = weight * 0.5 * (1 - low**0.25) * 4 * v**3 / (1 - low)
    return v**4, weight


def nelbo(w, target, low=0.0) -> float:
    """The integral over (low, 1), and the cost of what is MASK at `low` under p(j) ~ low^(w_j)."""
    total = sum(
        (1 - low) * weight * (mask_law(w, target, t) @ integrand(w, target)) / t
        for t, weight in zip(*nodes(low), strict=True)
    )
    if low:
        log_p = w * np.log(low) - scipy.special.logsumexp(w * np.log(low))
        total += (low ** w[target] * -log_p[target]).sum()
    return float(total)


def generator(w) -> np.ndarray:
    """f64[K,K], rates of the reverse process in -log t: a masked slot becomes j at the rate w_j mu_j, whatever t is."""
    rates = np.zeros((len(WORLD.canvases),) * 2)
    for k, canvas in enumerate(WORLD.canvases):
        for slot in np.flatnonzero(canvas == V):
            for j in range(V):
                after = WORLD.code(np.where(np.arange(L) == slot, j, canvas))
                rates[k, after] += w[j] * WORLD.probs[0, k, slot, j]
    return rates - np.diag(rates.sum(axis=1))


def limit_law(w) -> np.ndarray:
    """f64[K], what the process ends in: the law of its jumps, one slot after another."""
    rates = generator(w)
    jumps = np.where(np.eye(len(rates)), 0.0, rates / np.maximum(-np.diag(rates), 1e-30)[:, None])
    law = worlds.all_masked(WORLD)
    for _ in range(L):
        law = law @ jumps
    return law


def law_from(w, low) -> np.ndarray:
    """f64[targets], the process down to `low`, and p(j) ~ low^(w_j) for what is MASK then."""
    law = worlds.all_masked(WORLD) @ scipy.linalg.expm(-np.log(low) * generator(w))
    fill = low**w / (low**w).sum()
    fits = (WORLD.canvases[None] == TARGETS[:, None]) | (WORLD.canvases[None] == V)
    filled = np.where(WORLD.canvases[None] == V, fill[TARGETS][:, None], 1.0).prod(axis=-1)
    return (fits.all(axis=-1) * filled) @ law


def weighted(targets, weights) -> tiny_world.Batch:
    batch = tiny_world.batch_of(targets, SPECIAL)
    return batch.replace(loss_weights=batch.loss_weights * jnp.asarray(weights, jnp.float32)[:, None])


def padded(mask) -> jax.Array:
    return jnp.asarray(np.pad(mask, ((0, 0), (1, 0))))


def expected_terms(model, target, low, draws):
    """(loss_sum, its gradient by w) in the mean over times and over all masks, or all pairs of them; one batch."""
    times, weights = nodes(low, 24)
    chosen = list(itertools.product(range(len(MASKS)), repeat=draws))
    probability = np.concatenate(
        [
            weight * mask_law(W, target, t)[np.array(chosen)].prod(axis=1)
            for t, weight in zip(times, weights, strict=True)
        ]
    )
    rows = np.tile(chosen, (len(times), 1))
    batch = weighted(np.tile(target, (len(rows), 1)), probability)
    t_BT = jnp.asarray(np.broadcast_to(np.repeat(times, len(chosen))[:, None], batch.tokens.shape), jnp.float32)
    masks = tuple(padded(MASKS[rows[:, number]]) for number in range(draws))

    def loss(raw):
        changed = BoundModel(model.architecture, {"exponents": {"raw": raw}})
        terms = OBJECTIVE.terms(t_BT, masks, changed, batch, KEYS, train=False, factor=1 - low, low=low)
        return terms.loss_sum

    raw = model.params["exponents"]["raw"]
    value, gradient = jax.jit(jax.value_and_grad(loss))(raw)
    # By w itself: d softplus / d raw is a sigmoid.
    assert gradient[V] == 0, "MASK has no schedule"
    return float(value), np.asarray(gradient[:V] / jax.nn.sigmoid(raw[:V]), np.float64)


@pytest.mark.parametrize("low", [0.0, 0.2])
def test_the_gradient_of_two_draws_is_the_derivative_of_the_bound(low):
    """Pathwise and score part over all pairs of masks; the pathwise part alone is another vector."""
    step = 1e-5
    derivative = np.array(
        [(nelbo(W + e, TARGET, low) - nelbo(W - e, TARGET, low)) / (2 * step) for e in step * np.eye(V)]
    )
    value, gradient = expected_terms(model_of(W), TARGET, low, draws=2)
    np.testing.assert_allclose(value, nelbo(W, TARGET, low), rtol=1e-4)
    np.testing.assert_allclose(gradient, derivative, rtol=1e-3, atol=1e-4)
    one_value, pathwise = expected_terms(model_of(W), TARGET, low, draws=1)
    np.testing.assert_allclose(one_value, value, rtol=1e-4)
    assert np.abs(pathwise - derivative).max() > 0.1


def test_drawn_gradients_are_those_of_the_bound():
    """`loss` itself, its own times and masks: two equal draws, or masks at another rate, would show here."""
    low, rows = 0.2, 40_000
    objective = TokenSchedules(time=UniformTime(low=low))
    batch = tiny_world.batch_of(np.tile(TARGET, (rows, 1)), SPECIAL)
    model = model_of(W)

    def loss(raw):
        changed = BoundModel(model.architecture, {"exponents": {"raw": raw}})
        return objective.loss(changed, batch, KEYS).loss_sum / rows

    value, gradient = jax.jit(jax.value_and_grad(loss))(model.params["exponents"]["raw"])
    exact, derivative = expected_terms(model, TARGET, low, draws=2)
    raw = np.asarray(model.params["exponents"]["raw"])[:V]
    np.testing.assert_allclose(value, exact, rtol=0.02)
    np.testing.assert_allclose(gradient[:V] * (1 + np.exp(-raw)), derivative, atol=0.08)
    _, pathwise = expected_terms(model, TARGET, low, draws=1)
    assert np.abs(pathwise - derivative).max() > 0.3


@pytest.mark.parametrize("w", [W, np.array([1.0, 1.0, 1.0]), np.array([3.0, 0.4, 0.8])], ids=str)
def test_the_bound_lies_above_the_likelihood_of_the_process(w):
    """For every target; and both laws are laws, that of the process and that which stops at `low`."""
    law = limit_law(w)
    np.testing.assert_allclose(law.sum(), 1.0)
    for low, exact in ((0.0, law[WORLD.code(TARGETS)]), (0.2, law_from(w, 0.2))):
        np.testing.assert_allclose(exact.sum(), 1.0)
        gaps = np.array([nelbo(w, target, low) for target in TARGETS]) + np.log(exact)
        assert gaps.min() > -1e-9
        assert gaps.max() > 1e-2


def test_the_bound_is_the_limit_of_that_of_a_chain_of_steps():
    """Sums of KL(q(x_s | x_t, x) || p(x_s | x_t)) as they stand, without the paper's integrand."""

    def chained(steps):
        total = 0.0
        for k in range(steps, 0, -1):
            t, s = k / steps, (k - 1) / steps
            reveal = 1 - (s / t) ** W
            law = mask_law(W, TARGET, t)
            for probability, masked in zip(law, MASKS, strict=True):
                mu = WORLD.probs[0, WORLD.code(np.where(masked, V, TARGET))]
                p_token, p_mask = (mu * reveal)[np.arange(L), TARGET], 1 - (mu * reveal).sum(axis=-1)
                q = reveal[TARGET]
                kl = scipy.special.rel_entr(q, p_token)
                if s > 0:
                    kl = kl + scipy.special.rel_entr(1 - q, p_mask)
                total += probability * kl[masked].sum()
        return total

    exact = nelbo(W, TARGET)
    errors = [abs(chained(steps) - exact) for steps in (50, 200, 800)]
    assert errors[0] > 1.8 * errors[1] > 3 * errors[2]
    assert errors[2] < 2e-2 * exact


def test_the_bound_that_is_drawn_is_the_one_that_is_enumerated():
    enumerated = np.mean([nelbo(W, target) for target in TARGETS])
    objective = TokenSchedules(evaluation_draws=2000)
    batch = tiny_world.batch_of(TARGETS, SPECIAL)
    drawn = jax.jit(lambda batch: objective.bound(model_of(W), batch, KEYS))(batch)
    np.testing.assert_allclose(drawn.loss * L, enumerated, rtol=0.02)
    np.testing.assert_allclose(drawn.metrics["exponent_per_token"].value, W.mean(), rtol=1e-5)


@pytest.mark.parametrize("low", [0.0, 1e-3])
def test_with_all_exponents_one_it_is_MD4_on_the_same_draws(low):
    """Half the loss of each draw; times that begin at `low` add what is MASK there, evenly spread."""
    time = UniformTime(low=low)
    objective = TokenSchedules(time=time)
    batch = tiny_world.batch_of(np.tile(TARGETS, (4, 1)), SPECIAL)
    batch = batch.replace(strata=time.draw(KEYS, batch.example_ids))
    md4 = MaskedDiffusion(time=tiny_worlds.GivenTimes())
    other = KEYS.replace(root=jax.random.fold_in(KEYS.root, 1))
    halves = [jax.jit(lambda k: md4.loss(WORLD.model, batch, k).loss)(keys) for keys in (KEYS, other)]
    assert abs(halves[0] - halves[1]) > 1e-3
    loss = jax.jit(lambda k: objective.loss(model_of(np.ones(V)), batch, k).loss)(KEYS)
    np.testing.assert_allclose(loss, (1 - low) * np.mean(halves) + low * np.log(V), rtol=1e-4)


# The sampler.


def step_law(w, steps) -> np.ndarray:
    law = worlds.all_masked(WORLD)
    for k in range(steps, 1, -1):
        law = worlds.coin_step(WORLD, law, 1 - ((k - 1) / k) ** w)
    return worlds.coin_step(WORLD, law, 1.0)


def counts(unmask, rows, steps, w=W) -> np.ndarray:
    sampler = sampler_stubs.masked(unmask, steps=steps)
    decoded = worlds.stubs.generate(sampler, model_of(w), worlds.prompts(WORLD, rows), StreamKeys.create(0))
    return worlds.histogram(WORLD, np.asarray(decoded.tokens)[:, 1:])


def test_T52_genmd4_law():
    drawn = counts(TokenAncestral(), 20_000, 4)
    assert worlds.follows(drawn, step_law(W, 4))
    assert not worlds.follows(drawn, step_law(np.ones(V), 4)), "one schedule for all is another law"


def test_with_all_exponents_one_the_sampler_has_the_law_of_ancestral_sampling():
    ones = np.ones(V)
    drawn = counts(TokenAncestral(), 20_000, 3, ones)
    assert worlds.follows(drawn, step_law(ones, 3))
    assert worlds.follows(counts(Ancestral(), 20_000, 3, ones), step_law(ones, 3)), "and ignores exponents"


@pytest.mark.thorough
def test_T52_genmd4_goes_to_the_process_of_the_bound():
    """The enumerated laws converge like 1/T; at T = 100 draws cannot be told from the process in continuous time."""
    distances = [np.abs(step_law(W, steps) - limit_law(W)).sum() / 2 for steps in (4, 16, 64)]
    assert distances[0] > 2.5 * distances[1] > 6 * distances[2]
    assert worlds.follows(counts(TokenAncestral(), 6000, 100), limit_law(W))


def test_impossible_settings_are_errors():
    for time in (UniformTime(high=0.9), DiscreteTime(10)):
        with pytest.raises(ConfigError, match="leave out a part of the bound"):
            TokenSchedules(time=time)
    with pytest.raises(ConfigError, match=r"last_time=1\.0"):
        TokenAncestral(1.0)
    with pytest.raises(ConfigError, match="the network has no exponents"):
        OBJECTIVE.loss(WORLD.model, tiny_world.batch_of(TARGETS, SPECIAL), KEYS)
    with pytest.raises(ConfigError, match="the network has no exponents"):
        worlds.decode(WORLD, TokenAncestral(), 4)
    assert abs(np.log1p(np.exp(ONE)) - 1) < 1e-12
