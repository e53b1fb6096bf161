"""The reverse process of uniform noise and its guidance (D-CFG): laws against posteriors written out in float64."""

import dataclasses
import itertools
import types
from typing import Any

import jax
import jax.numpy as jnp
import model_stubs as stubs
import numpy as np
import pytest
import sampler_worlds as worlds
from sampler_stubs import canvas, without_ends

from diffusion_lm.architectures.base import BoundModel, Hidden
from diffusion_lm.core.rng import StreamKeys
from diffusion_lm.nn.cross_entropy import Noised, chunked_token_stats
from diffusion_lm.nn.head import Head
from diffusion_lm.noise.process import Uniform
from diffusion_lm.noise.schedules import Cosine, Linear
from diffusion_lm.samplers.uniform import UniformAncestral

V, L, STEPS, ROWS = 3, 2, 3, 20_000
CANVASES = np.array(list(itertools.product(range(V), repeat=L)))
LOGITS = np.random.default_rng(5).normal(scale=1.3, size=(V, V**L, L, V)).astype(np.float32)


@dataclasses.dataclass(frozen=True, eq=False)
class Asked:
    """V networks over windows of L tokens behind two slots of conditioning; the second one says which is asked."""

    @property
    def spec(self) -> Any:
        layers = {"self_conditioning": False, "time_conditioning": False}
        return types.SimpleNamespace(vocab_size=V, logits_chunk=1 << 22, **layers)

    def hidden(self, params, inputs):
        tokens = inputs.tokens
        code = tokens[:, 2:] @ (V ** jnp.arange(L)[::-1])
        return Hidden(jnp.pad(jnp.asarray(LOGITS)[tokens[:, 1], code], ((0, 0), (2, 0), (0, 0))))

    def head(self, params):
        return Head(jnp.eye(V), vocab_size=V)


MODEL = BoundModel(Asked(), {})
PROMPT = without_ends(stubs.as_prompt(stubs.make_batch([2] * ROWS, [L] * ROWS, L + 2)), mask_id=None)
PROMPT = PROMPT.replace(tokens=PROMPT.tokens.at[:, :2].set(0))


def posterior(network: int, code: int, slot: int, alpha_t: float, alpha_s: float) -> np.ndarray:
    """q(z_s | z_t, p) = q(z_t | z_s) q(z_s | p) / norm, as D3PM writes it."""
    logits = LOGITS[network, code, slot].astype(np.float64)
    p = np.exp(logits - logits.max())
    p /= p.sum()
    r = alpha_t / alpha_s
    step = r * (np.arange(V) == CANVASES[code, slot]) + (1 - r) / V
    q = step * (alpha_s * p + (1 - alpha_s) / V)
    return q / q.sum()


def law(schedule, w: float = 0.0) -> np.ndarray:
    """Of network 0, guided away from the one that a random conditioning token asks, one token for the whole decode."""
    alpha = np.asarray(schedule.alpha(1 - np.arange(STEPS + 1) / STEPS), np.float64)
    total = np.zeros(V**L)
    for other in range(V):
        now = np.full(V**L, V**-L)
        for alpha_t, alpha_s in itertools.pairwise(alpha):
            after = np.zeros_like(now)
            for code in range(V**L):
                cells = []
                for slot in range(L):
                    c, u = (np.log(posterior(network, code, slot, alpha_t, alpha_s)) for network in (0, other))
                    q = np.exp((1 + w) * c - w * u)
                    cells.append(q / q.sum())
                after += now[code] * np.multiply.outer(*cells).reshape(-1)
            now = after
        total += now / V
    return total


def counts(schedule, **fields) -> np.ndarray:
    sampler = canvas(UniformAncestral(), process=Uniform(schedule), steps=STEPS, **fields)
    decoded = stubs.generate(sampler, MODEL, PROMPT, StreamKeys.create(3))
    np.testing.assert_array_equal(decoded.forward_passes, STEPS * (2 if sampler.guidance else 1), "no early exit")
    tokens = np.asarray(decoded.tokens)
    assert not tokens[:, :2].any(), "the conditioning is untouched"
    return np.bincount(tokens[:, 2:] @ (V ** np.arange(L)[::-1]), minlength=V**L)


