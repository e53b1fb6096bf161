"""One block of a stack, as a Linen module. Nothing of Linen leaves this floor: see `nn/stack.py`."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusion_lm.core.rng import fold_in_each
from diffusion_lm.nn.attention_layer import Attention
from diffusion_lm.nn.cache import KVCache
from diffusion_lm.nn.layers import Context, Mlp, Norm, row_dropout
from diffusion_lm.nn.transformer import TransformerSpec


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

        mask = context.mask
        if context.window_mask is not None:
            assert spec.window_layers is not None
            windowed: bool | jax.Array
            if isinstance(layer, int):
                windowed = layer in spec.window_layers
                mask = context.window_mask if windowed else mask
            else:
                # One compiled body serves all layers of a scan, so the choice is made at run time.
                windowed = jnp.any(jnp.asarray(spec.window_layers, jnp.int32) == layer)
                mask = context.window_mask.where(windowed, mask)
            context = context.replace(windowed=windowed)
        context = context.replace(mask=self.attention.with_own_bias(mask))

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
