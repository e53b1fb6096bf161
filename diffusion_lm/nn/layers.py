"""The layers of one block, as Linen modules. Nothing of Linen leaves this floor: see `nn/stack.py`."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from diffusion_lm.core.rng import fold_in_each
from diffusion_lm.nn.attention import attend
from diffusion_lm.nn.cache import KVCache
from diffusion_lm.nn.constrain import Constrain, no_constraint
from diffusion_lm.nn.embeddings import relative_bias, relative_diagonals, rotary, rotate
from diffusion_lm.nn.linear import linear
from diffusion_lm.nn.masks import Rows, Visibility
from diffusion_lm.nn.rope import LinearRope, base_frequencies
from diffusion_lm.nn.transformer import TransformerSpec

ADAPTERS = "adapters"
"""Name of the low-rank adapters, as a collection of variables and beside the parameters of a stack (`nn/stack.py`)."""


class Context(flax.struct.PyTreeNode):
    """What every block of a stack needs besides its input.

    Attributes:
      mask: bool[B|1,Q,T], who sees whom; or the expression that says so, for attention that evaluates it itself.
      window_mask: the same inside the window, for `spec.window_layers`; None where no layer differs.
      positions: i32[B,Q].
      bias: f32[B|1,H,Q,T], the stack's relative bias, beside an expression its diagonals f32[H,2L]; None where there is
        none or each layer has its own.
      copies: how often the stream stands in a row, for the biases of layers.
      memory_BSD: the encoder's output where each block projects its own keys and values, or None.
      memory_mask: bool[B,Q,S], or None without an encoder.
      windowed: whether the layer at hand is one of them.
      dropout_keys: key[B], or None.
      constrain: pins activations to the mesh.
    """

    mask: jax.Array | Visibility
    positions: jax.Array
    bias: jax.Array | None = None
    memory_BSD: jax.Array | None = None
    memory_mask: jax.Array | None = None
    window_mask: jax.Array | Visibility | None = None
    windowed: jax.Array | bool = flax.struct.field(default=False)
    dropout_keys: jax.Array | None = None
    copies: int = flax.struct.field(pytree_node=False, default=1)
    constrain: Constrain = flax.struct.field(pytree_node=False, default=no_constraint)


def stack_bias(
    spec: TransformerSpec, table: jax.Array, q_slots: jax.Array | None, slots: int, copies: int, *, written_out: bool
) -> jax.Array:
    """Returns the relative bias f32[B|1,H,Q,T], or its diagonals f32[H,2L], for `copies` of a stream in a row.

    Args:
      spec: the network's shape.
      table: [buckets,H].
      q_slots: i32[B,Q], the queries' slots; None means all.
      slots: T, the slots of a row.
      copies: see above.
      written_out: whether attention wants the matrix and not its diagonals.
    """
    settings: Any = {"bidirectional": spec.relative_bidirectional, "max_distance": spec.relative_max_distance}
    if not written_out:
        return relative_diagonals(table, slots // copies, **settings)
    bias = relative_bias(table, q_slots, slots // copies, **settings)
    return jnp.tile(bias, (1, 1, copies, copies)) if copies > 1 else bias


def row_dropout(x_BTD: jax.Array, rate: float, keys: jax.Array | None, site: int) -> jax.Array:
    """Drops entries with one key per row, so that a row's pattern does not depend on its microbatch; None = identity.

    Args:
      x_BTD: any [B,...] array.
      rate: probability of dropping; the rest is scaled by 1 / (1 - rate).
      keys: key[B] or None.
      site: number of the place in the network, folded into the keys.
    """
    if keys is None or rate == 0:
        return x_BTD
    keys = fold_in_each(keys, jnp.full(keys.shape, site))
    kept = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, x_BTD.shape[1:]))(keys)
    return jnp.where(kept, x_BTD / (1 - rate), 0).astype(x_BTD.dtype)


def add_low_rank(module: nn.Module, name: str, out: jax.Array, x: jax.Array, inputs: int = 1) -> jax.Array:
    """Returns `out`, what the module's matrix `name` makes of `x`, and what its low-rank adapter adds to it (LoRA).

    Adapters are the collection `ADAPTERS` of the call, in a tree like that of the parameters: `a` maps the matrix's
    inputs to the rank, `b` the rank to its outputs. Without one, `out` is returned as it is.

    Args:
      module: the layer.
      name: of the matrix.
      out: [B,T,...].
      x: [B,T,...], what the matrix was applied to.
      inputs: how many trailing axes of `x` the matrix reads.
    """
    if not module.has_variable(ADAPTERS, name):
        return out
    adapter: Any = module.get_variable(ADAPTERS, name)
    return out + linear(linear(x, adapter["a"], inputs), adapter["b"])


def fan_in_normal(fan_in: int):
    """Normal initialiser with variance 1 / fan_in, for kernels with several input or output axes."""
    return nn.initializers.normal(fan_in**-0.5)


class Norm(nn.Module):
    """RMSNorm or LayerNorm over the last axis, in float32."""

    spec: TransformerSpec

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns x normalised, in the compute dtype."""
        spec, size, dtype = self.spec, x.shape[-1], jnp.dtype(self.spec.param_dtype)
        y = x.astype(jnp.float32)
        if spec.norm == "layernorm":
            y = y - y.mean(axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + spec.norm_eps)
        first = nn.initializers.zeros if spec.norm_around_one else nn.initializers.ones
        scale = _parameter(self, "scale", first, (size,), ("norm",), dtype)
        y = y * (1.0 + scale.astype(jnp.float32) if spec.norm_around_one else scale)
        if spec.norm == "layernorm" and spec.use_bias:
            y = y + _parameter(self, "bias", nn.initializers.zeros, (size,), ("norm",), dtype)
        return y.astype(spec.compute_dtype)


