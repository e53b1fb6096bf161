"""A network whose attention evaluates the visibility itself computes what it computes from a mask."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_lm.architectures.base import BoundModel
from diffusion_lm.architectures.single_stream import SingleStream
from diffusion_lm.nn import masks, named_masks
from diffusion_lm.nn.transformer import TransformerSpec

T5 = TransformerSpec(
    vocab_size=37, num_layers=2, model_dim=16, num_heads=4, head_dim=6, mlp_dim=24, relative_max_distance=12
)
WINDOWS = dataclasses.replace(T5, position="rope", num_kv_heads=2, window=3, window_layers=(1,))
TARGET = jnp.arange(8) > jnp.array([[1], [4]])


@pytest.mark.parametrize("scanned", [True, False], ids=["scanned", "unrolled"])
@pytest.mark.parametrize(("spec", "copies"), [(T5, 1), (T5, 2), (WINDOWS, 1)], ids=["t5", "t5-two-copies", "windows"])
def test_expressions_equal_masks(spec, copies, scanned):
    spec = dataclasses.replace(spec, scan_layers=scanned)
    params = SingleStream(spec).init(jax.random.key(0))
    visibility = named_masks.named_visibility("prefix", TARGET)
    if copies == 2:
        visibility = masks.two_streams(jnp.broadcast_to(jnp.arange(4) // 2, (2, 4)))
    tokens = jax.random.randint(jax.random.key(1), (2, 8), 0, 37)
    positions = jnp.broadcast_to(jnp.tile(jnp.arange(8 // copies), copies), (2, 8))
    segments = jnp.array([[1] * 5 + [2] * 3, [1] * 7 + [0]]) if copies == 1 else jnp.ones((2, 8), jnp.int32)

    def loss(params, attention):
        network = SingleStream(dataclasses.replace(spec, attention=attention))
        hidden = BoundModel(network, params)(tokens, visibility=visibility, positions=positions, segment_ids=segments)
        return jnp.sum(jnp.sin(hidden.values_BTD))

    expected = jax.jit(jax.value_and_grad(loss), static_argnums=1)(params, "xla")
    found = jax.jit(jax.value_and_grad(loss), static_argnums=1)(params, "flash")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-4), found, expected)
