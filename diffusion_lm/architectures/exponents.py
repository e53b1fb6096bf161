"""A learned masking schedule per token (GenMD4, arXiv 2406.04329), as parameters on top of any network.

alpha_i(t) = 1 - t^(w_i):  token i is MASK at time t with probability t^(w_i)
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from diffusion_lm.architectures.base import BoundModel
from diffusion_lm.architectures.extended import Extended, layer_of
from diffusion_lm.core.axes import AxesTree
from diffusion_lm.core.types import Params

PART = "exponents"
"""Name of the exponents among the parameters, next to those of the network."""

ONE = math.log(math.e - 1.0)
"""softplus(ONE) = 1."""


@dataclasses.dataclass(frozen=True)
class WithTokenSchedules(Extended):
    """A network with an exponent per token.

    The network itself does not read them. Objectives and samplers with token schedules do; all others work as on the
    plain network and leave the exponents unchanged.
    """

    def init(self, key: jax.Array) -> Params:
        """Returns the network's fresh parameters, and f32[padded V] for exponents of 1 (the linear schedule).

        They are float32 even in a bfloat16 network, where updates of a value near 1 would be rounded away.
        """
        raw = jnp.full(self.spec.padded_vocab_size, ONE, jnp.float32)
        return {**self.backbone.init(key), PART: {"raw": raw}}

    def logical_axes(self) -> AxesTree:
        """Returns the logical axes of the parameters."""
        return {**self.backbone.logical_axes(), PART: {"raw": ("vocab",)}}

    def exponents(self, params: Params) -> jax.Array:
        """Returns f32[V], w: softplus of the parameters, as in the paper's code."""
        return jax.nn.softplus(params[PART]["raw"][: self.spec.vocab_size].astype(jnp.float32))


def token_exponents(model: BoundModel) -> jax.Array | None:
    """Returns f32[V], the exponents of the token schedules, replicated; None if the network has none."""
    found = layer_of(model.architecture, WithTokenSchedules)
    return None if found is None else model.constrain(found.exponents(model.params), (None,))
