"""Stacks of blocks as pure functions.

The parameters of the N blocks always have a leading `layers` axis. Whether the compiled program loops over the blocks
or unrolls them is a setting of execution, and checkpoints do not depend on it.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusion_lm.core.axes import AxesTree
from diffusion_lm.core.types import Params
from diffusion_lm.nn.attention_mask import DenseMask
from diffusion_lm.nn.block import TransformerBlock
from diffusion_lm.nn.cache import KVCache
from diffusion_lm.nn.constrain import Constrain, no_constraint
from diffusion_lm.nn.layers import ADAPTERS, Context, HeadTransform, Norm, SelfConditioning
from diffusion_lm.nn.remat import rematerialise
from diffusion_lm.nn.transformer import TransformerSpec


def init_stack(spec: TransformerSpec, key: jax.Array, layers: int, has_cross: bool = False) -> Params:
    """Returns the stacked parameters of `layers` blocks; those of block i do not depend on the number of blocks."""
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(layers))
    return jax.vmap(lambda key: _values(_init_block(spec, key, has_cross)))(keys)


def stack_axes(spec: TransformerSpec, has_cross: bool = False) -> AxesTree:
    """Returns the logical axes of `init_stack`'s tree, each tuple beginning with "layers"."""
    boxed = jax.eval_shape(lambda: _init_block(spec, jax.random.key(0), has_cross))
    return jax.tree.map(lambda box: ("layers", *box.names), boxed, is_leaf=_is_box)


def run_stack(
    spec: TransformerSpec,
    blocks: Params,
    x_BQD: jax.Array,
    context: Context,
    *,
    cache: KVCache | None = None,
    cross: KVCache | None = None,
) -> tuple[jax.Array, KVCache | None]:
    """Runs all blocks.

    Args:
      spec: the network's shape.
      blocks: from `init_stack`, or `layers_apart` of that if layers are not scanned; may hold low-rank adapters under
        the name `ADAPTERS`, stacked like the rest.
      x_BQD: embedded tokens in the compute dtype.
      context: masks, positions and other shared inputs; blocks have cross-attention if there is a `memory_mask`.
      cache: read and written at `context.positions`, or None.
      cross: the projected cross-attention keys and values of every layer, or None: each block projects its own.

    Returns:
      The residual stream before the final norm, and the cache.
    """
    block = TransformerBlock(spec, has_cross=context.memory_mask is not None)

    def one(x_BQD, cache, params, layer, cross):
        cross = None if cross is None else (cross.keys_NBTKE, cross.values_NBTKE)
        return block.apply(_collections(params), x_BQD, context, layer, cache, cross)

    one = rematerialise(one, spec.remat)
    if spec.scan_layers:
        layers = jax.tree.leaves(blocks)[0].shape[0]
        (x_BQD, cache), _ = jax.lax.scan(
            lambda carry, xs: (one(*carry, *xs), None), (x_BQD, cache), (blocks, jnp.arange(layers), cross)
        )
        return x_BQD, cache
    # Unrolled: `layer` is a Python int, so that a block can branch on it while it is traced.
    leaves, tree = jax.tree.flatten([blocks, cross], is_leaf=_is_apart)
    for layer, slices in enumerate(zip(*map(_apart, leaves), strict=True)):
        params, layer_cross = jax.tree.unflatten(tree, slices)
        x_BQD, cache = one(x_BQD, cache, params, layer, layer_cross)
    return x_BQD, cache


def layers_apart(blocks: Params) -> Params:
    """Returns the tree of `init_stack` with a tuple of per-layer arrays in place of each stacked array.

    For loops around a network: inside a loop, XLA's CPU backend copies every layer out of its stack in every iteration.
    """
    return jax.tree.map(_apart, blocks)


