"""Partitions depend on names and sizes only, so an abstract mesh of any size tests them on one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from diffusion_lm.core.errors import ConfigError
from diffusion_lm.parallel.mesh import MESH_AXES, MeshSpec
from diffusion_lm.parallel.rules import LogicalRules
from diffusion_lm.parallel.shardings import (
    Placement,
    batch_divisor,
    batch_shardings,
    resolve,
    sharding_table,
    spec_for,
    tree_shardings,
)

RULES = LogicalRules()
MESH = AbstractMesh((2, 4, 1, 2), MESH_AXES)


@pytest.mark.parametrize(
    ("axes", "shape", "expected"),
    [
        (("embed", "mlp"), (64, 256), P("fsdp", "tensor")),
        (("layers", "embed", "heads", "head_dim"), (12, 64, 4, 16), P(None, "fsdp", "tensor")),
        (("vocab", "embed"), (32128, 64), P("tensor", "fsdp")),
        (("batch", "length"), (16, 128), P(("data", "fsdp"))),
        ((None, "norm"), (12, 64), P()),
        ((), (), P()),
    ],
)
def test_spec_follows_the_rules(axes, shape, expected):
    assert spec_for(axes, RULES, shape, MESH) == expected


def test_dimension_that_does_not_divide_keeps_what_divides_and_is_reported():
    spec, fallbacks = resolve(("batch", "heads"), RULES, (6, 3), MESH)
    assert spec == P("data")
    assert [str(f) for f in fallbacks] == [
        "batch (6) not split over fsdp: 6 is not divisible by 8",
        "heads (3) not split over tensor: 3 is not divisible by 2",
    ]


def test_mesh_axis_splits_one_dimension_only():
    spec, fallbacks = resolve(("heads", "kv_heads"), RULES, (4, 4), MESH)
    assert spec == P("tensor")
    assert len(fallbacks) == 1


def test_axes_of_size_one_report_nothing():
    assert resolve(("embed", "heads"), RULES, (7, 3), AbstractMesh((1, 1, 1, 1), MESH_AXES)) == (P(), ())


def test_unknown_axis_is_refused():
    with pytest.raises(ConfigError, match="logical axis"):
        spec_for(("hedas",), RULES, (4,), MESH)


def test_tree_and_table_agree_with_the_leaves():
    axes = {"embed": {"tokens": ("vocab", "embed")}, "blocks": [("layers", "embed", "mlp")], "step": ()}
    leaves = {
        "embed": {"tokens": jax.ShapeDtypeStruct((128, 64), jnp.float32)},
        "blocks": [jax.ShapeDtypeStruct((2, 64, 255), jnp.bfloat16)],
        "step": jax.ShapeDtypeStruct((), jnp.int32),
    }
    shardings = tree_shardings(axes, leaves, RULES, MESH)
    assert shardings["embed"]["tokens"].spec == P("tensor", "fsdp")
    assert shardings["step"].spec == P()
    rows = {row.name: row for row in sharding_table(axes, leaves, RULES, MESH)}
    assert rows["embed/tokens"].spec == "tensor, fsdp"
    assert rows["embed/tokens"].bytes_per_device == 128 * 64 * 4 // 8
    assert rows["blocks/0"].bytes_per_device == 2 * 64 * 255 * 2 // 4
    assert rows["blocks/0"].fallbacks == ("mlp (255) not split over tensor: 255 is not divisible by 2",)
    assert rows["step"].spec == "whole"


def test_batch_leaves_are_split_by_rows_and_tokens():
    mesh = AbstractMesh((2, 2, 2, 1), MESH_AXES)
    batch = {"tokens": np.zeros((8, 16), np.int32), "rows": np.zeros((8,), np.int32)}
    shardings = batch_shardings(batch, RULES, mesh)
    assert shardings["tokens"].spec == P(("data", "fsdp"), "sequence")
    assert shardings["rows"].spec == P(("data", "fsdp"))
    assert batch_divisor(RULES, mesh) == 4


def test_constrain_on_one_device_is_free():
    x = jnp.ones((2, 3))
    assert Placement(MeshSpec().build(jax.devices()[:1]), RULES)(x, ("batch", None)) is x
