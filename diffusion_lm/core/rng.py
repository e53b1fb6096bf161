"""Counter-based random keys: key = f(seed, step, stream name, example id, position). There is no random state.

A draw is a pure function of its key. So noise does not change when a run is resumed, resharded, split into
microbatches, packed differently or moved to another number of hosts.
"""

import zlib

import flax.struct
import jax
import jax.numpy as jnp


def stream_number(name: str) -> int:
    """Returns a stable 31-bit number for a stream name; Python's `hash` differs between processes."""
    return zlib.crc32(name.encode()) & 0x7FFFFFFF


def example_number(name: str) -> int:
    """Returns the stable u32 id of a source example from its full name, e.g. `"task/split/17"`."""
    return zlib.crc32(name.encode())


class StreamKeys(flax.struct.PyTreeNode):
    """Derives all random keys of one training step.

    Attributes:
      root: typed PRNG key made from the seed of the run.
      step: i32[], the training step; 0 in evaluation, so that every evaluation uses the same noise.
    """

    root: jax.Array
    step: jax.Array

    @classmethod
    def create(cls, seed: int, step: jax.Array | int = 0) -> "StreamKeys":
        """Returns the keys of `seed` at `step`."""
        return cls(root=jax.random.key(seed), step=jnp.asarray(step, jnp.int32))

    def key(self, stream: str) -> jax.Array:
        """Returns the key of one stream at this step; independent of the batch."""
        return jax.random.fold_in(jax.random.fold_in(self.root, stream_number(stream)), self.step)

    def per_example(self, stream: str, example_ids: jax.Array) -> jax.Array:
        """Returns one key per example id, in the shape of `example_ids` (u32[...])."""
        return fold_in_each(self.key(stream), example_ids)

    def example_uniform(self, stream: str, example_ids: jax.Array) -> jax.Array:
        """Returns f32 uniforms in [0, 1) in the shape of `example_ids`; equal ids get equal values.

        With ids u32[B,T] of packed rows this draws one number per *example*, repeated over its tokens.
        """
        return uniform_each(self.per_example(stream, example_ids))

    def token_uniform(self, stream: str, example_ids: jax.Array, positions: jax.Array) -> jax.Array:
        """Returns f32 uniforms in [0, 1), one per token; `example_ids` and `positions` are [B,T]."""
        return uniform_each(self.per_token(stream, example_ids, positions))

    def per_token(self, stream: str, example_ids: jax.Array, positions: jax.Array) -> jax.Array:
        """Returns one key per token, keyed by its example and its position inside the example; both are [B,T]."""
        return fold_in_each(self.per_example(stream, example_ids), positions)


def fold_in_each(keys: jax.Array, data: jax.Array) -> jax.Array:
    """Folds `data[...]` into `keys` elementwise; `keys` is a scalar key or has the shape of `data`."""
    flat = data.reshape(-1).astype(jnp.uint32)
    if keys.ndim == 0:
        return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(keys, flat).reshape(data.shape)
    return jax.vmap(jax.random.fold_in)(keys.reshape(-1), flat).reshape(data.shape)


def uniform_each(keys: jax.Array) -> jax.Array:
    """Returns one f32 uniform in [0, 1) per key, in the shape of `keys`."""
    return jax.vmap(jax.random.uniform)(keys.reshape(-1)).reshape(keys.shape)
