"""Shardings on eight real (fake CPU) devices: shards have the sizes that the table says, values do not change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from diffusion_lm.core.errors import ConfigError
from diffusion_lm.core.special import SpecialTokens
from diffusion_lm.core.types import Batch
from diffusion_lm.parallel.mesh import MeshSpec
from diffusion_lm.parallel.rules import LogicalRules
from diffusion_lm.parallel.shardings import (
    Placement,
    place_batch,
    replicated,
    sharding_table,
    tree_shardings,
)

RULES = LogicalRules()
MESHES = [
    MeshSpec(data=8, fsdp=1),
    MeshSpec(fsdp=8),
    MeshSpec(data=2, fsdp=2, tensor=2),
    MeshSpec(fsdp=2, sequence=2, tensor=2),
]
AXES = {"up": ("embed", "mlp"), "down": ("mlp", "embed"), "scale": ("norm",)}


def _parameters() -> dict[str, jax.Array]:
    up, down = jax.random.split(jax.random.key(0))
    return {
        "up": jax.random.normal(up, (16, 32)) / 4,
        "down": jax.random.normal(down, (32, 16)) / 6,
        "scale": jnp.linspace(0.5, 1.5, 16),
    }


def _batch(rows: int = 8, length: int = 4) -> Batch:
    tokens = np.arange(rows * length, dtype=np.int32).reshape(rows, length)
    ones = np.ones_like(tokens)
    return Batch(
        tokens=tokens,
        target_mask=ones.astype(bool),
        loss_weights=(tokens % 3).astype(np.float32),
        segment_ids=ones,
        positions=np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape),
        example_ids=tokens.astype(np.uint32),
        special=SpecialTokens(64),
    )


def test_there_are_eight_devices():
    assert len(jax.devices()) == 8


@pytest.mark.parametrize("spec", MESHES, ids=str)
def test_shards_have_the_size_of_the_table(spec):
    mesh = spec.build()
    parameters = _parameters()
    placed = jax.device_put(parameters, tree_shardings(AXES, parameters, RULES, mesh))
    for row in sharding_table(AXES, parameters, RULES, mesh):
        shard = placed[row.name].addressable_shards[0].data
        assert shard.nbytes == row.bytes_per_device, row
        np.testing.assert_array_equal(placed[row.name], parameters[row.name])


@pytest.mark.parametrize("spec", MESHES, ids=str)
def test_batch_is_split_and_unchanged(spec):
    mesh = spec.build()
    batch = _batch()
    placed = place_batch(batch, RULES, mesh)
    rows = mesh.shape["data"] * mesh.shape["fsdp"]
    assert placed.tokens.addressable_shards[0].data.shape == (8 // rows, 4 // mesh.shape["sequence"])
    jax.tree.map(np.testing.assert_array_equal, placed, batch)


@pytest.mark.parametrize("spec", MESHES, ids=str)
def test_T10_weighted_loss_and_gradient_do_not_depend_on_the_mesh(spec):
    """Sums and weights over a sharded batch with ragged weights, divided once, equal those of one device."""
    parameters, batch = _parameters(), _batch()

    def loss(parameters, batch, constrain):
        hidden = jnp.sin(batch.tokens[..., None] * jnp.arange(1.0, 17.0)) * parameters["scale"]
        hidden = constrain(hidden, ("batch", "length", "activation_embed"))
        inner = constrain(jnp.tanh(hidden @ parameters["up"]), ("batch", "length", "mlp"))
        per_token = jnp.square(inner @ parameters["down"]).sum(-1)
        return (per_token * batch.loss_weights).sum() / batch.loss_weights.sum()

    alone = jax.value_and_grad(loss)(parameters, batch, lambda x, axes: x)
    mesh = spec.build()
    shardings = tree_shardings(AXES, parameters, RULES, mesh)
    constrain = Placement(mesh, RULES)
    step = jax.jit(jax.value_and_grad(lambda p, b: loss(p, b, constrain)), out_shardings=(replicated(mesh), shardings))
    value, gradient = step(jax.device_put(parameters, shardings), place_batch(batch, RULES, mesh))
    np.testing.assert_allclose(value, alone[0], rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), gradient, alone[1])
    assert gradient["up"].sharding.is_equivalent_to(shardings["up"], 2)


def test_constrain_pins_an_activation():
    mesh = MeshSpec(data=2, fsdp=2, tensor=2).build()
    constrain = Placement(mesh, RULES)
    inner = jax.jit(lambda x: constrain(x * 2, ("batch", "length", "mlp")))(jnp.ones((8, 4, 32)))
    assert inner.sharding.spec == P(("data", "fsdp"), None, "tensor")


def test_draws_do_not_depend_on_the_mesh():
    from diffusion_lm.core.rng import StreamKeys

    batch = _batch()
    keys = StreamKeys.create(3, 7)
    alone = keys.token_uniform("noise", batch.example_ids, batch.positions)
    mesh = MeshSpec(data=2, fsdp=2, sequence=2).build()
    placed = place_batch(batch, RULES, mesh)
    sharded = jax.jit(lambda b: keys.token_uniform("noise", b.example_ids, b.positions))(placed)
    np.testing.assert_array_equal(sharded, alone)


def test_mesh_that_does_not_fit_the_devices_is_refused():
    with pytest.raises(ConfigError, match="does not fit 8 devices"):
        MeshSpec(data=3, fsdp=-1).build()