@pytest.mark.parametrize("schedule", [Linear(), Cosine()], ids=["linear", "cosine"])
def test_T52_uniform_ancestral_law(schedule):
    drawn = counts(schedule)
    assert worlds.follows(drawn, law(schedule))
    assert not worlds.follows(drawn, law(Cosine() if schedule == Linear() else Linear()))


def test_T38_guided_posteriors_law():
    """gamma = 1 + w: the logarithms of the two posteriors are mixed, not those of the two predictions."""
    for w in (0.8, -1.0):
        drawn = counts(Linear(), guidance=w)
        assert worlds.follows(drawn, law(Linear(), w))
        assert not worlds.follows(drawn, law(Linear()))


def test_T38_guidance_0_changes_no_bit_of_a_noised_prediction():
    """And otherwise the mixture is signal p + (1 - signal) / V of both passes, then guided."""
    rng = np.random.default_rng(0)
    c, u = (jnp.asarray(rng.normal(size=(2, 5, 9)), jnp.float32) for _ in range(2))
    signal = jnp.asarray(rng.uniform(size=(2, 5)), jnp.float32).at[0, 0].set(1.0).at[1, 0].set(0.0)
    score = jnp.asarray(rng.integers(0, 7, (2, 5)))
    keys = jax.random.split(jax.random.key(0), (2, 5))
    shared = {"keys_BT": keys, "temperature": 1.0, "score": score, "forbidden": (7,), "noised": Noised(signal, 8)}
    head = Head(jnp.eye(9), vocab_size=8)
    plain = chunked_token_stats(c, head, 64, **shared)
    off, on = (chunked_token_stats(c, head, 64, **shared, unconditional_BTD=u, guidance=w) for w in (0.0, 1.5))
    jax.tree.map(np.testing.assert_array_equal, off, plain)

    def mixture(x):
        p = np.exp(np.asarray(x, np.float64)[..., :7])
        s = np.asarray(signal, np.float64)[..., None]
        return np.log(s * p / p.sum(axis=-1, keepdims=True) + (1 - s) / 8)

    mixed = 2.5 * mixture(c) - 1.5 * mixture(u)
    expected = mixed - np.log(np.exp(mixed).sum(axis=-1, keepdims=True))
    np.testing.assert_allclose(
        on.target_log_prob, np.take_along_axis(expected, np.asarray(score)[..., None], -1)[..., 0], rtol=1e-4, atol=1e-5
    )
    assert (on.sample < 7).all()


def test_T01_a_rare_change_is_as_frequent_as_it_should_be():
    """A network that is sure of what it sees: noise enters a slot at (1 - r)(1 - alpha_s)(V - 1)/V^2, about."""
    size, steps, rows = 10, 60, 400
    prompt = without_ends(stubs.as_prompt(stubs.make_batch([1] * rows, [10] * rows, 11)), mask_id=None)
    sampler = canvas(UniformAncestral(), steps=steps, keep_trace=True)
    sure = stubs.table_model(60.0 * np.eye(size, dtype=np.float32), by_token=True)
    trace = np.asarray(stubs.generate(sampler, sure, prompt, StreamKeys.create(1)).trace.tokens)[:, :, 1:]
    changed = (trace[30:] != trace[29:-1]).sum()
    alpha_t, alpha_s = np.arange(30, steps) / steps, np.arange(31, steps + 1) / steps
    stay = alpha_t / alpha_s * (alpha_s + (1 - alpha_s) / size)
    moved = (1 - alpha_t / alpha_s) / size
    rate = moved / (stay + moved) * (1 - alpha_s) * (size - 1) / size
    expected = rate.sum() * rows * 10
    assert abs(changed - expected) < 5 * np.sqrt(expected)
    assert expected > 50
