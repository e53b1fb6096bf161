"""Bounds under uniform and mixed noise against the D3PM chain in matrices, every canvas enumerated, in float64."""

import functools

import jax
import jax.numpy as jnp
import model_stubs as stubs
import numpy as np
import pytest
import tiny_world

from diffusion_lm.core.errors import ConfigError
from diffusion_lm.core.rng import StreamKeys
from diffusion_lm.core.special import SpecialTokens
from diffusion_lm.nn import cross_entropy
from diffusion_lm.noise.process import Absorbing, Hybrid, Uniform
from diffusion_lm.noise.schedules import Cosine, Linear, LogLinear
from diffusion_lm.objectives.forward_pass import ForwardPasses
from diffusion_lm.objectives.uniform_diffusion import Dynamic, Elbo, LogSnr, UniformDiffusion, divergence

L = 2
MASK = 3
KEYS = StreamKeys.create(5)
NOISES = {
    "uniform": (3, Uniform()),
    "cosine": (3, Uniform(Cosine())),
    "hybrid": (4, Hybrid(0.3)),
    "absorbing": (4, Absorbing()),
}


@pytest.fixture(params=NOISES)
def world(request):
    vocab_size, noise = NOISES[request.param]
    return vocab_size, noise, tiny_world.canvas_model(vocab_size, L)


def marginals(noise, t, vocab_size):
    """f64[V,V], q_t(column | row)."""
    level = jax.tree.map(lambda x: np.float64(x), noise.marginal(jnp.float32(t)))
    if t == 0:
        return np.eye(vocab_size)
    share = np.full(vocab_size, level.uniform / (vocab_size - (noise.has_mask)))
    if noise.has_mask:
        share[MASK] = level.mask
    q = level.signal * np.eye(vocab_size) + share
    return q / q.sum(axis=1, keepdims=True)


def data_canvases(vocab_size, noise):
    z = tiny_world.canvases(vocab_size, L)
    return z[~(z == MASK).any(axis=1)] if noise.has_mask else z


def chain(vocab_size, noise, model, steps):
    """The exact NLL and the variational bound of D3PM in T steps, by matrices over all canvases."""
    forbidden = () if not noise.has_mask else (MASK,)
    p = np.exp(tiny_world.log_softmax(model.architecture.table, forbidden))
    z, x = tiny_world.canvases(vocab_size, L), data_canvases(vocab_size, noise)
    q = [marginals(noise, k / steps, vocab_size) for k in range(steps + 1)]
    bound = np.zeros(len(x))
    last = q[steps][0] if not noise.has_mask else np.eye(vocab_size)[MASK]
    likelihood = np.prod(last[z], axis=1)
    for k in range(steps, 0, -1):
        step = np.linalg.solve(q[k - 1], q[k])
        q_theta = p @ q[k - 1]
        reverse = q_theta * step.T[z]
        reverse /= reverse.sum(axis=-1, keepdims=True)
        likelihood = likelihood @ np.stack([np.prod(reverse[:, range(L), c], axis=1) for c in z], axis=1)
        for i in range(L):
            q_z = np.prod([q[k][x[:, j]][:, z[:, j]] for j in range(L)], axis=0)
            true = q[k - 1][x[:, i]][:, None, :] * step.T[z[:, i]][None]
            true = true / np.maximum(true.sum(axis=-1, keepdims=True), 1e-300)
            ratio = np.where(true > 0, np.log(np.maximum(true, 1e-300) / np.maximum(reverse[None, :, i], 1e-300)), 0)
            bound += (q_z * (true * ratio).sum(axis=-1)).sum(axis=1)
    numbers = x @ (vocab_size ** np.arange(L - 1, -1, -1))
    return -np.log(likelihood[numbers]), bound