class Attention(nn.Module):
    """Multi-head or grouped-query attention, over the stream itself or over an encoder's memory.

    Attributes:
      spec: the network's shape.
      cross: whether keys and values come from the encoder; then they carry no positions.
    """

    spec: TransformerSpec
    cross: bool = False

    def setup(self):
        """Declares the parameters, so that keys and values can also be projected on their own."""
        spec = self.spec
        D, H, K, E = spec.model_dim, spec.num_heads, spec.kv_heads, spec.head_dim
        dtype = jnp.dtype(spec.param_dtype)
        # T5 has no 1/sqrt(E) in front of the scores; its initialiser makes the queries smaller by that much.
        query_fan_in = D * E if spec.attention_scale == "none" else D
        kv_axes = ("embed", "kv_heads", "head_dim")
        self.query = _parameter(
            self, "query", fan_in_normal(query_fan_in), (D, H, E), ("embed", "heads", "head_dim"), dtype
        )
        self.key = _parameter(self, "key", fan_in_normal(D), (D, K, E), kv_axes, dtype)
        self.value = _parameter(self, "value", fan_in_normal(D), (D, K, E), kv_axes, dtype)
        self.output = _parameter(self, "output", fan_in_normal(H * E), (H, E, D), ("heads", "head_dim", "embed"), dtype)
        zeros = nn.initializers.zeros
        if spec.has_qkv_bias:
            self.query_bias = _parameter(self, "query_bias", zeros, (H, E), ("heads", "head_dim"), dtype)
            self.key_bias = _parameter(self, "key_bias", zeros, (K, E), ("kv_heads", "head_dim"), dtype)
            self.value_bias = _parameter(self, "value_bias", zeros, (K, E), ("kv_heads", "head_dim"), dtype)
        if spec.has_attention_output_bias:
            self.output_bias = _parameter(self, "output_bias", zeros, (D,), ("norm",), dtype)
        if spec.position == "relative_bias" and spec.relative_per_layer and not self.cross:
            shape, axes = (spec.relative_buckets, H), ("relative_buckets", "heads")
            fresh = nn.initializers.variance_scaling(1.0, "fan_avg", "uniform")
            self.relative_bias = _parameter(self, "relative_bias", fresh, shape, axes, dtype)
        if spec.qk_norm:
            self.query_norm = Norm(spec)
            self.key_norm = Norm(spec)

    def keys_values(
        self, x_BTD: jax.Array, positions: jax.Array | None, windowed: bool | jax.Array = False
    ) -> tuple[jax.Array, jax.Array]:
        """Returns (k_BTKE, v_BTKE) of a stream, position encoding applied; `windowed` as in `Context`."""
        k = self._project(x_BTD, "key")
        v = self._project(x_BTD, "value")
        if self.spec.qk_norm:
            k = self.key_norm(k)
        if self.spec.position == "rope" and not self.cross:
            assert positions is not None
            k = self._rotated(k, positions, windowed)
        return k, v

    def own_bias(self, context: Context, q_slots: jax.Array | None, slots: int) -> jax.Array | None:
        """Returns this layer's relative bias as in `Context`, or None where layers have none of their own.

        Args:
          context: of the block.
          q_slots: as in `embeddings.relative_bias`.
          slots: T, the slots of a row.
        """
        spec = self.spec
        if spec.position != "relative_bias" or not spec.relative_per_layer:
            return None
        written_out = isinstance(context.mask, jax.Array)
        return stack_bias(spec, self.relative_bias, q_slots, slots, context.copies, written_out=written_out)

    def queries(self, x_BQD: jax.Array, positions: jax.Array, windowed: bool | jax.Array = False) -> jax.Array:
        """Returns scaled q_BQHE, position encoding applied; `windowed` as in `Context`."""
        spec = self.spec
        q = self._project(x_BQD, "query")
        if spec.qk_norm:
            q = self.query_norm(q)
        if spec.position == "rope" and not self.cross:
            q = self._rotated(q, positions, windowed)
        size = spec.head_dim if spec.attention_scale_size is None else spec.attention_scale_size
        return q * jnp.asarray(size**-0.5, q.dtype) if spec.attention_scale == "inverse_sqrt" else q

    def _rotated(self, x_BTHE: jax.Array, positions: jax.Array, windowed: bool | jax.Array) -> jax.Array:
        """Returns queries or keys rotated by their positions, at the frequencies of a layer with or without window."""
        spec = self.spec
        theta = spec.window_rope_theta
        if theta is None or windowed is False:
            return rotary(x_BTHE, positions, spec.rope_theta, spec.rope_scaling)
        if windowed is True:
            return rotary(x_BTHE, positions, theta)
        far = spec.rope_scaling or LinearRope(1.0)
        frequencies = jnp.where(
            windowed, base_frequencies(spec.head_dim, theta), far.frequencies(spec.head_dim, spec.rope_theta)
        )
        return rotate(x_BTHE, positions, frequencies, jnp.where(windowed, 1.0, far.magnitude))

    def __call__(self, x_BQD, keys_values, context: Context) -> jax.Array:
        """Returns [B,Q,D]: what the queries of `x_BQD` read from (k_BTKE, v_BTKE)."""
        spec, constrain = self.spec, context.constrain
        mask = context.memory_mask if self.cross else context.mask
        assert mask is not None
        q = constrain(
            self.queries(x_BQD, context.positions, context.windowed), ("batch", "length", "heads", "head_dim")
        )
        out = attend(
            q,
            *keys_values,
            mask=mask,
            bias=None if self.cross else context.bias,
            softcap=spec.attention_softcap,
            implementation=spec.attention,
            constrain=constrain,
        )
        out = constrain(out, ("batch", "length", "heads", "head_dim"))
        read = out
        out = linear(read, self.output, 2)
        out = add_low_rank(self, "output", out, read, inputs=2)
        return out + self.output_bias.astype(out.dtype) if spec.has_attention_output_bias else out

    def _project(self, x_BTD, name: str):
        out = linear(x_BTD, getattr(self, name))
        out = add_low_rank(self, name, out, x_BTD)
        if self.spec.has_qkv_bias:
            out = out + getattr(self, f"{name}_bias").astype(out.dtype)
        return out


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
            out = linear(x, _parameter(self, name, fan_in_normal(shape[0]), shape, axes, dtype))
            out = add_low_rank(self, name, out, x)
            if spec.has_mlp_bias:
                bias_axes = ("mlp",) if axes[1] == "mlp" else ("norm",)
                bias = _parameter(self, f"{name}_bias", nn.initializers.zeros, shape[1:], bias_axes, dtype)
                out = out + bias.astype(x.dtype)
            return out

        h = project("up", x, (D, F), ("embed", "mlp"))
        h = activation(project("gate", x, (D, F), ("embed", "mlp"))) * h if spec.gated else activation(h)
        h = context.constrain(h, ("batch", "length", "mlp"))
        h = row_dropout(h, spec.dropout_rate, context.dropout_keys, site=1)
        return project("down", h, (F, D), ("mlp", "embed"))


