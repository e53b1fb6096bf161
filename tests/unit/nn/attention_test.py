import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_lm.core.errors import ConfigError
from diffusion_lm.nn.attention import attend
from diffusion_lm.nn.attention_mask import DenseMask
from diffusion_lm.nn.layers import row_dropout


def _inputs(H=4, K=2, B=2, Q=5, T=7, E=8):
    keys = jax.random.split(jax.random.key(0), 5)
    q = jax.random.normal(keys[0], (B, Q, H, E))
    k, v = (jax.random.normal(key, (B, T, K, E)) for key in keys[1:3])
    mask = jax.random.bernoulli(keys[3], 0.6, (B, Q, T)).at[:, :, 0].set(True)
    return q, k, v, mask, jax.random.normal(keys[4], (H, Q, T))


def _reference(q, k, v, mask, bias):
    k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    scores = jnp.einsum("bqhe,bthe->bhqt", q, k) + bias
    return jnp.einsum("bhqt,bthe->bqhe", jax.nn.softmax(jnp.where(mask[:, None], scores, -jnp.inf), axis=-1), v)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_value_and_gradient_equal_plain_softmax(kv_heads):
    q, k, v, mask, bias = _inputs(K=kv_heads)

    def total(function, *args):
        return jnp.sum(jnp.sin(function(*args)))

    ours = jax.value_and_grad(
        lambda q, k, v, b: total(lambda *a: attend(*a[:3], DenseMask(mask, a[3][None])), q, k, v, b),
        argnums=(0, 1, 2, 3),
    )(q, k, v, bias)
    plain = jax.value_and_grad(
        lambda q, k, v, b: total(lambda *a: _reference(*a[:3], mask, a[3]), q, k, v, b), argnums=(0, 1, 2, 3)
    )(q, k, v, bias)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), ours, plain)


def test_blind_query_gives_zero_and_finite_gradient():
    q, k, v, mask, bias = _inputs()
    mask = mask.at[0, 2].set(False)
    out, gradient = jax.value_and_grad(lambda q: attend(q, k, v, DenseMask(mask, bias[None]))[0, 2].sum())(q)
    assert out == 0
    assert not jnp.any(gradient)
    assert jnp.isfinite(jax.grad(lambda q: attend(q, k, v, DenseMask(mask, bias[None])).sum())(q)).all()


def test_large_scores_stay_finite_and_softmax_is_float32_in_bfloat16():
    q, k, v, mask, bias = _inputs()
    out = attend(q * 1e4, k, v, DenseMask(mask, bias[None]))
    assert jnp.isfinite(out).all()
    half = attend(*(x.astype(jnp.bfloat16) for x in (q, k, v)), DenseMask(mask, bias[None]))
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), attend(q, k, v, DenseMask(mask, bias[None])), atol=0.06)


def test_softcap_bounds_the_scores():
    q, k, v, mask, _ = _inputs()
    capped = attend(q * 1e4, k, v, DenseMask(mask), softcap=1e-6)
    even = jnp.repeat(jnp.einsum("bqt,btke->bqke", mask / mask.sum(-1, keepdims=True), v), 2, axis=2)
    np.testing.assert_allclose(capped, even, rtol=1e-4, atol=1e-4)


def test_unknown_and_unfit_implementations_are_refused():
    q, k, v, mask, _ = _inputs()
    with pytest.raises(ConfigError, match="no such attention implementation"):
        attend(q, k, v, DenseMask(mask), implementation="splash")
    with pytest.raises(ConfigError, match="bfloat16"):
        attend(q, k, v, DenseMask(mask), implementation="cudnn")


def test_dropped_probabilities_are_scaled_and_keyed_by_row():
    """With one-hot values the output is the probabilities themselves: 0 or p / (1 - rate), p on average."""
    rate, slots, rows = 0.25, 8, 400
    q, k = (jax.random.normal(jax.random.key(i), (rows, slots, 2, slots)) for i in range(2))
    v = jnp.broadcast_to(jnp.eye(slots)[None, :, None], (rows, slots, 2, slots))
    mask = jnp.tril(jnp.ones((1, slots, slots), bool))
    keys = jax.random.split(jax.random.key(5), rows)

    def probabilities(rows, drop=None):
        return np.asarray(attend(q[rows], k[rows], v[rows], DenseMask(mask), drop=drop))

    def drop(keys):
        return functools.partial(row_dropout, rate=rate, keys=keys, site=6)

    every = slice(None)
    plain, dropped = probabilities(every), probabilities(every, drop(keys))
    kept = dropped != 0
    np.testing.assert_allclose(dropped[kept], plain[kept] / (1 - rate), rtol=1e-5)
    visible = plain > 0
    assert abs(kept[visible].mean() - (1 - rate)) < 5 * (rate * (1 - rate) / visible.sum()) ** 0.5
    np.testing.assert_allclose(dropped.mean(axis=0), plain.mean(axis=0), atol=0.06)
    part = slice(100, 104)
    np.testing.assert_allclose(probabilities(part, drop(keys[part])), dropped[part], rtol=1e-6)
    assert (dropped[0] != dropped[1]).any(axis=None)
    assert len({kept[0, :, head].tobytes() for head in range(2)}) == 2, "heads drop apart"
    with pytest.raises(ConfigError, match="attention_dropout_rate"):
        attend(q, k, v, DenseMask(mask), drop=drop(keys), implementation="cudnn")
