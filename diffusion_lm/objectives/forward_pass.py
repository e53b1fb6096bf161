"""The forward passes of one loss over one batch."""

import dataclasses

import jax

from diffusion_lm.architectures.base import BoundModel, EncoderState, Hidden
from diffusion_lm.core.rng import StreamKeys
from diffusion_lm.core.types import Batch, EncoderInputs
from diffusion_lm.nn.masks import Visibility
from diffusion_lm.nn.named_masks import named_visibility
from diffusion_lm.nn.time_conditioning import time_input


class ForwardPasses:
    """Calls the network with the batch's own positions, segments and encoder, under one visibility.

    Dropout is a function of (seed, step, pass, row id), so it is invariant to microbatches and to the mesh.

    Args:
      model: the network.
      batch: everything but the tokens comes from it.
      keys: root of the dropout.
      visibility: who attends to whom, by name or as an expression.
      train: whether there is dropout.
      passes: number of passes of this loss; with more than one, the encoder runs once for all of them.
    """

    def __init__(
        self,
        model: BoundModel,
        batch: Batch,
        keys: StreamKeys,
        *,
        visibility: str | Visibility,
        train: bool,
        passes: int = 1,
    ):
        self._model, self._batch = model, batch
        self._keys = keys if train else None
        if isinstance(visibility, str):
            visibility = named_visibility(visibility, batch.target_mask)
        self._visibility = visibility
        self._encoder: EncoderInputs | EncoderState | None = batch.encoder
        if batch.encoder is not None and passes > 1:
            # Each layer projects its keys and values in each pass. Projecting them here would keep those of all layers
            # until the backward pass.
            self._encoder = model.encode(batch.encoder, dropout_keys=self._dropout_keys("encoder"), project=False)

    def __call__(
        self,
        tokens: jax.Array,
        number: int = 0,
        *,
        self_condition: jax.Array | None = None,
        rate: jax.Array | None = None,
        has_gradient: bool = True,
    ) -> Hidden:
        """Returns the hidden states for i32[B,T] tokens in place of the batch's own.

        Args:
          tokens: the input tokens.
          number: which pass of the loss this is; its dropout depends on it.
          self_condition: [B,T,D], see `Architecture.hidden`.
          rate: f32[B,T], 1 - alpha at each target token; read by networks with `spec.time_conditioning`.
          has_gradient: False for a pass whose result is only looked at; the backward pass then stores nothing of it.
        """
        model, encoder = self._model, self._encoder
        if not has_gradient:
            model = dataclasses.replace(model, params=jax.lax.stop_gradient(model.params))
            encoder = jax.lax.stop_gradient(encoder)
        with jax.named_scope(f"objective/pass_{number}"):
            return model(
                tokens,
                visibility=self._visibility,
                positions=self._batch.positions,
                segment_ids=self._batch.segment_ids,
                encoder=encoder,
                self_condition=self_condition,
                time=time_input(model.spec, rate, self._batch.target_mask),
                dropout_keys=self._dropout_keys(f"decoder/{number}"),
            )

    def _dropout_keys(self, site: str) -> jax.Array | None:
        return None if self._keys is None else self._keys.per_example(f"dropout/{site}", self._batch.row_ids)