class SelfConditioning(nn.Module):
    """What a previous prediction adds to the embedded tokens: feed-forward layer of the norm of its expected embedding.

    Without biases, so that a signal of zeros adds exactly nothing: a slot without a prediction, and a pass without any,
    is the plain network. DiffusionGemma (gemma library) also divides the sum by its root mean square, which would
    change the network wherever the layer stands; the blocks normalise what they read anyway.
    """

    spec: TransformerSpec

    def setup(self):
        """Names the layers."""
        plain = dataclasses.replace(self.spec, use_bias=False, mlp_bias=False)
        self.norm = Norm(plain)
        self.mlp = Mlp(plain)

    def __call__(self, signal_BTD: jax.Array, context: Context) -> jax.Array:
        """Returns [B,T,D] in the compute dtype."""
        return self.mlp(self.norm(signal_BTD), context)


class Block(nn.Module):
    """Self-attention, cross-attention where there is an encoder, and MLP, each with a norm before or behind it.

    Attributes:
      spec: the network's shape.
      has_cross: whether the block reads an encoder's memory.
    """

    spec: TransformerSpec
    has_cross: bool = False

    def setup(self):
        """Names the layers."""
        self.attention_norm = Norm(self.spec)
        self.attention = Attention(self.spec)
        if self.has_cross:
            self.cross_attention_norm = Norm(self.spec)
            self.cross_attention = Attention(self.spec, cross=True)
        self.mlp_norm = Norm(self.spec)
        self.mlp = Mlp(self.spec)
        if self.spec.norm_placement == "both":
            self.attention_output_norm = Norm(self.spec)
            self.mlp_output_norm = Norm(self.spec)
            if self.has_cross:
                self.cross_attention_output_norm = Norm(self.spec)

    def __call__(
        self,
        x_BQD: jax.Array,
        context: Context,
        layer: jax.Array | int,
        cache: KVCache | None = None,
        cross: tuple[jax.Array, jax.Array] | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        """Runs the block.

        Args:
          x_BQD: the residual stream.
          context: masks, positions and the like.
          layer: index of this block, for its dropout and its part of the cache.
          cache: keys and values of earlier tokens, or None to attend to the stream's own.
          cross: projected (k_BSKE, v_BSKE) of the memory, or None to project `context.memory_BSD` here.

        Returns:
          The residual stream and the cache with this block's keys and values written.
        """
        spec, keys = self.spec, context.dropout_keys
        if keys is not None:
            keys = fold_in_each(keys, jnp.full(keys.shape, layer))
            context = context.replace(dropout_keys=keys)

        if context.window_mask is not None:
            assert spec.window_layers is not None
            windowed: Any
            if isinstance(layer, int):
                windowed = layer in spec.window_layers
                mask = context.window_mask if windowed else context.mask
            else:
                windowed = jnp.any(jnp.asarray(spec.window_layers, jnp.int32) == layer)
                mask = _either(windowed, context.window_mask, context.mask)
            context = context.replace(mask=mask, windowed=windowed)

        q_slots, slots = None, x_BQD.shape[1]
        if cache is not None:
            assert isinstance(context.mask, jax.Array)
            q_slots, slots = context.positions, context.mask.shape[-1]
        own = self.attention.own_bias(context, q_slots, slots)
        if own is not None:
            context = context.replace(bias=own)
        normed = self._before(self.attention_norm, x_BQD)
        if not spec.first_attention_norm:
            normed = jnp.where(layer == 0, x_BQD.astype(normed.dtype), normed)
        keys_values = self.attention.keys_values(normed, context.positions, context.windowed)
        if cache is not None:
            cache = cache.write(layer, context.positions, *keys_values)
            keys_values = cache.read(layer)
        read = self._added("attention", self.attention(normed, keys_values, context))
        x_BQD = self._behind(self.attention_norm, x_BQD + row_dropout(read, spec.dropout_rate, keys, site=2))

        if self.has_cross:
            if cross is None:
                assert context.memory_BSD is not None
                cross = self.cross_attention.keys_values(context.memory_BSD, None)
            read = self.cross_attention(self._before(self.cross_attention_norm, x_BQD), cross, context)
            read = row_dropout(self._added("cross_attention", read), spec.dropout_rate, keys, site=3)
            x_BQD = self._behind(self.cross_attention_norm, x_BQD + read)

        made = self._added("mlp", self.mlp(self._before(self.mlp_norm, x_BQD), context))
        x_BQD = self._behind(self.mlp_norm, x_BQD + row_dropout(made, spec.dropout_rate, keys, site=4))
        return context.constrain(x_BQD, ("batch", "length", "activation_embed")), cache

    def _before(self, norm: Norm, x_BQD: jax.Array) -> jax.Array:
        return x_BQD if self.spec.norm_placement == "post" else norm(x_BQD)

    def _added(self, layer: str, x_BQD: jax.Array) -> jax.Array:
        return getattr(self, f"{layer}_output_norm")(x_BQD) if self.spec.norm_placement == "both" else x_BQD

    def _behind(self, norm: Norm, x_BQD: jax.Array) -> jax.Array:
        return norm(x_BQD) if self.spec.norm_placement == "post" else x_BQD

    def project_memory(self, memory_BSD: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns this block's cross-attention (k_BSKE, v_BSKE)."""
        return self.cross_attention.keys_values(memory_BSD, None)


class HeadTransform(nn.Module):
    """What the BERT family does to a hidden state before the output projection: linear layer, GELU, norm."""

    spec: TransformerSpec

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """Returns [B,T,D] in the compute dtype."""
        D, dtype = self.spec.model_dim, jnp.dtype(self.spec.param_dtype)
        dense = _parameter(self, "dense", fan_in_normal(D), (D, D), ("embed", "norm"), dtype)
        out = linear(x_BTD, dense)
        if self.spec.head_transform_bias:
            bias = _parameter(self, "dense_bias", nn.initializers.zeros, (D,), ("norm",), dtype)
            out = out + bias.astype(out.dtype)
        return Norm(self.spec, name="norm")(gelu_of(self.spec)(out))


def _either(condition: jax.Array, first: Any, second: Any) -> Any:
    """Returns one of two masks, or of two expressions."""
    if isinstance(first, Visibility):
        return (first & Rows(condition[None])) | (second & Rows(~condition[None]))
    return jnp.where(condition, first, second)


def _parameter(module: nn.Module, name: str, initializer, shape, axes, dtype) -> Any:
    return module.param(name, nn.with_logical_partitioning(initializer, axes), shape, dtype)
