"""From a plan to parameters on the devices, with no more of them on the host than one layer of an array at a time.

An array of ours holds all layers, a tensor of a file one. A small array is put together on the host; a large one is
made on the devices as zeros, and its layers are written into it there, one by one.
"""

import functools
from typing import Any

import jax
import numpy as np

from diffusion_lm.architectures.encoder_decoder import EncoderDecoder
from diffusion_lm.architectures.single_stream import SingleStream
from diffusion_lm.core.types import Params
from diffusion_lm.interop import assemble
from diffusion_lm.interop.assemble import Meter, Plan, read_array, read_layer
from diffusion_lm.interop.name_maps.family import Weight
from diffusion_lm.interop.tensor_files import Checkpoint
from diffusion_lm.parallel.mesh import MeshSpec
from diffusion_lm.parallel.rules import LogicalRules
from diffusion_lm.parallel.shardings import tree_shardings


def read_params(
    plan: Plan,
    architecture: SingleStream | EncoderDecoder,
    checkpoint: Checkpoint,
    mesh: MeshSpec | None,
    rules: LogicalRules | None,
    meter: Meter,
) -> Params:
    """Returns the parameters.

    Args:
      plan: which tensors make which array.
      architecture: whose parameters they are.
      checkpoint: the tensors.
      mesh: devices to lay them out on; None = the first device.
      rules: how they are split over the mesh; None = the default rules.
      meter: counts what is held on the host meanwhile.
    """
    abstract = architecture.abstract_params()
    if mesh is None:
        single = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        shardings = jax.tree.map(lambda _: single, abstract)
    else:
        shardings = tree_shardings(architecture.logical_axes(), abstract, rules or LogicalRules(), mesh.build())

    def one(path, leaf: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name in plan.missing:
            return _fresh(architecture, name, sharding)
        weight = plan.weights[name]
        size = leaf.size * leaf.dtype.itemsize
        if weight.stacked and size > assemble.SLICE_BYTES and _whole_layers(sharding):
            return _layer_by_layer(leaf, weight, sharding, architecture, checkpoint, meter)
        with meter.holding(size):
            buffer = np.zeros(leaf.shape, leaf.dtype)
            read_array(buffer, weight, architecture.spec, checkpoint, meter)
            return _placed(buffer, sharding)

    return jax.tree_util.tree_map_with_path(one, abstract, shardings)


def _layer_by_layer(
    leaf: jax.ShapeDtypeStruct,
    weight: Weight,
    sharding: jax.sharding.Sharding,
    architecture: SingleStream | EncoderDecoder,
    checkpoint: Checkpoint,
    meter: Meter,
) -> jax.Array:
    """Returns a stacked array whose layers were read, sent and written one after the other."""
    of_layer = _without_layers(sharding)
    array = jax.jit(lambda: jax.numpy.zeros(leaf.shape, leaf.dtype), out_shardings=sharding)()
    write = _writer(sharding)
    for layer in range(leaf.shape[0]):
        with meter.holding(leaf.size // leaf.shape[0] * leaf.dtype.itemsize):
            buffer = np.zeros(leaf.shape[1:], leaf.dtype)
            read_layer(buffer, weight, layer, architecture.spec, checkpoint, meter)
            # The buffer may be what the device reads from, so it is kept until the layer is written.
            array = jax.block_until_ready(write(array, _placed(buffer, of_layer), layer))
    return array


@functools.cache
def _writer(sharding: jax.sharding.Sharding) -> Any:
    """Returns the program that writes a layer into its array in place."""

    def write(array: jax.Array, part: jax.Array, layer: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_index_in_dim(array, part, layer, axis=0)

    return jax.jit(write, donate_argnums=0, out_shardings=sharding)


def _placed(buffer: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    """Returns a buffer on the devices, one shard after the other; on CPU the array may be the buffer itself."""
    return jax.block_until_ready(jax.make_array_from_callback(buffer.shape, sharding, lambda index: buffer[index]))


def _whole_layers(sharding: jax.sharding.Sharding) -> bool:
    """Returns whether every device has its part of every layer."""
    return not isinstance(sharding, jax.sharding.NamedSharding) or not any(sharding.spec[:1])


def _without_layers(sharding: jax.sharding.Sharding) -> jax.sharding.Sharding:
    """Returns the sharding of one layer of an array that is sharded like this."""
    if not isinstance(sharding, jax.sharding.NamedSharding):
        return sharding
    return jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(*sharding.spec[1:]))


def _fresh(architecture: SingleStream | EncoderDecoder, name: str, sharding: jax.sharding.Sharding) -> jax.Array:
    """Returns one array of `init`; the compiled program computes no other."""

    def pick(key: jax.Array) -> jax.Array:
        tree: Any = architecture.init(key)
        for part in name.split("/"):
            tree = tree[part]
        return tree

    return jax.jit(pick, out_shardings=sharding)(jax.random.key(0))
