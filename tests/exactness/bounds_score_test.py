"""Score entropy: zero at the truth, equal to masked diffusion for the same conditionals, above the likelihood."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import tiny_world

from diffusion_lm.core.errors import ConfigError
from diffusion_lm.core.rng import StreamKeys
from diffusion_lm.noise.process import Absorbing, Hybrid, Uniform
from diffusion_lm.noise.schedules import Geometric, Linear, LogLinear, PowerTotal
from diffusion_lm.objectives.forward_pass import ForwardPasses
from diffusion_lm.objectives.score_entropy import ScoreEntropy, prior_divergence, score_entropy
from diffusion_lm.objectives.uniform_diffusion import UniformDiffusion, marginal_at

KEYS = StreamKeys.create(5)
MASK = 3
PROCESSES = {
    "absorb": (4, Absorbing(LogLinear())),
    "uniform": (3, Uniform(Geometric())),
    "uniform_linear": (5, Uniform(Linear())),
}


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("t", [pytest.param(0.05, marks=pytest.mark.thorough), 0.5, 0.95])
def test_the_true_ratios_are_the_minimum_and_it_is_zero(name, t):
    vocab_size, noise = PROCESSES[name]
    mask_id = MASK if noise.has_mask else None
    data = 3 if noise.has_mask else vocab_size
    x, z = (jnp.asarray(grid.reshape(1, -1)) for grid in np.meshgrid(range(data), range(vocab_size)))
    level = noise.marginal(jnp.full(x.shape, t))
    q = jnp.stack([marginal_at(x, jnp.full_like(z, j), level, mask_id, vocab_size) for j in range(vocab_size)], -1)
    q_z = marginal_at(x, z, level, mask_id, vocab_size)
    reachable = q_z > 0
    true = jnp.where(q > 0, jnp.log(jnp.maximum(q, 1e-30)) - jnp.log(jnp.maximum(q_z, 1e-30))[..., None], -60.0)

    def loss(scores):
        return jnp.where(reachable, score_entropy(scores, x, z, level, mask_id), 0.0)

    scale = float(jnp.max(level.mask_rate + level.uniform_rate)) * float(jnp.max(jnp.where(q_z > 0, 1 / q_z, 0.0)))
    np.testing.assert_allclose(loss(true), 0.0, atol=1e-6 * scale)
    gradient = jax.grad(lambda s: loss(s).sum())(true)
    np.testing.assert_allclose(gradient, 0.0, atol=1e-5 * scale)
    for seed in range(3):
        moved = true + 0.5 * jax.random.normal(jax.random.key(seed), true.shape)
        assert (loss(moved) >= -1e-6 * scale).all()
        assert loss(moved).sum() > 1e-3


def test_absorbing_score_entropy_is_the_masked_diffusion_bound():
    """Scores made of conditionals p: at every time and canvas the integrand is (1/t) CE on masked tokens."""
    model = tiny_world.canvas_model(4, 2)
    p = tiny_world.log_softmax(model.architecture.table, (MASK,))
    # What the network must put out: log p + log(V - 1), which the scale turns into the ratios of p.
    table = np.where(np.isfinite(p), p + np.log(3), -40.0)
    scores = tiny_world.BoundModel(tiny_world.CanvasArchitecture(table), {})
    x, z = tiny_world.canvases(3, 2), tiny_world.canvases(4, 2)
    batch = tiny_world.batch_of(np.repeat(x, len(z), axis=0))
    noisy = jnp.concatenate([batch.tokens[:, :1], jnp.asarray(np.tile(z, (len(x), 1)))], axis=1)
    noisy = jnp.where((noisy == MASK) & batch.target_mask, MASK, batch.tokens)
    noise = Absorbing(Linear())
    forward = [ForwardPasses(m, batch, KEYS, visibility="full", train=False) for m in (scores, model)]
    for t in (0.1, 0.5, 0.97):
        t_BT = jnp.full(noisy.shape, t)
        entropy = ScoreEntropy(noise, scale_by_sigma=True).token_losses(t_BT, noisy, scores, batch, forward[0])
        nelbo = UniformDiffusion(noise).token_losses(t_BT, noisy, model, batch, forward[1])
        nll = np.concatenate([np.zeros((len(batch.tokens), 1, 4)), p[np.asarray(noisy[:, 1:]) @ [4, 1]]], axis=1)
        cross_entropy = -np.take_along_axis(nll, np.asarray(batch.tokens)[..., None], axis=-1)[..., 0]
        expected = np.where(np.asarray(noisy) == MASK, cross_entropy / t, 0.0)
        np.testing.assert_allclose(entropy, expected, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(nelbo, expected, rtol=1e-3, atol=1e-4)
    objectives = (
        ScoreEntropy(Absorbing(LogLinear()), scale_by_sigma=True, evaluation_draws=64),
        UniformDiffusion(noise, evaluation_draws=64),
    )
    bounds = [o.bound(m, batch, KEYS).loss for o, m in zip(objectives, (scores, model), strict=True)]
    np.testing.assert_allclose(*bounds, rtol=1e-3)


def test_uniform_score_entropy_bounds_the_likelihood_of_its_reverse_process():
    """All canvases: the exact likelihood by a matrix exponential of the reverse rates, the bound by quadrature."""
    V, L, sigma_max = 3, 2, 4.0
    model = tiny_world.canvas_model(V, L, scale=0.5)
    scores, z = np.asarray(model.architecture.table, np.float64), tiny_world.canvases(V, L)
    generator = np.zeros((len(z), len(z)))
    for a, canvas in enumerate(z):
        for i in range(L):
            for j in set(range(V)) - {canvas[i]}:
                to = canvas.copy()
                to[i] = j
                generator[a, to @ [V, 1]] += np.exp(scores[a, i, j]) / V
        generator[a, a] = -generator[a].sum()
    exact = -np.log(np.full(len(z), 1 / len(z)) @ scipy.linalg.expm(sigma_max * generator))
    np.testing.assert_allclose(np.exp(-exact).sum(), 1.0)

    noise = Uniform(PowerTotal(sigma_max))
    batch = tiny_world.batch_of(np.repeat(z, len(z), axis=0))
    noisy = jnp.concatenate([batch.tokens[:, :1], jnp.asarray(np.tile(z, (len(z), 1)))], axis=1)
    objective = ScoreEntropy(Uniform(Geometric()), sigma_max=sigma_max, evaluation_draws=3000)

    @jax.jit
    def losses(t):
        forward = ForwardPasses(model, batch, KEYS, visibility="full", train=False)
        whole = dataclasses.replace(objective, process=noise)
        return whole.token_losses(jnp.full(noisy.shape, t), noisy, model, batch, forward)[:, 1:].sum(axis=1)

    nodes, weights = np.polynomial.legendre.leggauss(100)
    bound = 0.0
    for node, weight in zip(0.5 * (nodes + 1), 0.5 * weights, strict=True):
        alpha = np.exp(-sigma_max * node**2)
        q = alpha * np.eye(V) + (1 - alpha) / V
        probability = np.prod(q[np.repeat(z, len(z), axis=0), np.tile(z, (len(z), 1))], axis=1)
        bound = bound + weight * (probability * np.asarray(losses(node), np.float64)).reshape(len(z), -1).sum(axis=1)
    alpha = np.exp(-sigma_max)
    q = np.array([alpha + (1 - alpha) / V] + [(1 - alpha) / V] * (V - 1))
    prior = (q * np.log(V * q)).sum()
    np.testing.assert_allclose(prior_divergence(noise.marginal(jnp.ones(())), V), prior, rtol=1e-3)
    bound = bound + L * prior
    assert (bound > exact).all()
    assert bound.mean() < exact.mean() + 2.0, "and not idle"
    rows = tiny_world.batch_of(z)
    drawn = jax.jit(lambda rows: objective.bound(model, rows, KEYS))(rows)
    np.testing.assert_allclose(drawn.loss, bound.mean() / L, rtol=0.03)


def test_training_weighs_by_the_schedules_own_rate():
    """Two schedules at the same total noise: integrands in the ratio of their d sigma / dt."""
    model, batch = tiny_world.canvas_model(3, 2), tiny_world.batch_of([[0, 1], [2, 2]])
    noisy = batch.tokens.at[0, 1].set(2)
    forward = ForwardPasses(model, batch, KEYS, visibility="full", train=False)
    values = []
    for schedule in (Geometric(1e-4, 20.0), Linear()):
        t = np.log(0.5 / 1e-4) / np.log(2e5) if isinstance(schedule, Geometric) else 1 - np.exp(-0.5)
        noise = Uniform(schedule)
        t_BT = jnp.full(noisy.shape, t, jnp.float32)
        rate = -schedule.alpha_derivative(t_BT) / schedule.alpha(t_BT)
        values.append(ScoreEntropy(noise).token_losses(t_BT, noisy, model, batch, forward) / rate)
    np.testing.assert_allclose(*values, rtol=1e-4)


@pytest.mark.parametrize(
    "fields",
    [{"process": Absorbing()}, {"process": Hybrid()}, {"sigma_max": 0.0}, {"evaluation_draws": 0}],
    ids=str,
)
def test_impossible_settings_are_errors(fields):
    with pytest.raises(ConfigError):
        ScoreEntropy(**fields)
    with pytest.raises(ConfigError):
        PowerTotal(power=0.5)
