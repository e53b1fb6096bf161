"""The attention layer as a Linen module: projections, position encoding and biases; `nn/attention.py` does the rest."""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusion_lm.nn.attention import attend
from diffusion_lm.nn.attention_mask import AttentionMask
from diffusion_lm.nn.embeddings import rotary, rotate
from diffusion_lm.nn.layers import Context, Norm, add_low_rank, fan_in_normal, parameter, row_dropout
from diffusion_lm.nn.linear import linear
from diffusion_lm.nn.rope import LinearRope, base_frequencies
from diffusion_lm.nn.transformer import TransformerSpec


class Attention(nn.Module):
    """Multi-head or grouped-query attention, over the stream itself or over an encoder's memory.

    Attributes:
      spec: the network's shape.
      cross: whether keys and values come from the encoder; then they have no position encoding.
    """

    spec: TransformerSpec
    cross: bool = False

    def setup(self):
        """Declares the parameters here, so that `keys_values` can run without `__call__`."""
        spec = self.spec
        D, H, K, E = spec.model_dim, spec.num_heads, spec.kv_heads, spec.head_dim
        dtype = jnp.dtype(spec.param_dtype)
        # T5 does not scale the scores by 1/sqrt(E); its initialiser makes the queries smaller by this factor instead.
        query_fan_in = D * E if spec.attention_scale == "none" else D
        kv_axes = ("embed", "kv_heads", "head_dim")
        self.query = parameter(
            self, "query", fan_in_normal(query_fan_in), (D, H, E), ("embed", "heads", "head_dim"), dtype
        )
        self.key = parameter(self, "key", fan_in_normal(D), (D, K, E), kv_axes, dtype)
        self.value = parameter(self, "value", fan_in_normal(D), (D, K, E), kv_axes, dtype)
        self.output = parameter(self, "output", fan_in_normal(H * E), (H, E, D), ("heads", "head_dim", "embed"), dtype)
        zeros = nn.initializers.zeros
        if spec.has_qkv_bias:
            self.query_bias = parameter(self, "query_bias", zeros, (H, E), ("heads", "head_dim"), dtype)
            self.key_bias = parameter(self, "key_bias", zeros, (K, E), ("kv_heads", "head_dim"), dtype)
            self.value_bias = parameter(self, "value_bias", zeros, (K, E), ("kv_heads", "head_dim"), dtype)
        if spec.has_attention_output_bias:
            self.output_bias = parameter(self, "output_bias", zeros, (D,), ("norm",), dtype)
        if spec.position == "relative_bias" and spec.relative_per_layer and not self.cross:
            shape, axes = (spec.relative_buckets, H), ("relative_buckets", "heads")
            fresh = nn.initializers.variance_scaling(1.0, "fan_avg", "uniform")
            self.relative_bias = parameter(self, "relative_bias", fresh, shape, axes, dtype)
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

    def with_own_bias(self, mask: AttentionMask) -> AttentionMask:
        """Returns the mask with this layer's relative bias, or as it is if layers have none of their own."""
        spec = self.spec
        if spec.position != "relative_bias" or not spec.relative_per_layer:
            return mask
        return mask.with_relative_bias(
            self.relative_bias, bidirectional=spec.relative_bidirectional, max_distance=spec.relative_max_distance
        )

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
        # In a scan, which layers have the window is known at run time only: choose between two sets of frequencies.
        unwindowed = spec.rope_scaling or LinearRope(1.0)
        frequencies = jnp.where(
            windowed, base_frequencies(spec.head_dim, theta), unwindowed.frequencies(spec.head_dim, spec.rope_theta)
        )
        return rotate(x_BTHE, positions, frequencies, jnp.where(windowed, 1.0, unwindowed.magnitude))

    def __call__(self, x_BQD, keys_values, context: Context) -> jax.Array:
        """Returns [B,Q,D], the attention of the queries of `x_BQD` to (k_BTKE, v_BTKE)."""
        spec, constrain = self.spec, context.constrain
        mask = context.memory_mask if self.cross else context.mask
        assert mask is not None
        q = constrain(
            self.queries(x_BQD, context.positions, context.windowed), ("batch", "length", "heads", "head_dim")
        )
        k, v = keys_values
        out = attend(
            q,
            k,
            v,
            mask,
            softcap=spec.attention_softcap,
            implementation=spec.attention,
            drop=self._drop(context),
            constrain=constrain,
        )
        heads = constrain(out, ("batch", "length", "heads", "head_dim"))
        out = linear(heads, self.output, 2)
        out = add_low_rank(self, "output", out, heads, inputs=2)
        return out + self.output_bias.astype(out.dtype) if spec.has_attention_output_bias else out

    def _drop(self, context: Context) -> Callable[[jax.Array], jax.Array] | None:
        """Returns the dropout of attention probabilities, or None outside training; sites follow those of the block."""
        rate = self.spec.attention_dropout_rate
        if context.dropout_keys is None or rate == 0:
            return None
        return functools.partial(row_dropout, rate=rate, keys=context.dropout_keys, site=6 if self.cross else 5)

    def _project(self, x_BTD, name: str):
        out = linear(x_BTD, getattr(self, name))
        out = add_low_rank(self, name, out, x_BTD)
        if self.spec.has_qkv_bias:
            out = out + getattr(self, f"{name}_bias").astype(out.dtype)
        return out
