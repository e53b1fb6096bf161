"""Attention whose kernels are split by hand gives what one device gives, gradients included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_lm.core.errors import ConfigError
from diffusion_lm.nn import masks, named_masks
from diffusion_lm.nn.attention import attend
from diffusion_lm.nn.attention_mask import SymbolicMask
from diffusion_lm.parallel.mesh import MeshSpec
from diffusion_lm.parallel.rules import LogicalRules
from diffusion_lm.parallel.shardings import Placement

TARGET = jnp.arange(8) > jnp.arange(4)[:, None]


def _inputs(kv_heads=2):
    keys = jax.random.split(jax.random.key(0), 4)
    q = jax.random.normal(keys[0], (4, 8, 4, 6))
    k, v = (jax.random.normal(key, (4, 8, kv_heads, 6)) for key in keys[1:3])
    return q, k, v, jax.random.normal(keys[3], (4, 16))


@pytest.mark.parametrize("spec", [MeshSpec(data=4, fsdp=1, tensor=2), MeshSpec(fsdp=2, sequence=2, tensor=2)], ids=str)
def test_devices_share_rows_and_heads(spec):
    visibility = named_masks.named_visibility("prefix", TARGET) & masks.Rows(jnp.ones((1,), bool))

    def loss(inputs, **settings):
        *qkv, diagonals = inputs
        out = attend(*qkv, SymbolicMask(visibility, 8, diagonals), implementation="flash", **settings)
        return jnp.sum(jnp.sin(out))

    placement = Placement(spec.build(), LogicalRules())
    expected = jax.value_and_grad(loss)(_inputs())
    found = jax.jit(jax.value_and_grad(lambda inputs: loss(inputs, constrain=placement)))(_inputs())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, expected)


def test_too_few_key_value_heads_are_refused():
    q, k, v, _ = _inputs(kv_heads=1)
    placement = Placement(MeshSpec(data=4, fsdp=1, tensor=2).build(), LogicalRules())
    with pytest.raises(ConfigError, match="1 key/value heads cannot be split"):
        attend(q, k, v, SymbolicMask(masks.Causal(), 8), implementation="flash", constrain=placement)
