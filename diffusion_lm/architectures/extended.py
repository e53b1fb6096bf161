"""A network with parameters of its own beside those of the network that it is built on."""

import dataclasses
from typing import Any

import jax

from diffusion_lm.architectures import parts
from diffusion_lm.architectures.base import Architecture, Hidden
from diffusion_lm.core.axes import AxesTree
from diffusion_lm.core.types import EncoderInputs, Params
from diffusion_lm.nn.cache import KVCache
from diffusion_lm.nn.head import Head
from diffusion_lm.nn.inputs import EncoderState, ForwardInputs
from diffusion_lm.nn.transformer import TransformerSpec


@dataclasses.dataclass(frozen=True)
class Extended:
    """Base of such networks; methods as in `Architecture`, those of the `backbone` where a subclass says nothing.

    A subclass adds parts to `init` and `logical_axes` under a name of its own, so a checkpoint of the backbone
    transfers whole and the parts are what `transfer` reports as added. Extensions stack in any order: all their
    parameters stand side by side, and `layer_with` finds the one that has a method.

    Attributes:
      backbone: the network.
    """

    backbone: Architecture

    @property
    def spec(self) -> TransformerSpec:
        """The network's shape."""
        return self.backbone.spec

    @property
    def needs_encoder(self) -> bool:
        """As the network's."""
        return self.backbone.needs_encoder

    def init(self, key: jax.Array) -> Params:
        """Returns the network's fresh parameters."""
        return self.backbone.init(key)

    def abstract_params(self) -> Params:
        """Returns shapes and dtypes of the parameters."""
        return jax.eval_shape(self.init, parts.abstract_key())

    def logical_axes(self) -> AxesTree:
        """Returns the logical axes of the parameters."""
        return self.backbone.logical_axes()

    def hidden(self, params: Params, inputs: ForwardInputs) -> Hidden:
        """Runs the network up to its final norm."""
        return self.backbone.hidden(params, inputs)

    def head(self, params: Params) -> Head:
        """Returns the network's output projection."""
        return self.backbone.head(params)

    def embedding(self, params: Params) -> jax.Array:
        """Returns the network's token embedding."""
        return self.backbone.embedding(params)

    def init_cache(self, batch: int, length: int) -> KVCache:
        """Returns an empty cache of the network."""
        return self.backbone.init_cache(batch, length)

    def encode(self, params: Params, inputs: EncoderInputs, **options: Any) -> EncoderState:
        """Encodes the source."""
        return self.backbone.encode(params, inputs, **options)

    def count_parameters(self) -> dict[str, int]:
        """Returns the number of parameters by part."""
        return parts.count(self.abstract_params())

    def flops_per_token(self, context_length: int, **lengths: Any) -> float:
        """Returns the network's forward FLOPs per token."""
        return self.backbone.flops_per_token(context_length, **lengths)


def frozen_arrays(architecture: Any) -> frozenset[str]:
    """Returns the paths of the arrays that training leaves alone, such as `blocks/mlp/up`; none of a plain network."""
    layer = layer_with(architecture, "frozen_arrays")
    return frozenset() if layer is None else layer.frozen_arrays()


def layer_with(architecture: Any, method: str) -> Any:
    """Returns the network that has `method`: this one or what it is built on, or None."""
    while architecture is not None and not hasattr(architecture, method):
        architecture = getattr(architecture, "backbone", None)
    return architecture
