"""One stack over one stream. Decoder-only, prefix-LM and encoder-only are this network with different visibility."""

import dataclasses

import jax

from diffusion_lm.architectures import stream
from diffusion_lm.architectures.base import Hidden
from diffusion_lm.core.axes import AxesTree
from diffusion_lm.core.errors import ConfigError, require
from diffusion_lm.core.types import EncoderInputs, Params
from diffusion_lm.nn.cache import KVCache
from diffusion_lm.nn.constrain import Constrain, no_constraint
from diffusion_lm.nn.head import Head
from diffusion_lm.nn.inputs import EncoderState, ForwardInputs
from diffusion_lm.nn.transformer import TransformerSpec


@dataclasses.dataclass(frozen=True)
class SingleStream:
    """A single-stream transformer; methods as in `Architecture`.

    Attributes:
      spec: the network's shape, without encoder layers.
    """

    spec: TransformerSpec
    needs_encoder = False

    def __post_init__(self):
        require(
            self.spec.encoder_layers == 0,
            f"encoder_layers={self.spec.encoder_layers}: must be 0 for a single-stream network",
            where="TransformerSpec.encoder_layers",
            fix="Bind 0, or use gin/models/encoder_decoder.gin.",
        )

    def init(self, key: jax.Array) -> Params:
        """Returns fresh parameters."""
        spec = self.spec
        params = {"embed": {"tokens": stream.init_tokens(spec, key, "embed", spec.embedding_std)}}
        params |= stream.init_stream(spec, stream.named_key(key, "decoder"), spec.num_layers)
        params |= stream.init_conditioning(spec, key)
        return params | stream.init_head(spec, key)

    def abstract_params(self) -> Params:
        """Returns shapes and dtypes of the parameters."""
        return jax.eval_shape(self.init, stream.abstract_key())

    def logical_axes(self) -> AxesTree:
        """Returns the logical axes of the parameters."""
        axes = {"embed": {"tokens": ("vocab", "embed")}} | stream.stream_axes(self.spec)
        axes |= stream.conditioning_axes(self.spec)
        return axes | stream.head_axes(self.spec)

    def hidden(self, params: Params, inputs: ForwardInputs) -> Hidden:
        """Runs the network up to its final norm."""
        if inputs.encoder is not None:
            raise _no_encoder()
        return Hidden(*stream.run_stream(self.spec, params["embed"]["tokens"], params, inputs))

    def head(self, params: Params) -> Head:
        """Returns the output projection."""
        return stream.head_of(self.spec, params)

    def embedding(self, params: Params) -> jax.Array:
        """Returns the token embedding."""
        return params["embed"]["tokens"]

    def init_cache(self, batch: int, length: int) -> KVCache:
        """Returns an empty cache."""
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
        """Raises `ConfigError`: there is no encoder."""
        raise _no_encoder()

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
        """Returns forward matmul FLOPs per token."""
        del encoder_length
        blocks = self.spec.num_layers * stream.block_flops(self.spec, context_length)
        return blocks + stream.logit_flops(self.spec) + stream.conditioning_flops(self.spec)


def _no_encoder() -> ConfigError:
    return ConfigError(
        "the batch has an encoder's stream, and a single-stream network has no encoder",
        where="TrainRun.data",
        fix="Use SingleStreamConverter, or gin/models/encoder_decoder.gin.",
    )
