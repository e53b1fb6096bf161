"""Checkpoints are read straight into their shardings."""

import pathlib

import jax
import numpy as np
import pytest

from diffusion_lm.interop.huggingface import load
from diffusion_lm.parallel.mesh import MeshSpec

FOLDER = pathlib.Path(__file__).parents[1] / "golden" / "huggingface"


@pytest.mark.parametrize("name", ["qwen2_some_windows", "t5_1_1"])
@pytest.mark.parametrize("mesh", [MeshSpec(fsdp=8), MeshSpec(data=2, fsdp=2, tensor=2)], ids=str)
def test_arrays_arrive_sharded_and_equal(mesh, name):
    whole, split = load(FOLDER / name), load(FOLDER / name, mesh=mesh)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), whole.params, split.params)
    kernel = split.params["blocks"]["mlp"]["up"]
    assert len(kernel.sharding.device_set) == 8
    shares = mesh.build().shape["fsdp"] * mesh.build().shape["tensor"]
    assert kernel.addressable_shards[0].data.size == kernel.size // shares
    assert len(whole.params["blocks"]["mlp"]["up"].sharding.device_set) == 1
