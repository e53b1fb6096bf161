"""Stacks of blocks as pure functions. The parameters of the N blocks lie on a leading `layers` axis, always; whether
the compiled program loops over them or unrolls them is a matter of execution and leaves checkpoints alone."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusion_lm.core.types import Params
from diffusion_lm.nn.attention_mask import DenseMask
from diffusion_lm.nn.block import Block
from diffusion_lm.nn.cache import KVCache
from diffusion_lm.nn.constrain import Constrain, no_constraint
from diffusion_lm.nn.layers import ADAPTERS, Context, HeadTransform, Norm, SelfConditioning
from diffusion_lm.nn.remat import rematerialise
from diffusion_lm.nn.transformer import TransformerSpec


def init_stack(spec: TransformerSpec, key: jax.Array, layers: int, has_cross: bool = False) -> Params:
    """Returns the parameters of `layers` blocks, stacked: block i's do not depend on how many there are."""
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(layers))
    return jax.vmap(lambda key: _values(_init_block(spec, key, has_cross)))(keys)


def stack_axes(spec: TransformerSpec, has_cross: bool = False) -> Any:
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
      blocks: from `init_stack`, or `layers_apart` of that where layers are not scanned; under the name `ADAPTERS` there
        may stand low-rank adapters, stacked like the rest.
      x_BQD: embedded tokens in the compute dtype.
      context: masks, positions and the like; a block has cross-attention where there is a `memory_mask`.
      cache: read and written at `context.positions`, or None.
      cross: every layer's projected cross-attention keys and values, or None to project as they are needed.

    Returns:
      The residual stream before the final norm, and the cache.
    """
    block = Block(spec, has_cross=context.memory_mask is not None)

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
    leaves, tree = jax.tree.flatten([blocks, cross], is_leaf=_is_apart)
    for layer, slices in enumerate(zip(*map(_apart, leaves), strict=True)):
        params, layer_cross = jax.tree.unflatten(tree, slices)
        x_BQD, cache = one(x_BQD, cache, params, layer, layer_cross)
    return x_BQD, cache


def layers_apart(blocks: Params) -> Params:
    """Returns the tree of `init_stack` with a tuple of the layers' arrays in the place of each stacked array.

    For loops around a network: inside of one, XLA's CPU backend copies every layer out of its stack in every turn.
    """
    return jax.tree.map(_apart, blocks)


def _apart(leaf: jax.Array | tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    # `unstack` transposes to one concatenation; indexing would transpose to N additions of the whole stack.
    return leaf if isinstance(leaf, tuple) else jnp.unstack(leaf)


def _is_apart(leaf: Any) -> bool:
    return isinstance(leaf, tuple)


def project_memory(spec: TransformerSpec, blocks: Params, memory_BSD: jax.Array) -> KVCache:
    """Returns the cross-attention keys and values of all layers, [N,B,S,K,E]."""
    block = Block(spec, has_cross=True)
    blocks = jax.tree.map(lambda leaf: jnp.stack(leaf) if _is_apart(leaf) else leaf, blocks, is_leaf=_is_apart)
    project = jax.vmap(lambda params: block.apply(_collections(params), memory_BSD, method=block.project_memory))
    return KVCache(*project(blocks))


def init_norm(spec: TransformerSpec) -> Params:
    """Returns the parameters of a norm outside of the blocks."""
    return _values(_init_norm(spec))


def norm_axes(spec: TransformerSpec) -> Any:
    """Returns the logical axes of `init_norm`'s tree."""
    return jax.tree.map(lambda box: box.names, jax.eval_shape(lambda: _init_norm(spec)), is_leaf=_is_box)


def run_norm(spec: TransformerSpec, params: Params, x_BTD: jax.Array) -> jax.Array:
    """Applies a norm outside of the blocks."""
    normed: Any = Norm(spec).apply({"params": params}, x_BTD)
    return normed


def init_head_transform(spec: TransformerSpec, key: jax.Array) -> Params:
    """Returns the parameters of the layer in front of the output projection."""
    return _values(_init_head_transform(spec, key))


def head_transform_axes(spec: TransformerSpec) -> Any:
    """Returns the logical axes of `init_head_transform`'s tree."""
    boxed = jax.eval_shape(lambda: _init_head_transform(spec, jax.random.key(0)))
    return jax.tree.map(lambda box: box.names, boxed, is_leaf=_is_box)


@dataclasses.dataclass(frozen=True)
class RunHeadTransform:
    """The layer in front of the output projection as a function that compares by value, so that it can be static.

    Attributes:
      spec: the network's shape.
    """

    spec: TransformerSpec

    def __call__(self, params: Params, x_BTD: jax.Array) -> jax.Array:
        """Returns [B,T,D], what the output projection reads."""
        transformed: Any = HeadTransform(self.spec).apply({"params": params}, x_BTD)
        return transformed


def init_self_conditioning(spec: TransformerSpec, key: jax.Array) -> Params:
    """Returns the parameters of the layer that reads a previous prediction; fresh, it adds nothing."""
    params: dict[str, Any] = dict(_values(_init_self_conditioning(spec, key)))
    # A network that gets the layer later starts out as what it was, whatever the signal is.
    return params | {"mlp": params["mlp"] | {"down": jnp.zeros_like(params["mlp"]["down"])}}


def self_conditioning_axes(spec: TransformerSpec) -> Any:
    """Returns the logical axes of `init_self_conditioning`'s tree."""
    boxed = jax.eval_shape(lambda: _init_self_conditioning(spec, jax.random.key(0)))
    return jax.tree.map(lambda box: box.names, boxed, is_leaf=_is_box)


def run_self_conditioning(
    spec: TransformerSpec, params: Params, signal_BTD: jax.Array, constrain: Constrain
) -> jax.Array:
    """Returns what the embedding [B,T,D] of a previous prediction adds to the tokens' own."""
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
    """Returns one block's boxed parameters; inside jit or vmap the dummy pass costs nothing."""
    spec = dataclasses.replace(spec, attention="xla")  # cuDNN's knows neither this device nor vmap
    context = Context(
        mask=DenseMask(jnp.ones((1, 1, 1), bool)),
        positions=jnp.zeros((1, 1), jnp.int32),
        memory_BSD=jnp.zeros((1, 1, spec.model_dim), spec.compute_dtype) if has_cross else None,
        memory_mask=DenseMask(jnp.ones((1, 1, 1), bool)) if has_cross else None,
    )
    x = jnp.zeros((1, 1, spec.model_dim), spec.compute_dtype)
    return Block(spec, has_cross=has_cross).init(key, x, context, 0)["params"]


def _init_head_transform(spec: TransformerSpec, key: jax.Array):
    return HeadTransform(spec).init(key, jnp.zeros((1, 1, spec.model_dim), spec.compute_dtype))["params"]


def _init_norm(spec: TransformerSpec):
    return Norm(spec).init(jax.random.key(0), jnp.zeros((1, 1, spec.model_dim)))["params"]


def _collections(block: Params) -> dict[str, Any]:
    """Returns a block's parameters as Linen's collections, its adapters apart."""
    params = {name: part for name, part in block.items() if name != ADAPTERS}
    return {"params": params, ADAPTERS: block.get(ADAPTERS, {})}


def _is_box(leaf) -> bool:
    return isinstance(leaf, nn.LogicallyPartitioned)


def _values(boxed) -> Params:
    # `nn.unbox` would constrain the sharding, by rules of a context that is not ours.
    return jax.tree.map(lambda box: box.value, boxed, is_leaf=_is_box)
