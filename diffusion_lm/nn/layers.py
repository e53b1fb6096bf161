"""The layers of a network except attention, as Linen modules, and the inputs that all blocks share (`Context`)."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from diffusion_lm.core.rng import fold_in_each
from diffusion_lm.nn.attention_mask import AttentionMask
from diffusion_lm.nn.constrain import Constrain, no_constraint
from diffusion_lm.nn.linear import linear
from diffusion_lm.nn.transformer import TransformerSpec

ADAPTERS = "adapters"
"""Name of the low-rank adapters: of their Linen collection, and of their entry in a stack (`nn/stack.py`)."""


class Context(flax.struct.PyTreeNode):
    """What every block of a stack needs besides its input.

    Attributes:
      mask: which keys each query attends to, with the stack's relative bias; without a bias where there is none or each
        layer has its own.
      window_mask: the same inside the window, for the layers `spec.window_layers`; None if all layers have `mask`.
      positions: i32[B,Q].
      memory_BSD: the encoder's output if each block projects its own keys and values, else None.
      memory_mask: bool[B,Q,S] as a mask, or None without an encoder.
      windowed: whether the current layer is one of `spec.window_layers`; set by the block.
      dropout_keys: key[B], or None.
      constrain: pins activations to the mesh.
    """

    mask: AttentionMask
    positions: jax.Array
    memory_BSD: jax.Array | None = None
    memory_mask: AttentionMask | None = None
    window_mask: AttentionMask | None = None
    windowed: jax.Array | bool = flax.struct.field(default=False)
    dropout_keys: jax.Array | None = None
    constrain: Constrain = flax.struct.field(pytree_node=False, default=no_constraint)


def row_dropout(x_BTD: jax.Array, rate: float, keys: jax.Array | None, site: int) -> jax.Array:
    """Applies dropout with one key per row, so that a row's pattern does not depend on its microbatch.

    Args:
      x_BTD: any [B,...] array.
      rate: probability of dropping; the other entries are scaled by 1 / (1 - rate).
      keys: key[B]; None = no dropout.
      site: number of this use of dropout in the network, folded into the keys.
    """
    if keys is None or rate == 0:
        return x_BTD
    # One key per row and site: no two uses of dropout in a forward pass share a pattern.
    keys = fold_in_each(keys, jnp.full(keys.shape, site))
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, x_BTD.shape[1:]))(keys)
    return jnp.where(keep, x_BTD / (1 - rate), 0).astype(x_BTD.dtype)


def add_low_rank(module: nn.Module, name: str, out: jax.Array, x: jax.Array, inputs: int = 1) -> jax.Array:
    """Returns `out` + (x A) B, with the low-rank adapter of the module's matrix `name` (LoRA), or `out` without one.

    Adapters are the Linen collection `ADAPTERS`, in a tree like that of the parameters: `a` maps the matrix's inputs to
    the rank, `b` maps the rank to its outputs.

    Args:
      module: the layer.
      name: of the matrix.
      out: [B,T,...], the matrix applied to `x`.
      x: [B,T,...], the matrix's input.
      inputs: number of trailing axes of `x` that the matrix contracts.
    """
    if not module.has_variable(ADAPTERS, name):
        return out
    adapter: Any = module.get_variable(ADAPTERS, name)
    return out + linear(linear(x, adapter["a"], inputs), adapter["b"])


def parameter(module: nn.Module, name: str, initializer, shape, axes, dtype) -> Any:
    """Declares an array of a layer, with the logical names of its axes."""
    return module.param(name, nn.with_logical_partitioning(initializer, axes), shape, dtype)


def fan_in_normal(fan_in: int):
    """Returns a normal initialiser with variance 1 / fan_in, for kernels with several input or output axes."""
    return nn.initializers.normal(fan_in**-0.5)


class Norm(nn.Module):
    """RMSNorm or LayerNorm over the last axis, in float32."""

    spec: TransformerSpec

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the normalised input in the compute dtype."""
        spec, size, dtype = self.spec, x.shape[-1], jnp.dtype(self.spec.param_dtype)
        # A mean of squares is too inaccurate in bfloat16.
        y = x.astype(jnp.float32)
        if spec.norm == "layernorm":
            y = y - y.mean(axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + spec.norm_eps)
        first = nn.initializers.zeros if spec.norm_around_one else nn.initializers.ones
        scale = parameter(self, "scale", first, (size,), ("norm",), dtype)
        y = y * (1.0 + scale.astype(jnp.float32) if spec.norm_around_one else scale)
        if spec.norm == "layernorm" and spec.use_bias:
            y = y + parameter(self, "bias", nn.initializers.zeros, (size,), ("norm",), dtype)
        return y.astype(spec.compute_dtype)