def expected(objective, vocab_size, noise, model, times, weights, only_noise=False):
    """f64[X]: the objective's own token losses, averaged over all noisy canvases and the given times."""
    z, x = tiny_world.canvases(vocab_size, L), data_canvases(vocab_size, noise)
    rows = np.repeat(x, len(z), axis=0), np.tile(z, (len(x), 1))
    batch = tiny_world.batch_of(rows[0])
    noisy = jnp.concatenate([batch.tokens[:, :1], jnp.asarray(rows[1])], axis=1)

    @jax.jit
    def losses(t):
        forward = ForwardPasses(model, batch, KEYS, visibility="full", train=False)
        t_BT = jnp.full(batch.tokens.shape, t)
        values = objective.token_losses(t_BT, noisy, model, batch, forward)[:, 1:]
        return jnp.where(noisy[:, 1:] != batch.tokens[:, 1:], values, 0) if only_noise else values

    total = 0.0
    for t, weight in zip(times, weights, strict=True):
        q = marginals(noise, t, vocab_size)
        probability = np.prod(q[rows[0], rows[1]], axis=1)
        total = total + weight * (probability[:, None] * np.asarray(losses(t), np.float64)).sum(axis=1)
    return np.reshape(total, (len(x), len(z))).sum(axis=1)


def quadrature(nodes=80):
    """Gauss-Legendre on (0, 1) in sqrt(t): the integrands have a logarithm or an inverse root at 0."""
    x, w = np.polynomial.legendre.leggauss(nodes)
    x, w = 0.5 * (x + 1), 0.5 * w
    return x**2, w * 2 * x


@pytest.mark.parametrize("steps", [1, 2, 12])
def test_the_discrete_bound_is_that_of_the_chain(world, steps):
    """D3PM's L_vb in matrices, and above the exact likelihood of the same chain, which is a distribution."""
    vocab_size, noise, model = world
    objective = UniformDiffusion(noise, steps=steps)
    exact, bound = chain(vocab_size, noise, model, steps)
    np.testing.assert_allclose(np.exp(-exact).sum(), 1.0, rtol=1e-4)
    times = np.arange(1, steps + 1) / steps
    ours = expected(objective, vocab_size, noise, model, times, np.full(steps, 1 / steps))
    np.testing.assert_allclose(ours, bound, rtol=1e-3)
    assert (ours >= exact - 1e-3).all()
    assert (ours > exact + 1e-2).any() or steps == 1


@pytest.mark.thorough
def test_the_auxiliary_loss_of_d3pm_is_the_cross_entropy_at_the_same_noise(world):
    """Of all tokens, intact ones included; the bound knows nothing of it."""
    vocab_size, noise, model = world
    batch, share = tiny_world.batch_of(data_canvases(vocab_size, noise)), 0.3
    plain, both = (UniformDiffusion(noise, steps=4, auxiliary=weight) for weight in (0.0, share))
    gap = both.loss(model, batch, KEYS).loss_sum - plain.loss(model, batch, KEYS).loss_sum
    t = plain.time.draw(KEYS, batch.example_ids, strata=batch.strata)
    noisy = np.asarray(noise.corrupt(KEYS, batch, jnp.ceil(t * 4) / 4, vocab_size=vocab_size).tokens)[:, 1:]
    forbidden = () if not noise.has_mask else (MASK,)
    log_p = tiny_world.log_softmax(model.architecture.table, forbidden)
    numbers = noisy @ (vocab_size ** np.arange(L - 1, -1, -1))
    nll = -np.take_along_axis(log_p[numbers], np.asarray(batch.tokens)[:, 1:, None], axis=2)
    np.testing.assert_allclose(gap, share * nll.sum(), rtol=1e-3)
    bounds = [one.bound(model, batch, KEYS) for one in (plain, both)]
    jax.tree.map(np.testing.assert_array_equal, bounds[1], bounds[0])
    with pytest.raises(ConfigError, match="auxiliary"):
        UniformDiffusion(noise, auxiliary=-0.1)


def test_the_continuous_bound_is_the_limit_of_the_discrete_ones(world):
    """And itself above the likelihood that the chain approaches."""
    vocab_size, noise, model = world
    continuous = expected(UniformDiffusion(noise), vocab_size, noise, model, *quadrature())
    exact, far = chain(vocab_size, noise, model, 100)
    _, near = chain(vocab_size, noise, model, 400)
    assert np.abs(near - continuous).max() < 0.45 * np.abs(far - continuous).max() + 2e-3
    np.testing.assert_allclose(near, continuous, rtol=2e-2)
    assert (continuous > exact - 1e-2).all()


