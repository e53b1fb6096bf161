"""The KV cache of incremental decoding."""

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class KVCache:
    """Keys and values of every layer, stored at their slots of the canvas.

    The cache does not record which slots were written; only the visibility decides which keys a query attends to. So
    slots that were never written must not be visible. Causal queries never attend past themselves, and samplers write
    every slot before a later query attends to it.

    Attributes:
      keys_NBTKE: [N,B,T,K,E] in the compute dtype, position encoding applied.
      values_NBTKE: [N,B,T,K,E].
    """

    keys_NBTKE: jax.Array
    values_NBTKE: jax.Array

    @classmethod
    def empty(cls, layers: int, batch: int, length: int, kv_heads: int, head_dim: int, dtype) -> "KVCache":
        """Returns a cache of zeros."""
        shape = (layers, batch, length, kv_heads, head_dim)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    @property
    def length(self) -> int:
        """T, the number of slots."""
        return self.keys_NBTKE.shape[2]

    def write(self, layer: jax.Array | int, slots: jax.Array, k_BQKE: jax.Array, v_BQKE: jax.Array) -> "KVCache":
        """Returns the cache with one layer's new keys and values stored at per-row slots.

        Args:
          layer: index of the layer.
          slots: i32[B,Q], distinct inside a row; slots >= T are not written (samplers use this for finished rows).
          k_BQKE: new keys.
          v_BQKE: new values.
        """
        rows = jnp.arange(slots.shape[0])[:, None]

        # "drop": slots past the end belong to finished rows.
        def put(stored, new):
            return stored.at[layer, rows, slots].set(new.astype(stored.dtype), mode="drop")

        return KVCache(put(self.keys_NBTKE, k_BQKE), put(self.values_NBTKE, v_BQKE))

    def read(self, layer: jax.Array | int) -> tuple[jax.Array, jax.Array]:
        """Returns (keys_BTKE, values_BTKE) of one layer."""
        return (
            jax.lax.dynamic_index_in_dim(self.keys_NBTKE, layer, keepdims=False),
            jax.lax.dynamic_index_in_dim(self.values_NBTKE, layer, keepdims=False),
        )

    def take_rows(self, rows: jax.Array) -> "KVCache":
        """Returns the cache with its rows reordered or repeated by i32[B']; for beams and candidates."""
        # Axis 0 is the layer.
        return jax.tree.map(lambda x: jnp.take(x, rows, axis=1), self)