def gelu_of(spec: TransformerSpec) -> Callable[[jax.Array], jax.Array]:
    """Returns the GELU of a network."""
    return functools.partial(nn.gelu, approximate=spec.gelu == "tanh")


class Mlp(nn.Module):
    """The feed-forward layer."""

    spec: TransformerSpec

    @nn.compact
    def __call__(self, x_BTD: jax.Array, context: Context) -> jax.Array:
        """Returns [B,T,D]."""
        spec, x, dtype = self.spec, x_BTD, jnp.dtype(self.spec.param_dtype)
        D, F = spec.model_dim, spec.mlp_dim
        gelu = gelu_of(spec)
        activation = {"geglu": gelu, "gelu": gelu, "swiglu": nn.silu, "relu": nn.relu}[spec.mlp]

        def project(name, x, shape, axes):
            out = linear(x, parameter(self, name, fan_in_normal(shape[0]), shape, axes, dtype))
            out = add_low_rank(self, name, out, x)
            if spec.has_mlp_bias:
                bias_axes = ("mlp",) if axes[1] == "mlp" else ("norm",)
                bias = parameter(self, f"{name}_bias", nn.initializers.zeros, shape[1:], bias_axes, dtype)
                out = out + bias.astype(x.dtype)
            return out

        h = project("up", x, (D, F), ("embed", "mlp"))
        h = activation(project("gate", x, (D, F), ("embed", "mlp"))) * h if spec.gated else activation(h)
        # Between the two products each device has its part of the feed-forward width.
        h = context.constrain(h, ("batch", "length", "mlp"))
        h = row_dropout(h, spec.dropout_rate, context.dropout_keys, site=1)
        return project("down", h, (F, D), ("mlp", "embed"))


class SelfConditioning(nn.Module):
    """Self-conditioning on a previous prediction: norm and feed-forward layer of its expected embedding.

    The result is added to the embedded tokens. There are no biases, so a signal of zeros adds exactly zero: slots
    without a prediction, and passes without any, compute what the network without this layer computes. DiffusionGemma
    (gemma library) also divides the sum by its root mean square. That would change the network even without a signal,
    and the blocks normalise their input anyway.
    """

    spec: TransformerSpec

    def setup(self):
        """Names the layers."""
        # A bias would add something even where there is no prediction.
        plain = dataclasses.replace(self.spec, use_bias=False, mlp_bias=False)
        self.norm = Norm(plain)
        self.mlp = Mlp(plain)

    def __call__(self, signal_BTD: jax.Array, context: Context) -> jax.Array:
        """Returns [B,T,D] in the compute dtype."""
        return self.mlp(self.norm(signal_BTD), context)


class HeadTransform(nn.Module):
    """The layer before the output projection in the BERT family: linear layer, GELU, norm."""

    spec: TransformerSpec

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """Returns [B,T,D] in the compute dtype."""
        D, dtype = self.spec.model_dim, jnp.dtype(self.spec.param_dtype)
        dense = parameter(self, "dense", fan_in_normal(D), (D, D), ("embed", "norm"), dtype)
        out = linear(x_BTD, dense)
        if self.spec.head_transform_bias:
            bias = parameter(self, "dense_bias", nn.initializers.zeros, (D,), ("norm",), dtype)
            out = out + bias.astype(out.dtype)
        return Norm(self.spec, name="norm")(gelu_of(self.spec)(out))
