"""Networks with additional parameters on top of another network."""

import dataclasses
from typing import TypeVar

import jax

from diffusion_lm.architectures import stream
from diffusion_lm.architectures.base import Architecture, Hidden
from diffusion_lm.core.axes import AxesTree
from diffusion_lm.core.types import EncoderInputs, Params
from diffusion_lm.nn.cache import KVCache
from diffusion_lm.nn.constrain import Constrain, no_constraint
from diffusion_lm.nn.head import Head
from diffusion_lm.nn.inputs import EncoderState, ForwardInputs
from diffusion_lm.nn.transformer import TransformerSpec

Layer = TypeVar("Layer", bound="Extended")


@dataclasses.dataclass(frozen=True)
class Extended:
    """Base of such networks; methods as in `Architecture`. By default they are those of the `backbone`.

    A subclass adds parameters to `init` and `logical_axes` under its own name, so a checkpoint of the backbone
    transfers completely, and `transfer` reports the new parameters as added. Extensions can be combined in any order:
    all their parameters are next to each other in one dict, and `layer_of` finds the extension of a class.

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
        """Whether the network needs an encoder's stream."""
        return self.backbone.needs_encoder

    def init(self, key: jax.Array) -> Params:
        """Returns the network's fresh parameters."""
        return self.backbone.init(key)

    def abstract_params(self) -> Params:
        """Returns shapes and dtypes of the parameters."""
        return jax.eval_shape(self.init, stream.abstract_key())

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

    def encode(
        self,
        params: Params,
        inputs: EncoderInputs,
        *,
        dropout_keys: jax.Array | None = None,
        constrain: Constrain = no_constraint,
        project: bool = True,
    ) -> EncoderState:
        """Encodes the source."""
        return self.backbone.encode(params, inputs, dropout_keys=dropout_keys, constrain=constrain, project=project)

    def frozen_arrays(self) -> frozenset[str]:
        """Returns the paths of the arrays that are not trained."""
        return self.backbone.frozen_arrays()

    def count_parameters(self) -> dict[str, int]:
        """Returns the number of parameters per part."""
        return stream.count(self.abstract_params())

    def flops_per_token(self, context_length: int, encoder_length: int | None = None) -> float:
        """Returns the network's forward FLOPs per token."""
        return self.backbone.flops_per_token(context_length, encoder_length)

    def saved_flops_per_token(self, context_length: int, encoder_length: int | None = None) -> float:
        """Returns the FLOPs per token that a backward pass saves because frozen matrices need no gradient."""
        return self.backbone.saved_flops_per_token(context_length, encoder_length)


def layer_of(architecture: Architecture, kind: type[Layer]) -> Layer | None:
    """Returns the extension of a class in a network, or None if it has none."""
    found: object = architecture
    while found is not None and not isinstance(found, kind):
        found = getattr(found, "backbone", None)
    return found
