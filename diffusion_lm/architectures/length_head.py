"""A head that predicts the length of the target from the conditioning (arXiv 2308.12219), on top of any network.

    features = frozen network(conditioning)  ->  one transformer block  ->  mean over tokens  ->  Linear, tanh, Linear

The classes are lengths: class c is a target of c tokens; the last class also stands for longer targets.
"""

import dataclasses

import jax
import jax.numpy as jnp

from diffusion_lm.architectures import stream
from diffusion_lm.architectures.base import BoundModel
from diffusion_lm.architectures.extended import Extended, layer_of
from diffusion_lm.core.axes import AxesTree
from diffusion_lm.core.errors import ConfigError, require
from diffusion_lm.core.types import Batch, Params
from diffusion_lm.nn import stack
from diffusion_lm.nn.attention_mask import DenseMask
from diffusion_lm.nn.layers import Context
from diffusion_lm.nn.masks import Full, Segments
from diffusion_lm.nn.named_masks import named_visibility

PART = "length_head"
"""Name of the head among the parameters, next to those of the network."""


@dataclasses.dataclass(frozen=True)
class WithLengthHead(Extended):
    """A network with a length head.

    Attributes:
      classes: number of lengths; the longest is `classes - 1`.
    """

    classes: int = 512

    def __post_init__(self):
        require(
            isinstance(self.classes, int) and self.classes > 1,
            f"classes={self.classes}: must be an integer >= 2",
            where="WithLengthHead.classes",
            fix="Use the size of the target window + 1.",
        )

    def init(self, key: jax.Array) -> Params:
        """Returns the network's fresh parameters and the head's."""
        own, spec = stream.named_key(key, PART), self.spec
        dim, dtype = spec.model_dim, jnp.dtype(spec.param_dtype)

        def linear(name: str, width: int) -> Params:
            kernel = jax.random.normal(stream.named_key(own, name), (dim, width), dtype) * dim**-0.5
            return {"kernel": kernel, "bias": jnp.zeros(width, dtype)}

        head = {
            "blocks": stack.init_stack(spec, stream.named_key(own, "blocks"), 1),
            "hidden": linear("hidden", dim),
            "output": linear("output", self.classes),
        }
        return {**self.backbone.init(key), PART: head}

    def logical_axes(self) -> AxesTree:
        """Returns the logical axes of the parameters."""
        head = {
            "blocks": stack.stack_axes(self.spec),
            "hidden": {"kernel": ("embed", "mlp"), "bias": ("mlp",)},
            "output": {"kernel": ("mlp", None), "bias": (None,)},
        }
        return {**self.backbone.logical_axes(), PART: head}

    def length_logits(
        self, params: Params, features_BTD: jax.Array, used_BT: jax.Array, positions_BT: jax.Array
    ) -> jax.Array:
        """Returns f32[B, classes] from the network's hidden states at the conditioning (`used_BT`)."""
        head, spec = params[PART], self.spec
        mask = DenseMask.of(Full() & Segments(used_BT.astype(jnp.int32)), None, used_BT.shape[1])
        context = Context(mask=mask, positions=positions_BT)
        x_BTD, _ = stack.run_stack(spec, head["blocks"], features_BTD, context)
        used = used_BT[..., None].astype(jnp.float32)
        # Mean over the conditioning; a row without any gives 0.
        pooled_BD = jnp.sum(x_BTD.astype(jnp.float32) * used, axis=1) / jnp.maximum(jnp.sum(used, axis=1), 1.0)

        def linear(name: str, x: jax.Array) -> jax.Array:
            return x @ head[name]["kernel"].astype(jnp.float32) + head[name]["bias"].astype(jnp.float32)

        return linear("output", jnp.tanh(linear("hidden", pooled_BD)))

    def flops_per_token(self, context_length: int, encoder_length: int | None = None) -> float:
        """Returns the forward FLOPs per token of the network and the head's block."""
        head = stream.block_flops(self.spec, context_length)
        return self.backbone.flops_per_token(context_length, encoder_length) + head


def length_logits(model: BoundModel, batch: Batch, visibility: str) -> jax.Array:
    """Returns f32[B, classes], the logits of the length of each row's target given its conditioning.

    The target's slots are masked like padding, so their number does not reveal the length. No gradient flows into the
    network. Rows must hold one example each.

    Args:
      model: a network with a length head.
      batch: prompts or teacher-forced rows.
      visibility: the visibility that the network was trained with.

    Raises:
      ConfigError: the network has no length head.
    """
    architecture = layer_of(model.architecture, WithLengthHead)
    if architecture is None:
        raise ConfigError(
            "the model has no length head",
            where="LengthBeam.lengths",
            fix="Train one with gin/runs/length_head.gin, or use the length of the window: lengths = 'window'.",
        )
    if batch.encoder is not None:
        features = model.encode(batch.encoder).memory_BSD
        used, positions = batch.encoder.segment_ids > 0, batch.encoder.positions
    else:
        used, positions = (batch.segment_ids > 0) & ~batch.target_mask, batch.positions
        hidden = model(
            batch.tokens,
            visibility=named_visibility(visibility, batch.target_mask),
            positions=positions,
            segment_ids=jnp.where(used, batch.segment_ids, 0),
        )
        features = hidden.values_BTD
    return architecture.length_logits(model.params, jax.lax.stop_gradient(features), used, positions)
