"""The inputs of one forward pass, as one struct that travels from `BoundModel` down to the first block."""

import flax.struct
import jax
import jax.numpy as jnp

from diffusion_lm.core.types import EncoderInputs
from diffusion_lm.nn.cache import KVCache
from diffusion_lm.nn.constrain import Constrain, no_constraint
from diffusion_lm.nn.masks import Visibility


@flax.struct.dataclass
class EncoderState:
    """An encoded source.

    Attributes:
      memory_BSD: the encoder's output, [B,S,D].
      segment_ids: i32[B,S].
      cross: cross-attention keys and values of every decoder layer, projected once and reused by all forward passes of
        a loss or a sampler. None where the source is encoded inside the forward pass: each layer then projects its own,
        and no array of N layers is stored.
    """

    memory_BSD: jax.Array
    segment_ids: jax.Array
    cross: KVCache | None = None

    def take_rows(self, rows: jax.Array) -> "EncoderState":
        """Returns the state with its rows reordered or repeated by i32[B']."""
        return EncoderState(
            jnp.take(self.memory_BSD, rows, axis=0),
            jnp.take(self.segment_ids, rows, axis=0),
            None if self.cross is None else self.cross.take_rows(rows),
        )


@flax.struct.dataclass
class ForwardInputs:
    """All inputs of one forward pass but the parameters.

    Attributes:
      tokens: i32[B,Q]; Q = T without a cache.
      visibility: which of the T slots each slot attends to. Packed examples and padding are always kept apart, whatever
        it says.
      positions: i32[B,Q]. Without a cache they increase by one inside each segment. With a cache they are the slots of
        the tokens on the canvas: their keys and values are written there (slots >= T are not written).
      segment_ids: i32[B,T], of the whole canvas even with a cache; 0 = padding.
      encoder: source tokens, or the result of `Architecture.encode`; only for encoder-decoders.
      self_condition: [B,Q,D], the expected embedding of the previous prediction at each slot, zeros where there is
        none; None = zeros. Only for networks with `spec.self_conditioning`.
      time: f32[B,Q] in [0, 1], the noise rate 1 - alpha(t) of each noisy slot, 0 on clean slots; None = 0. Only for
        networks with `spec.time_conditioning`.
      cache: from `Architecture.init_cache`, or None.
      dropout_keys: key[B], one per row, so that dropout does not depend on the split into microbatches; None = no
        dropout.
      constrain: pins activations to the mesh; static.
    """

    tokens: jax.Array
    visibility: Visibility
    positions: jax.Array
    segment_ids: jax.Array
    encoder: EncoderInputs | EncoderState | None = None
    self_condition: jax.Array | None = None
    time: jax.Array | None = None
    cache: KVCache | None = None
    dropout_keys: jax.Array | None = None
    constrain: Constrain = flax.struct.field(pytree_node=False, default=no_constraint)

    @property
    def q_idx(self) -> jax.Array | None:
        """i32[B,Q], the slots of the queries; None = all T slots in order."""
        return None if self.cache is None else self.positions

    @property
    def q_segments(self) -> jax.Array:
        """i32[B,Q], the segments of the queries."""
        if self.cache is None:
            return self.segment_ids
        # "clip": finished rows of a sampler have slots past the end.
        return jnp.take_along_axis(self.segment_ids, self.positions, axis=1, mode="clip")