def test_T17_uniform_noise_needs_clean_positions():
    """Scoring changed tokens only is no bound: it lies below the exact likelihood of some sequence."""
    vocab_size, noise = NOISES["uniform"]
    model = tiny_world.canvas_model(vocab_size, L)
    exact, _ = chain(vocab_size, noise, model, 400)
    whole = expected(UniformDiffusion(), vocab_size, noise, model, *quadrature())
    changed_only = expected(UniformDiffusion(), vocab_size, noise, model, *quadrature(), only_noise=True)
    assert (whole > exact).all()
    assert (changed_only < exact).any()


def test_the_bound_that_is_drawn_is_the_one_that_is_enumerated(world):
    vocab_size, noise, model = world
    enumerated = expected(UniformDiffusion(noise), vocab_size, noise, model, *quadrature())
    batch = tiny_world.batch_of(data_canvases(vocab_size, noise))
    objective = UniformDiffusion(noise, evaluation_draws=3000)
    drawn = jax.jit(lambda batch: objective.bound(model, batch, KEYS))(batch)
    np.testing.assert_allclose(drawn.loss, enumerated.mean() / L, rtol=0.03)
    assert drawn.weight == batch.loss_weights.sum()


def test_udlm_in_the_papers_own_form():
    """The integrand of UDLM as it is printed, in float64; also where differences of float32 logs have no digits."""
    V, rng = 5, np.random.default_rng(0)
    log_p = tiny_world.log_softmax(rng.normal(size=(1, 6, V)))
    x, z = np.array([[0, 1, 2, 3, 4, 0]]), np.array([[0, 2, 2, 1, 4, 3]])
    for alpha, tolerance in ((0.9, 1e-4), (0.3, 1e-4), (1e-2, 1e-3), (1e-4, 2e-2)):
        t = np.float32(1 - alpha)
        alpha = float(1 - t)
        clean = V * alpha * np.eye(V)[x] + 1 - alpha
        predicted = V * alpha * np.exp(log_p) + 1 - alpha

        def at(values):
            return np.take_along_axis(values, z[..., None], axis=-1)

        ratio = clean / at(clean)
        inner = (ratio * np.log(at(predicted) * clean / (predicted * at(clean)))).sum(axis=-1)
        paper = -1 / (V * alpha) * (V / at(clean)[..., 0] - V / at(predicted)[..., 0] - inner)
        level = Uniform().marginal(jnp.full(x.shape, t))
        apart = divergence(jnp.asarray(log_p, jnp.float32), jnp.asarray(x), jnp.asarray(z), level, None)
        weight = Elbo().weigh(jnp.asarray(x), jnp.asarray(z), jnp.full(x.shape, t), Uniform(), None, V)
        ours = weight * (apart.kl + jnp.expm1(apart.log_ratio) - apart.log_ratio)
        np.testing.assert_allclose(ours, paper, rtol=tolerance, atol=1e-5 * alpha)


