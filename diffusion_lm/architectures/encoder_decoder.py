"""An encoder with bidirectional attention over the source, and a decoder that attends to it."""

import dataclasses
from typing import Any

import jax

from diffusion_lm.architectures import stream
from diffusion_lm.architectures.base import Hidden
from diffusion_lm.core.axes import AxesTree
from diffusion_lm.core.errors import ConfigError, require
from diffusion_lm.core.types import EncoderInputs, Params
from diffusion_lm.nn import stack
from diffusion_lm.nn.cache import KVCache
from diffusion_lm.nn.constrain import Constrain, no_constraint
from diffusion_lm.nn.head import Head
from diffusion_lm.nn.inputs import EncoderState, ForwardInputs
from diffusion_lm.nn.masks import Full
from diffusion_lm.nn.transformer import TransformerSpec


@dataclasses.dataclass(frozen=True)
class EncoderDecoder:
    """An encoder-decoder transformer with one input embedding for both streams; methods as in `Architecture`.

    With the visibility `Full` for the decoder's stream, this is the network of encoder-decoder text diffusion.

    Attributes:
      spec: the network's shape, with encoder layers.
    """

    spec: TransformerSpec
    needs_encoder = True

    def __post_init__(self):
        require(
            self.spec.encoder_layers > 0,
            "encoder_layers=0: an encoder-decoder needs at least one",
            where="TransformerSpec.encoder_layers",
            fix="Bind encoder_layers, or use gin/models/decoder_only.gin.",
        )

    def init(self, key: jax.Array) -> Params:
        """Returns fresh parameters."""
        spec = self.spec
        params: dict[str, Any] = {"embed": {"tokens": stream.init_tokens(spec, key, "embed", spec.embedding_std)}}
        params |= stream.init_stream(spec, stream.named_key(key, "decoder"), spec.num_layers, has_cross=True)
        params["encoder"] = stream.init_stream(spec, stream.named_key(key, "encoder"), spec.encoder_layers)
        params |= stream.init_conditioning(spec, key)
        return params | stream.init_head(spec, key)

    def abstract_params(self) -> Params:
        """Returns shapes and dtypes of the parameters."""
        return jax.eval_shape(self.init, stream.abstract_key())

    def logical_axes(self) -> AxesTree:
        """Returns the logical axes of the parameters."""
        axes = {"embed": {"tokens": ("vocab", "embed")}} | stream.stream_axes(self.spec, has_cross=True)
        axes["encoder"] = stream.stream_axes(self.spec)
        axes |= stream.conditioning_axes(self.spec)
        return axes | stream.head_axes(self.spec)

    def hidden(self, params: Params, inputs: ForwardInputs) -> Hidden:
        """Runs the decoder up to its final norm, and the encoder first if it is given source tokens."""
        encoder = inputs.encoder
        if encoder is None:
            raise ConfigError(
                "the batch has no encoder's stream, which an encoder-decoder needs",
                where="TrainRun.data",
                fix="Use EncoderDecoderConverter, or gin/models/decoder_only.gin.",
            )
        if isinstance(encoder, EncoderInputs):
            keys, constrain = inputs.dropout_keys, inputs.constrain
            encoder = self.encode(params, encoder, dropout_keys=keys, constrain=constrain, project=False)
        inputs = inputs.replace(encoder=encoder)  # type: ignore[attr-defined]
        return Hidden(*stream.run_stream(self.spec, params["embed"]["tokens"], params, inputs))

    def head(self, params: Params) -> Head:
        """Returns the output projection."""
        return stream.head_of(self.spec, params)

    def embedding(self, params: Params) -> jax.Array:
        """Returns the token embedding."""
        return params["embed"]["tokens"]

    def init_cache(self, batch: int, length: int) -> KVCache:
        """Returns an empty cache of the decoder."""
        return stream.empty_cache(self.spec, batch, length)

    def encode(
        self,
        params: Params,
        inputs: EncoderInputs,
        *,
        dropout_keys: jax.Array | None = None,
        constrain: Constrain = no_constraint,
        project: bool = True,
    ) -> EncoderState:
        """Encodes the source; with `project` also computes the cross-attention keys and values of all layers."""
        # The encoder needs buckets for both directions, even if the decoder has them for the past only (T5).
        bidirectional = dataclasses.replace(self.spec, relative_bidirectional=True)
        source = ForwardInputs(
            tokens=inputs.tokens,
            visibility=Full(),
            positions=inputs.positions,
            segment_ids=inputs.segment_ids,
            dropout_keys=stream.encoder_dropout_keys(dropout_keys),
            constrain=constrain,
        )
        memory_BSD, _ = stream.run_stream(bidirectional, params["embed"]["tokens"], params["encoder"], source)
        cross = stack.project_memory(self.spec, params["blocks"], memory_BSD) if project else None
        return EncoderState(memory_BSD, inputs.segment_ids, cross)

    def frozen_arrays(self) -> frozenset[str]:
        """Returns the empty set: everything is trained."""
        return frozenset()

    def saved_flops_per_token(self, context_length: int, encoder_length: int | None = None) -> float:
        """Returns 0: no array is frozen."""
        del context_length, encoder_length
        return 0.0

    def count_parameters(self) -> dict[str, int]:
        """Returns the number of parameters by part."""
        return stream.count(self.abstract_params())

    def flops_per_token(self, context_length: int, encoder_length: int | None = None) -> float:
        """Returns forward matmul FLOPs per token of the decoder's stream, including its share of the encoder.

        Args:
          context_length: length of the decoder's stream.
          encoder_length: length of the encoder's stream; None = that of the decoder's.
        """
        spec = self.spec
        encoder_length = context_length if encoder_length is None else encoder_length
        decoder = spec.num_layers * stream.block_flops(spec, context_length, encoder_length) + stream.logit_flops(spec)
        decoder += stream.conditioning_flops(spec)
        # Each layer projects the memory once per source token, whatever the number of target tokens.
        projection = spec.num_layers * 2 * spec.model_dim * 2 * spec.kv_heads * spec.head_dim
        per_source_token = spec.encoder_layers * stream.block_flops(spec, encoder_length) + projection
        return decoder + per_source_token * encoder_length / context_length
