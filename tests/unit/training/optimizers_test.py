"""Update rules against optax, clipping, and what decays."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from training_stubs import nano

from diffusion_lm.core.errors import ConfigError
from diffusion_lm.parallel.shardings import is_axes
from diffusion_lm.training.optimizers import Adafactor, AdamW, Muon, decay_mask

MATRIX = {"w": ("embed", "mlp")}


def _random(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def _run(rule, params, gradients, rate):
    state = rule.init(params)
    for gradient in gradients:
        direction, state = rule.update(gradient, state, params)
        params = jax.tree.map(lambda p, d: p - rate * d, params, direction)
    return params


def _run_optax(optimizer, params, gradients):
    state = optimizer.init(params)
    for gradient in gradients:
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params


def test_adamw_equals_optax():
    params, gradients = {"w": _random((8, 4))}, [{"w": 30 * _random((8, 4), seed)} for seed in range(1, 4)]
    ours = _run(AdamW(b2=0.95, weight_decay=0.1).transformation(MATRIX), params, gradients, 0.03)
    theirs = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.03, b2=0.95, weight_decay=0.1))
    np.testing.assert_allclose(ours["w"], _run_optax(theirs, params, gradients)["w"], atol=1e-6)


@pytest.mark.parametrize("shape", [(160, 130), (8, 4)], ids=["factored", "full"])
def test_adafactor_equals_optax(shape):
    params, gradients = {"w": _random(shape)}, [{"w": _random(shape, seed)} for seed in range(1, 5)]
    ours = _run(Adafactor().transformation(MATRIX), params, gradients, 0.01)
    theirs = _run_optax(optax.adafactor(0.01), params, gradients)
    np.testing.assert_allclose(ours["w"], theirs["w"], atol=1e-6)


def test_adafactor_treats_each_layer_of_the_stack_as_a_parameter():
    """How parameters are stored changes no update: three layers stacked equal three apart, at very different scales."""
    scale = jnp.asarray([1.0, 10.0, 0.1])[:, None, None]
    params, gradients = {"w": scale * _random((3, 160, 130))}, [{"w": scale * _random((3, 160, 130), 1)}] * 2
    ours = _run(Adafactor().transformation({"w": ("layers", "embed", "mlp")}), params, gradients, 0.01)
    for layer in range(3):
        one, gradient = {"w": params["w"][layer]}, [{"w": g["w"][layer]} for g in gradients]
        theirs = _run_optax(optax.adafactor(0.01), one, gradient)
        np.testing.assert_allclose(ours["w"][layer], theirs["w"], rtol=1e-5, atol=1e-7)


def test_adafactor_joins_heads_and_their_size_as_t5x_does():
    params, gradients = {"w": _random((160, 8, 20))}, [{"w": _random((160, 8, 20), 1)}]
    rule = Adafactor().transformation({"w": ("embed", "heads", "head_dim")})
    factored = max(leaf.size for leaf in jax.tree.leaves(rule.init(params)))
    assert factored == 160, "the second moment of a 160 x 160 matrix should be two vectors"
    joined = [{"w": tree["w"].reshape(160, 160)} for tree in (params, *gradients)]
    theirs = _run_optax(optax.adafactor(0.01), joined[0], joined[1:])
    np.testing.assert_allclose(_run(rule, params, gradients, 0.01)["w"].reshape(160, 160), theirs["w"], atol=1e-6)


def test_T60_decay_mask_leaves_out_norms_biases_and_embeddings():
    axes = nano(use_bias=True, qkv_bias=True, norm="layernorm", tied_embeddings=False).logical_axes()
    decays = {
        jax.tree_util.keystr(path, simple=True, separator="/"): decay
        for path, decay in jax.tree_util.tree_leaves_with_path(decay_mask(axes))
    }
    assert {name for name, decay in decays.items() if decay} == {
        *(f"blocks/attention/{name}" for name in ("query", "key", "value", "output")),
        *(f"blocks/mlp/{name}" for name in ("gate", "up", "down")),
        "head/tokens",
    }
    learned = decay_mask(nano(position="learned", max_positions=16).logical_axes())
    assert learned["positions"] is False


def test_T60_weight_decay_moves_only_what_the_mask_says():
    model = nano()
    params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), model.abstract_params())
    rule = AdamW(weight_decay=0.5).transformation(model.logical_axes())
    direction, _ = rule.update(jax.tree.map(jnp.zeros_like, params), rule.init(params), params)
    mask = decay_mask(model.logical_axes())
    for decays, moved in zip(jax.tree.leaves(mask), jax.tree.leaves(direction), strict=True):
        assert float(jnp.max(jnp.abs(moved))) == (0.5 if decays else 0.0)


def test_T60_clipping_is_by_global_norm():
    """The gradient has norm 13 and is clipped to 1.3: all of it becomes a tenth. Element-wise clipping would not."""
    gradient = {"w": jnp.asarray([[3.0, 0.0], [0.0, 4.0]]), "v": jnp.asarray([[12.0]])}
    rule = AdamW(clip_norm=1.3, b2=0.9).transformation({"w": ("embed", "mlp"), "v": ("embed", "mlp")})
    _, state = rule.update(gradient, rule.init(gradient), gradient)
    seen = jax.tree.map(lambda nu: jnp.sqrt(nu / 0.1), optax.tree.get(state, "nu"))
    np.testing.assert_allclose(seen["w"], gradient["w"] / 10, rtol=1e-5)
    np.testing.assert_allclose(seen["v"], gradient["v"] / 10, rtol=1e-5)


def test_every_parameter_has_a_mask():
    axes = nano().logical_axes()
    assert len(jax.tree.leaves(decay_mask(axes))) == len(jax.tree.leaves(axes, is_leaf=is_axes))


@pytest.mark.parametrize(
    "make",
    [
        lambda: AdamW(b1=1.5),
        lambda: AdamW(weight_decay=-1.0),
        lambda: AdamW(clip_norm="1"),
        lambda: AdamW(schedule=1e-3),
        lambda: Adafactor(clipping_threshold=0.5),
    ],
)
def test_wrong_values_are_refused(make):
    with pytest.raises(ConfigError):
        make()


def _orthogonalised(gradients, momentum, rms):
    """Muon's definition with numpy: Nesterov momentum, then the quintic Newton-Schulz iteration."""
    average, corrected = np.zeros_like(gradients[0]), None
    for number, gradient in enumerate(gradients, start=1):
        average = momentum * average + (1 - momentum) * gradient
        ahead = average / (1 - momentum ** (number + 1))
        corrected = momentum * ahead + (1 - momentum) * gradient / (1 - momentum**number)
    x = corrected / np.linalg.norm(corrected)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return rms * np.sqrt(max(x.shape)) * x