def test_MASK_alone_is_the_weighted_cross_entropy():
    vocab_size, noise = NOISES["absorbing"]
    model = tiny_world.canvas_model(vocab_size, L)
    batch = tiny_world.batch_of([[0, 1], [2, 2], [1, 0]])
    noisy = batch.tokens.at[:, 1].set(3).at[1, 2].set(3)
    forward = ForwardPasses(model, batch, KEYS, visibility="full", train=False)
    losses = UniformDiffusion(noise).token_losses(jnp.full(noisy.shape, 0.4), noisy, model, batch, forward)
    log_p = tiny_world.log_softmax(model.logits(forward(noisy)), (3,))
    nll = -np.take_along_axis(log_p, np.asarray(batch.tokens)[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(losses, np.where(np.asarray(noisy) == 3, nll / 0.4, 0.0), rtol=1e-4, atol=1e-5)


def test_certain_and_wrong_predictions_stay_finite():
    for noise in (Uniform(), Hybrid(0.1), Absorbing()):
        batch = tiny_world.batch_of([[0, 1]] * 4)
        objective = UniformDiffusion(noise)

        def loss(logits, t, objective=objective, batch=batch):
            table = jnp.broadcast_to(logits, (16, L, 4))
            architecture = tiny_world.CanvasArchitecture(table)
            model = stubs.BoundModel(architecture, {})
            noisy = batch.tokens.at[1, 1].set(2).at[2, 1].set(3).at[3, 2].set(0)
            forward = ForwardPasses(model, batch, KEYS, visibility="full", train=False)
            return objective.token_losses(jnp.full(noisy.shape, t), noisy, model, batch, forward).sum()

        for t in (2.0**-24, 1e-3, 0.5, 1 - 1e-6, 1.0):
            for logits in ([60.0, 0.0, 0.0, 0.0], [0.0, 0.0, 300.0, 0.0]):
                value, gradient = jax.value_and_grad(loss)(jnp.asarray(logits), t)
                assert np.isfinite(value)
                assert value > -1e-3
                assert np.isfinite(gradient).all()


@pytest.mark.parametrize("name", NOISES)
def test_noise_follows_its_marginal_and_rates_its_flow(name):
    vocab_size, noise = NOISES[name]
    batch = stubs.make_batch([1] * 3000, [8] * 3000, 9)
    batch = batch.replace(tokens=jnp.full_like(batch.tokens, 1), special=SpecialTokens(40, mask_id=3))
    noisy = noise.corrupt(KEYS, batch, jnp.full(batch.tokens.shape, 0.6), vocab_size=vocab_size).tokens
    assert (noisy[:, 0] == 1).all(), "conditioning is untouched"
    share = np.bincount(np.asarray(noisy[:, 1:]).ravel(), minlength=vocab_size) / 24000
    np.testing.assert_allclose(share, marginals(noise, 0.6, vocab_size)[1], atol=0.012)
    # d/dt (noise) = rate - (-alpha'/alpha) x noise, for MASK and for ordinary noise.
    t, h = np.float32(0.6), np.float32(1e-2)
    at, up, down = (noise.marginal(time) for time in (t, t + h, t - h))
    decay = -(up.signal - down.signal) / (2 * h) / at.signal
    for part in ("mask", "uniform"):
        slope = (getattr(up, part) - getattr(down, part)) / (2 * h)
        np.testing.assert_allclose(slope, getattr(at, f"{part}_rate") - decay * getattr(at, part), atol=3e-3)


def test_dynamic_weights_train_and_leave_the_bound_alone():
    vocab_size, noise = NOISES["hybrid"]
    model, batch = tiny_world.canvas_model(vocab_size, L), tiny_world.batch_of(data_canvases(4, noise))
    plain, dynamic = (UniformDiffusion(noise, weighting=kind) for kind in (Elbo(), Dynamic()))
    assert plain.loss(model, batch, KEYS).loss_sum != dynamic.loss(model, batch, KEYS).loss_sum
    np.testing.assert_allclose(plain.bound(model, batch, KEYS).loss, dynamic.bound(model, batch, KEYS).loss, rtol=1e-6)


WEIGHT_TIMES = (0.001, 0.1, 0.5, 0.9, 0.99)


def weights_by_differences(noise, t, vocab_size):
    """The ELBO's weights r_t(z)/q_t(z | x) of an intact token, another token and MASK, and d log-SNR / dt; in float64.

    Only the marginal of the paper is used, ((1-t) x + t MASK + c_t u)/(1 + c_t): the rates are its derivative.
    """
    scale = 2.0**noise.gamma * noise.uniform_share / (1 - noise.uniform_share)

    def parts(t):
        c = scale * (t * (1 - t)) ** (noise.gamma / 2)
        each = c / (vocab_size - 1)
        return np.array([(1 - t) + each, each, t, 1 - t]) / (1 + c)

    h = 1e-6 * min(t, 1 - t)
    now, slope = parts(t), (parts(t + h) - parts(t - h)) / (2 * h)
    decay = -slope[3] / now[3]
    return (slope[:3] + decay * now[:3]) / now[:3], -decay / (1 - now[3])


@pytest.fixture(scope="module")
def weights_of():
    """`(noise, t, weighting) -> f64[3]`: weights of an intact token, another one and MASK, as the loss applies them."""
    vocab_size = 200
    model = stubs.table_model(np.random.default_rng(0).normal(size=(4, vocab_size)))
    batch = tiny_world.batch_of([[5, 5, 5]])
    noisy = batch.tokens.at[0, 2].set(6).at[0, 3].set(3)

    @functools.partial(jax.jit, static_argnums=(0, 2))
    def losses(noise, t, weighting):
        objective = UniformDiffusion(noise, weighting=weighting)
        forward = ForwardPasses(model, batch, KEYS, visibility="full", train=False)
        t_BT = jnp.full(noisy.shape, t)
        return objective.token_losses(t_BT, noisy, model, batch, forward)[0, 1:]

    def weights(noise, t, weighting):
        bound, _ = weights_by_differences(noise, t, vocab_size)
        plain, other = (np.asarray(losses(noise, t, kind), np.float64) for kind in (Elbo(), weighting))
        return other / plain * bound

    return weights


@pytest.mark.parametrize("t", WEIGHT_TIMES)
def test_dynamic_weights_have_the_ratios_of_the_elbo(weights_of, t):
    """Intact over other: (B/V) SNR^(-1/2), which at t = 0.001 is a factor 999 from its inverse exponent."""
    noise = Hybrid(0.1)
    bound, _ = weights_by_differences(noise, t, 200)
    found = weights_of(noise, t, Dynamic(1e9))
    np.testing.assert_allclose(found[0] / found[1], bound[0] / bound[1], rtol=0.02)
    np.testing.assert_allclose(found[1:], [1.0, 2.0], rtol=1e-3)
    inverse = noise.scale / 200 * ((1 - t) / t) ** 0.5
    assert t == 0.5 or abs(inverse / found[0] - 1) > 0.5, "the inverse exponent fails this test"


@pytest.mark.parametrize("gamma", [1.0, 0.6])
@pytest.mark.parametrize("t", WEIGHT_TIMES)
def test_log_snr_weights_are_the_elbo_per_unit_of_log_snr(weights_of, t, gamma):
    noise = Hybrid(0.2, gamma)
    bound, slope = weights_by_differences(noise, t, 200)
    np.testing.assert_allclose(weights_of(noise, t, LogSnr(1e9)), bound / -slope, rtol=2e-3)


def test_log_snr_weights_of_masked_noise_are_flat():
    noise, model = Absorbing(), tiny_world.canvas_model(4, L)
    batch = tiny_world.batch_of([[0, 1]])
    noisy = batch.tokens.at[0, 1].set(3)
    forward = ForwardPasses(model, batch, KEYS, visibility="full", train=False)
    objective = UniformDiffusion(noise, weighting=LogSnr())
    losses = objective.token_losses(jnp.full(noisy.shape, 0.3), noisy, model, batch, forward)
    log_p = tiny_world.log_softmax(model.logits(forward(noisy)), (3,))
    np.testing.assert_allclose(losses[0, 1], -0.7 * log_p[0, 1, 0], rtol=1e-4)
    np.testing.assert_allclose(losses[0, 2], 0.0, atol=1e-5)


@pytest.mark.parametrize("chunk", [6, 1000])
def test_chunked_map_is_the_function_of_the_logits(chunk):
    """Values and gradients, on wanted slots, with a forbidden id, whatever the size of the chunks."""
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(3, 7, 4)), jnp.float32)
    head = cross_entropy.Head(jnp.asarray(rng.normal(size=(12, 4)), jnp.float32), vocab_size=9)
    scale = jnp.asarray(rng.uniform(size=(3, 7)), jnp.float32)
    where = jnp.asarray(rng.uniform(size=(3, 7)) < 0.5)

    def fn(logits, scale):
        assert logits.shape[-1] == 9
        return scale * jnp.sum(jax.nn.softmax(logits) ** 2, axis=-1)

    def chunked(hidden):
        return cross_entropy.chunked_map(fn, hidden, head, (scale,), chunk, where_BT=where, forbidden=(2,))

    def direct(hidden):
        return jnp.where(where, fn(cross_entropy.logits(hidden, head, (2,))[..., :9], scale), 0.0)

    np.testing.assert_allclose(chunked(hidden), direct(hidden), rtol=1e-5)
    gradients = [jax.grad(lambda h, f=f: f(h).sum())(hidden) for f in (chunked, direct)]
    np.testing.assert_allclose(*gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "fields",
    [
        {"weighting": Dynamic()},
        {"weighting": LogSnr(), "steps": 10},
        {"steps": 0},
        {"steps": 10, "process": Uniform(LogLinear(0.1))},
        {"evaluation_draws": 0},
        {"visibility": "sideways"},
    ],
    ids=str,
)
def test_impossible_settings_are_errors(fields):
    with pytest.raises(ConfigError):
        UniformDiffusion(**fields)
    with pytest.raises(ConfigError):
        Hybrid(gamma=3.0)
    assert UniformDiffusion(Uniform(Linear()), steps=10).bound_kind == "nelbo"
