"""Left-to-right forward passes over prompts of different lengths, with a KV cache or, for comparison, without one."""

import dataclasses

import jax
import jax.numpy as jnp

from diffusion_lm.architectures.base import BoundModel, EncoderState, Hidden
from diffusion_lm.core.types import Batch
from diffusion_lm.nn.cache import KVCache
from diffusion_lm.nn.named_masks import named_visibility
from diffusion_lm.samplers.window import Window

PREFILL_SLOTS = 512
"""The largest number of slots that a causal prefill runs at once. A long prompt takes several passes of this width,
with attention scores of [PREFILL_SLOTS, T] instead of [T, T]."""


@dataclasses.dataclass(frozen=True)
class CachedNetwork:
    """The forward passes of one decode: `prefill` once, then `advance` by one token per row.

    Each row has its own position, so prompts of different lengths share a batch without left padding: positions, and
    thus results, are those of the row alone (trap T41).

    Attributes:
      model: the bound network.
      prompt: the prompts.
      window: their target windows.
      visibility: "causal" or "prefix".
      use_cache: False runs the whole canvas in every step: the same tokens, for tests and as the naive baseline.
    """

    model: BoundModel
    prompt: Batch
    window: Window
    visibility: str
    use_cache: bool = True

    def encode(self) -> EncoderState | None:
        """Returns the encoder's state, computed once per decode, or None for single-stream models."""
        return None if self.prompt.encoder is None else self.model.encode(self.prompt.encoder)

    def prefill(self, canvas: jax.Array, encoder: EncoderState | None) -> tuple[Hidden, KVCache | None]:
        """Runs the conditioning: a forward pass over i32[B,T] with an empty window, in pieces if T is long.

        Returns:
          (hidden, cache): `hidden.values_BTD` is [B,1,D], the state that predicts the first target token. Cache entries
          of the empty window are meaningless; they are overwritten before any token can attend to them.
        """
        cache = self.model.init_cache(*canvas.shape) if self.use_cache else None
        if cache is not None and self.visibility == "causal" and canvas.shape[1] > PREFILL_SLOTS:
            return self._in_pieces(canvas, encoder, cache)
        hidden = self._whole(canvas, encoder, cache)
        return _at_slots(hidden, self.window.starts - 1), hidden.cache

    def _in_pieces(self, canvas: jax.Array, encoder: EncoderState | None, cache: KVCache) -> tuple[Hidden, KVCache]:
        """Returns what `prefill` does; pieces go from left to right, up to the last row's first target slot."""
        length = canvas.shape[1]
        wanted = jnp.clip(self.window.starts - 1, 0, length - 1)

        def piece(first: jax.Array, cache: KVCache) -> Hidden:
            slots = jnp.broadcast_to(
                first + jnp.arange(PREFILL_SLOTS, dtype=jnp.int32), (canvas.shape[0], PREFILL_SLOTS)
            )
            tokens = jnp.take_along_axis(canvas, jnp.minimum(slots, length - 1), axis=1)
            # Slots past the end of the row are not stored.
            return self._read(tokens, jnp.minimum(slots, length), encoder, cache)

        def read(state: tuple[jax.Array, jax.Array, KVCache]) -> tuple[jax.Array, jax.Array, KVCache]:
            first, values, cache = state
            hidden = piece(first, cache)
            here = (wanted >= first) & (wanted < first + PREFILL_SLOTS)
            found = _at_slots(hidden, wanted - first).values_BTD
            assert hidden.cache is not None
            return first + PREFILL_SLOTS, jnp.where(here[:, None, None], found, values), hidden.cache

        shape = jax.eval_shape(piece, jnp.int32(0), cache)
        nothing = jnp.zeros((canvas.shape[0], 1, shape.values_BTD.shape[2]), shape.values_BTD.dtype)
        _, values, cache = jax.lax.while_loop(
            lambda state: jnp.any(state[0] <= wanted), read, (jnp.int32(0), nothing, cache)
        )
        return dataclasses.replace(shape, values_BTD=values, cache=None), cache

    def advance(
        self,
        canvas: jax.Array,
        slots: jax.Array,
        moving: jax.Array,
        encoder: EncoderState | None,
        cache: KVCache | None,
    ) -> tuple[Hidden, KVCache | None]:
        """Runs one forward pass after the token at `slots` was generated.

        Args:
          canvas: i32[B,T].
          slots: i32[B], the slot of each row's newest token.
          moving: bool[B]; rows that are done store nothing in the cache.
          encoder: from `encode`.
          cache: from `prefill` or the last `advance`.

        Returns:
          (hidden [B,1,D], cache): the states that predict the tokens at `slots + 1`.
        """
        if cache is None:
            return _at_slots(self._whole(canvas, encoder, None), slots), None
        length = canvas.shape[1]
        tokens = jnp.take_along_axis(canvas, jnp.minimum(slots, length - 1)[:, None], axis=1)
        hidden = self._read(tokens, jnp.where(moving, slots, length)[:, None], encoder, cache)
        return dataclasses.replace(hidden, cache=None), hidden.cache

    def _whole(self, canvas: jax.Array, encoder: EncoderState | None, cache: KVCache | None) -> Hidden:
        # Slots, not the batch's positions: those are 0 on padding, whose keys would land on slot 0 of the cache.
        slots = jnp.broadcast_to(jnp.arange(canvas.shape[1], dtype=jnp.int32), canvas.shape)
        return self._read(canvas, slots, encoder, cache)

    def _read(self, tokens: jax.Array, slots: jax.Array, encoder: EncoderState | None, cache: KVCache | None) -> Hidden:
        """Runs one forward pass over the tokens i32[B,Q] at `slots`; those at slot T are not stored."""
        return self.model(
            tokens,
            visibility=named_visibility(self.visibility, self.prompt.target_mask),
            positions=slots,
            segment_ids=self.prompt.segment_ids,
            encoder=encoder,
            cache=cache,
        )


def _at_slots(hidden: Hidden, slots: jax.Array) -> Hidden:
    """Returns the hidden states at one slot per row, [B,1,D]."""
    slots = jnp.clip(slots, 0, hidden.values_BTD.shape[1] - 1)
    return dataclasses.replace(
        hidden, values_BTD=jnp.take_along_axis(hidden.values_BTD, slots[:, None, None], axis=1), cache=None
    )
