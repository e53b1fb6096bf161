"""One block of a stack, as a Linen module. Other packages use the plain functions of `nn/stack.py`."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusion_lm.core.rng import fold_in_each
from diffusion_lm.nn.attention_layer import Attention
from diffusion_lm.nn.cache import KVCache
from diffusion_lm.nn.layers import Context, Mlp, Norm, row_dropout
from diffusion_lm.nn.transformer import TransformerSpec


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to an encoder if there is one, and MLP, each with a norm before or after it.

    Attributes:
      spec: the network's shape.
      has_cross: whether the block has cross-attention to an encoder.
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
          context: masks, positions and other inputs that all blocks share.
          layer: index of this block, which selects its dropout and its entry of the cache.
          cache: keys and values of earlier tokens, or None: the stream attends to itself.
          cross: projected (k_BSKE, v_BSKE) of the memory, or None: `context.memory_BSD` is projected here.

        Returns:
          The residual stream and the cache with this block's keys and values written.
        """
        spec, keys = self.spec, context.dropout_keys
        if keys is not None:
            # Dropout differs between layers, and inside a layer between sites (numbered 1 to 6).
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
            # The scan runs one body for all layers, so layer 0 is a `where` and not a branch.
            normed = jnp.where(layer == 0, x_BQD.astype(normed.dtype), normed)
        keys_values = self.attention.keys_values(normed, context.positions, context.windowed)
        if cache is not None:
            # Written first: the new tokens attend to each other through the cache too.
            cache = cache.write(layer, context.positions, *keys_values)
            keys_values = cache.read(layer)
        attended = self._output_norm("attention", self.attention(normed, keys_values, context))
        x_BQD = self._after(self.attention_norm, x_BQD + row_dropout(attended, spec.dropout_rate, keys, site=2))

        if self.has_cross:
            if cross is None:
                assert context.memory_BSD is not None
                cross = self.cross_attention.keys_values(context.memory_BSD, None)
            attended = self.cross_attention(self._before(self.cross_attention_norm, x_BQD), cross, context)
            attended = row_dropout(self._output_norm("cross_attention", attended), spec.dropout_rate, keys, site=3)
            x_BQD = self._after(self.cross_attention_norm, x_BQD + attended)

        out = self._output_norm("mlp", self.mlp(self._before(self.mlp_norm, x_BQD), context))
        x_BQD = self._after(self.mlp_norm, x_BQD + row_dropout(out, spec.dropout_rate, keys, site=4))
        return context.constrain(x_BQD, ("batch", "length", "activation_embed")), cache

    def _before(self, norm: Norm, x_BQD: jax.Array) -> jax.Array:
        return x_BQD if self.spec.norm_placement == "post" else norm(x_BQD)

    def _output_norm(self, layer: str, x_BQD: jax.Array) -> jax.Array:
        return getattr(self, f"{layer}_output_norm")(x_BQD) if self.spec.norm_placement == "both" else x_BQD

    def _after(self, norm: Norm, x_BQD: jax.Array) -> jax.Array:
        return norm(x_BQD) if self.spec.norm_placement == "post" else x_BQD

    def project_memory(self, memory_BSD: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns this block's cross-attention (k_BSKE, v_BSKE)."""
        return self.cross_attention.keys_values(memory_BSD, None)
