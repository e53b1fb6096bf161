"""Reads parameters onto the devices while holding little of them on the host.

Our parameters stack all layers in one array, [layers, ...]; the files have one tensor per layer. A small array is
filled on the host and sent. A large one is created as zeros on the devices, and its layers are sent and written into it
one by one, so the host holds one layer at a time.
"""

import functools
from typing import Protocol

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
      plan: the tensors of each parameter.
      architecture: the network.
      checkpoint: the tensors.
      mesh: devices to shard the parameters over; None = the first device only.
      rules: logical axis rules of the sharding; None = the default rules.
      meter: counts the bytes that are held on the host.
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
    """Returns a stacked array whose layers are read, sent and written one after the other."""
    of_layer = _without_layers(sharding)
    array = jax.jit(lambda: jax.numpy.zeros(leaf.shape, leaf.dtype), out_shardings=sharding)()
    write = _writer(sharding)
    for layer in range(leaf.shape[0]):
        with meter.holding(leaf.size // leaf.shape[0] * leaf.dtype.itemsize):
            buffer = np.zeros(leaf.shape[1:], leaf.dtype)
            read_layer(buffer, weight, layer, architecture.spec, checkpoint, meter)
            # The transfer is asynchronous and may read from the buffer, so wait before the buffer is freed.
            array = jax.block_until_ready(write(array, _placed(buffer, of_layer), layer))
    return array


class _WriteLayer(Protocol):
    def __call__(self, array: jax.Array, part: jax.Array, layer: int) -> jax.Array: ...


@functools.cache
def _writer(sharding: jax.sharding.Sharding) -> _WriteLayer:
    """Returns the compiled function that writes a layer into its array."""

    def write(array: jax.Array, part: jax.Array, layer: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_index_in_dim(array, part, layer, axis=0)

    # Donation makes the update in place; without it the devices would hold the array twice.
    return jax.jit(write, donate_argnums=0, out_shardings=sharding)


def _placed(buffer: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    """Returns the buffer as an array on the devices; on CPU the array may share the buffer's memory."""
    return jax.block_until_ready(jax.make_array_from_callback(buffer.shape, sharding, lambda index: buffer[index]))


def _whole_layers(sharding: jax.sharding.Sharding) -> bool:
    """Returns whether the axis of layers is not sharded, so that a layer can be written on its own."""
    return not isinstance(sharding, jax.sharding.NamedSharding) or not any(sharding.spec[:1])


def _without_layers(sharding: jax.sharding.Sharding) -> jax.sharding.Sharding:
    """Returns the sharding of one layer of a stacked array with this sharding."""
    if not isinstance(sharding, jax.sharding.NamedSharding):
        return sharding
    return jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(*sharding.spec[1:]))


def _fresh(architecture: SingleStream | EncoderDecoder, name: str, sharding: jax.sharding.Sharding) -> jax.Array:
    """Returns one parameter of `init`; XLA removes the computation of all others."""

    def pick(key: jax.Array) -> jax.Array:
        params = {
            jax.tree_util.keystr(path, simple=True, separator="/"): leaf
            for path, leaf in jax.tree_util.tree_leaves_with_path(architecture.init(key))
        }
        return params[name]

    return jax.jit(pick, out_shardings=sharding)(jax.random.key(0))
