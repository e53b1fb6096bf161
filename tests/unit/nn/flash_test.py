"""The kernels, run as plain JAX, against the dense computation: values and gradients for every visibility."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_lm.nn import flash, masks, named_masks
from diffusion_lm.nn.attention import attend
from diffusion_lm.nn.attention_mask import DenseMask, SymbolicMask
from diffusion_lm.nn.embeddings import toeplitz

LENGTH = 256
TARGET = jnp.arange(LENGTH) > jnp.array([[50], [130]])
SEGMENTS = masks.Segments(jnp.repeat(jnp.array([[1, 2, 0], [1, 1, 2]]), jnp.array([100, 120, 36]), axis=1))
BLOCKS = jnp.broadcast_to(jnp.arange(LENGTH // 2) // 16, (2, LENGTH // 2))
DRAWN = jax.random.bernoulli(jax.random.key(7), 0.1, (2, LENGTH, LENGTH))

CASES = {
    "causal": (masks.Causal(), {}),
    "full, packed, bias": (masks.Full() & SEGMENTS, {"bias": True}),
    "prefix, packed, bias, cap": (
        named_masks.named_visibility("prefix", TARGET) & SEGMENTS,
        {"bias": True, "softcap": 5.0},
    ),
    "prefix_blind": (named_masks.named_visibility("prefix_blind", TARGET), {}),
    "causal_prefix": (named_masks.named_visibility("causal_prefix", TARGET), {}),
    "blocks": (named_masks.named_visibility("blocks:24", TARGET), {}),
    "noisy and clean, bias": (masks.two_streams(BLOCKS), {"bias": True}),
    "window of two copies": (masks.two_streams(BLOCKS) & masks.SlidingWindow(20, 2), {}),
    "drawn": (masks.Causal() | masks.ExplicitMask(DRAWN), {}),
    "drawn for all, in one row": (masks.Rows(jnp.array([True, False])) & masks.ExplicitMask(DRAWN[:1]), {}),
}


@pytest.fixture(autouse=True)
def _several_tiles(monkeypatch):
    monkeypatch.setattr(flash, "TILES", (128,))


def _inputs(length=LENGTH, copies=1, bias=False, batch=2, heads=2, kv_heads=1, size=8):
    keys = jax.random.split(jax.random.key(0), 5)
    q, cotangent = (jax.random.normal(key, (batch, length, heads, size)) for key in keys[:2])
    k, v = (jax.random.normal(key, (batch, length, kv_heads, size)) for key in keys[2:4])
    diagonals = jax.random.normal(keys[4], (heads, 2 * length // copies)) if bias else None
    return (q, k, v, diagonals), cotangent


def _dense(visibility, softcap, q, k, v, diagonals):
    copies = visibility.copies
    bias = None if diagonals is None else jnp.tile(toeplitz(diagonals), (copies, copies))[None]
    return attend(q, k, v, DenseMask(visibility.dense(None, q.shape[1]), bias), softcap=softcap)


def _agree(visibility, inputs, cotangent, softcap=None):
    q, k, v, diagonals = inputs
    expected, pull = jax.vjp(lambda *inputs: _dense(visibility, softcap, *inputs), *inputs)
    settings = {"softcap": softcap, "interpret": True}
    out, logsumexp = flash.flash_forward(q, k, v, visibility, diagonals, **settings)
    np.testing.assert_allclose(out, expected, atol=2e-5)
    gradients = flash.flash_backward(q, k, v, visibility, diagonals, out, logsumexp, cotangent, **settings)
    for name, found, wanted in zip(("q", "k", "v", "diagonals"), gradients, pull(cotangent), strict=True):
        if wanted is not None:
            np.testing.assert_allclose(found, wanted, atol=1e-4, err_msg=name)
    return logsumexp


@pytest.mark.parametrize(
    "name",
    [name if "bias" in name else pytest.param(name, marks=pytest.mark.thorough) for name in CASES],
)
def test_values_and_gradients_equal_the_dense_ones(name):
    visibility, settings = CASES[name]
    inputs, cotangent = _inputs(copies=visibility.copies, bias=settings.get("bias", False))
    _agree(visibility, inputs, cotangent, settings.get("softcap"))


def test_rows_that_do_not_fill_their_tiles():
    inputs, cotangent = _inputs(length=200, bias=True, batch=3)
    logsumexp = _agree(masks.Causal(), inputs, cotangent)
    q, k, _, diagonals = inputs
    scores = jnp.einsum("bqhe,bthe->bhqt", q, jnp.repeat(k, 2, axis=2)) + toeplitz(diagonals)
    hidden = jnp.where(masks.Causal().dense(None, 200)[:, None], scores, -jnp.inf)
    np.testing.assert_allclose(logsumexp, jax.nn.logsumexp(hidden, axis=-1), atol=1e-5)


def test_nobody_sees_nothing_but_gets_zero():
    inputs, cotangent = _inputs(length=128)
    q, k, v, _ = inputs
    hidden = masks.Full() & masks.Segments(jnp.zeros((2, 128), jnp.int32).at[:, :5].set(1))
    out, logsumexp = flash.flash_forward(q, k, v, hidden, interpret=True)
    assert not out[:, 5:].any()
    gradients = flash.flash_backward(q, k, v, hidden, None, out, logsumexp, cotangent, interpret=True)
    assert not gradients[0][:, 5:].any()
    assert not gradients[1][:, 5:].any()


def test_copies_that_cannot_be_cut_are_computed_densely():
    assert flash.fits(200, 1, True)
    assert flash.fits(200, 2, False)
    assert flash.fits(256, 2, True)
    assert not flash.fits(200, 2, True)
    (q, k, v, diagonals), _ = _inputs(length=200, copies=2, bias=True)
    visibility = masks.two_streams(BLOCKS[:, :100])
    out = attend(q, k, v, SymbolicMask(visibility, 200, diagonals), implementation="flash")
    np.testing.assert_allclose(out, _dense(visibility, None, q, k, v, diagonals), atol=1e-6)


def test_the_entry_point_differentiates_and_other_implementations_evaluate_the_mask():
    """Off a TPU `attend` computes densely what the kernel would; the gradients are those of the dense function."""
    inputs, cotangent = _inputs(bias=True)
    visibility, _ = CASES["prefix, packed, bias, cap"]

    def attended(q, k, v, diagonals):
        return attend(q, k, v, SymbolicMask(visibility, LENGTH, diagonals), softcap=5.0, implementation="flash")

    out, pull = jax.vjp(attended, *inputs)
    expected, dense_pull = jax.vjp(lambda *inputs: _dense(visibility, 5.0, *inputs), *inputs)
    np.testing.assert_allclose(out, expected, atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), pull(cotangent), dense_pull(cotangent))
    mask = SymbolicMask(visibility, LENGTH, inputs[3])
    np.testing.assert_allclose(attend(*inputs[:3], mask, softcap=5.0, implementation="xla"), expected, atol=1e-6)
