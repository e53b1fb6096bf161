"""Checkpoints are read straight into their shardings."""

import pathlib

import jax
import numpy as np
import pytest

from diffusion_lm.interop import assemble
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


@pytest.mark.parametrize("mesh", [None, MeshSpec(fsdp=8), MeshSpec(data=2, fsdp=2, tensor=2)], ids=str)
@pytest.mark.parametrize("name", ["modernbert", "t5_1_1"])
def test_large_arrays_are_written_layer_by_layer(mesh, name, monkeypatch):
    """The same numbers in the same places, and never more than a layer of an array on the host."""
    whole = load(FOLDER / name, mesh=mesh)
    monkeypatch.setattr(assemble, "SLICE_BYTES", 500)
    parts = load(FOLDER / name, mesh=mesh)

    def check(a, b):
        assert a.sharding == b.sharding
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))

    jax.tree.map(check, whole.params, parts.params)
    outside = max(leaf.nbytes for name, leaf in parts.params["embed"].items())
    stacked = max(leaf.nbytes // leaf.shape[0] for leaf in jax.tree.leaves(parts.params["blocks"]))
    # The layer, and its tensor or, of what is fused with it, all three.
    assert parts.report.peak_host <= max(outside + 500, 4 * stacked)