def test_muon_orthogonalises_each_layer_with_heads_and_their_size_joined():
    gradients = [np.random.default_rng(seed).standard_normal((3, 6, 2, 4)) for seed in (1, 2)]
    axes = {"w": ("layers", "embed", "heads", "head_dim")}
    rule = Muon(momentum=0.9, weight_decay=0.0, clip_norm=None).transformation(axes)
    params = {"w": jnp.zeros((3, 6, 2, 4))}
    state = rule.init(params)
    for gradient in gradients:
        direction, state = rule.update({"w": jnp.asarray(gradient, jnp.float32)}, state, params)
    for layer in range(3):
        expected = _orthogonalised([g[layer].reshape(6, 8) for g in gradients], 0.9, 0.2)
        np.testing.assert_allclose(direction["w"][layer].reshape(6, 8), expected, rtol=1e-3, atol=1e-4)


def test_muon_leaves_embeddings_and_norms_to_adam():
    model = nano()
    params = jax.tree.map(lambda leaf: 0.1 * _random(leaf.shape), model.abstract_params())
    gradients = jax.tree.map(lambda leaf: _random(leaf.shape, 1), params)
    axes = model.logical_axes()
    muon, adam = Muon(clip_norm=None), AdamW(clip_norm=None)
    directions = [
        rule.update(gradients, rule.init(params), params)[0]
        for rule in (muon.transformation(axes), adam.transformation(axes))
    ]
    for path, decays in jax.tree_util.tree_leaves_with_path(decay_mask(axes)):
        ours, adams = (direction for direction in directions)
        for key in path:
            ours, adams = ours[key.key], adams[key.key]
        assert bool(jnp.allclose(ours, adams, atol=1e-5)) == (not decays), jax.tree_util.keystr(path)


def test_muon_takes_the_output_projection_as_heads_to_width():
    axes = {"w": ("layers", "heads", "head_dim", "embed")}
    gradient = np.random.default_rng(3).standard_normal((1, 2, 4, 6))
    rule = Muon(momentum=0.0, weight_decay=0.0, clip_norm=None).transformation(axes)
    params = {"w": jnp.zeros((1, 2, 4, 6))}
    direction, _ = rule.update({"w": jnp.asarray(gradient, jnp.float32)}, rule.init(params), params)
    singular = np.linalg.svd(np.asarray(direction["w"]).reshape(8, 6), compute_uv=False) / (0.2 * np.sqrt(8))
    assert singular.min() > 0.3
    assert singular.max() < 1.3