def _apart(leaf: jax.Array | tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    # `unstack` transposes to one concatenation; indexing would transpose to N additions of the whole stack.
    return leaf if isinstance(leaf, tuple) else jnp.unstack(leaf)


def _is_apart(leaf: Any) -> bool:
    return isinstance(leaf, tuple)


def project_memory(spec: TransformerSpec, blocks: Params, memory_BSD: jax.Array) -> KVCache:
    """Returns the cross-attention keys and values of all layers, [N,B,S,K,E]."""
    block = TransformerBlock(spec, has_cross=True)
    blocks = jax.tree.map(lambda leaf: jnp.stack(leaf) if _is_apart(leaf) else leaf, blocks, is_leaf=_is_apart)
    project = jax.vmap(lambda params: block.apply(_collections(params), memory_BSD, method=block.project_memory))
    return KVCache(*project(blocks))


def init_norm(spec: TransformerSpec) -> Params:
    """Returns the parameters of a norm outside the blocks."""
    return _values(_init_norm(spec))


def norm_axes(spec: TransformerSpec) -> AxesTree:
    """Returns the logical axes of `init_norm`'s tree."""
    return jax.tree.map(lambda box: box.names, jax.eval_shape(lambda: _init_norm(spec)), is_leaf=_is_box)


def run_norm(spec: TransformerSpec, params: Params, x_BTD: jax.Array) -> jax.Array:
    """Applies a norm outside the blocks."""
    normed: Any = Norm(spec).apply({"params": params}, x_BTD)
    return normed


def init_head_transform(spec: TransformerSpec, key: jax.Array) -> Params:
    """Returns the parameters of the layer before the output projection."""
    return _values(_init_head_transform(spec, key))


def head_transform_axes(spec: TransformerSpec) -> AxesTree:
    """Returns the logical axes of `init_head_transform`'s tree."""
    boxed = jax.eval_shape(lambda: _init_head_transform(spec, jax.random.key(0)))
    return jax.tree.map(lambda box: box.names, boxed, is_leaf=_is_box)


@dataclasses.dataclass(frozen=True)
class RunHeadTransform:
    """The layer before the output projection, as a function that compares by value, so that it can be a static field.

    Attributes:
      spec: the network's shape.
    """

    spec: TransformerSpec

    def __call__(self, params: Params, x_BTD: jax.Array) -> jax.Array:
        """Returns [B,T,D], the input of the output projection."""
        transformed: Any = HeadTransform(self.spec).apply({"params": params}, x_BTD)
        return transformed


def init_self_conditioning(spec: TransformerSpec, key: jax.Array) -> Params:
    """Returns fresh parameters of the layer that reads a previous prediction; with them it adds zero."""
    params: dict[str, Any] = dict(_values(_init_self_conditioning(spec, key)))
    # So that a trained network that gets the layer later starts out unchanged, whatever the signal is.
    return params | {"mlp": params["mlp"] | {"down": jnp.zeros_like(params["mlp"]["down"])}}


def self_conditioning_axes(spec: TransformerSpec) -> AxesTree:
    """Returns the logical axes of `init_self_conditioning`'s tree."""
    boxed = jax.eval_shape(lambda: _init_self_conditioning(spec, jax.random.key(0)))
    return jax.tree.map(lambda box: box.names, boxed, is_leaf=_is_box)


def run_self_conditioning(
    spec: TransformerSpec, params: Params, signal_BTD: jax.Array, constrain: Constrain
) -> jax.Array:
    """Returns [B,T,D], to be added to the embedded tokens, from the expected embedding of a previous prediction."""
    context = _empty_context(constrain)
    added: Any = SelfConditioning(spec).apply({"params": params}, signal_BTD.astype(spec.compute_dtype), context)
    return added


def _init_self_conditioning(spec: TransformerSpec, key: jax.Array):
    signal = jnp.zeros((1, 1, spec.model_dim), spec.compute_dtype)
    return SelfConditioning(spec).init(key, signal, _empty_context())["params"]


def _empty_context(constrain: Constrain = no_constraint) -> Context:
    """Returns the context of a layer that looks at one token by itself."""
    return Context(
        mask=DenseMask(jnp.ones((1, 1, 1), bool)), positions=jnp.zeros((1, 1), jnp.int32), constrain=constrain
    )


def _init_block(spec: TransformerSpec, key: jax.Array, has_cross: bool):
    """Returns one block's boxed parameters; inside jit or vmap the unused pass is removed by the compiler."""
    spec = dataclasses.replace(spec, attention="xla")  # the cuDNN kernel supports neither vmap nor every device
    context = Context(
        mask=DenseMask(jnp.ones((1, 1, 1), bool)),
        positions=jnp.zeros((1, 1), jnp.int32),
        memory_BSD=jnp.zeros((1, 1, spec.model_dim), spec.compute_dtype) if has_cross else None,
        memory_mask=DenseMask(jnp.ones((1, 1, 1), bool)) if has_cross else None,
    )
    x = jnp.zeros((1, 1, spec.model_dim), spec.compute_dtype)
    return TransformerBlock(spec, has_cross=has_cross).init(key, x, context, 0)["params"]


def _init_head_transform(spec: TransformerSpec, key: jax.Array):
    return HeadTransform(spec).init(key, jnp.zeros((1, 1, spec.model_dim), spec.compute_dtype))["params"]


def _init_norm(spec: TransformerSpec):
    return Norm(spec).init(jax.random.key(0), jnp.zeros((1, 1, spec.model_dim)))["params"]


def _collections(block: Params) -> dict[str, Any]:
    """Returns a block's parameters as Linen's collections, with the adapters in their own."""
    params = {name: part for name, part in block.items() if name != ADAPTERS}
    return {"params": params, ADAPTERS: block.get(ADAPTERS, {})}


def _is_box(leaf) -> bool:
    return isinstance(leaf, nn.LogicallyPartitioned)


def _values(boxed) -> Params:
    # Not `nn.unbox`: it would constrain the sharding by the axis rules of a global context.
    return jax.tree.map(lambda box: box.value, boxed, is_leaf=_is_box)
