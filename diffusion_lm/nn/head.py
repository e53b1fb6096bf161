"""The output projection: from hidden states to logits."""

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp

from diffusion_lm.core.types import Params
from diffusion_lm.nn.linear import product

NEVER = -1e30
"""Logit of a token that is never emitted: exp underflows to 0, and unlike with -inf, products with 0 stay finite."""


class Head(flax.struct.PyTreeNode):
    """The output projection: logits = scale * f(h) W^T + bias.

    Attributes:
      weight_VD: [padded V,D].
      bias_V: [padded V] or None.
      scale: static factor; 1/sqrt(D) if the weights are the input embedding, as in the T5 family.
      vocab_size: static; rows from here on are padding and are never emitted.
      softcap: static; logits become softcap * tanh(logits / softcap).
      transform: parameters of f, which is computed at the selected slots only; None = f is the identity.
      run_transform: static; f as a function of `transform` and [b,t,D].
    """

    weight_VD: jax.Array
    bias_V: jax.Array | None = None
    scale: float = flax.struct.field(pytree_node=False, default=1.0)
    vocab_size: int = flax.struct.field(pytree_node=False, default=0)
    softcap: float | None = flax.struct.field(pytree_node=False, default=None)
    transform: Params | None = None
    run_transform: Callable[[Params, jax.Array], jax.Array] | None = flax.struct.field(pytree_node=False, default=None)


def logits(hidden_BTD: jax.Array, head: Head, forbidden: tuple[int, ...] = ()) -> jax.Array:
    """Returns f32[B,T,padded V]; the padding rows and `forbidden` ids have the logit `NEVER`."""
    if head.run_transform is not None:
        assert head.transform is not None
        hidden_BTD = head.run_transform(head.transform, hidden_BTD)
    scaled = hidden_BTD if head.scale == 1.0 else hidden_BTD * jnp.asarray(head.scale, hidden_BTD.dtype)
    weight_VD = head.weight_VD.astype(hidden_BTD.dtype)
    # One axis of tokens: with two, the backward pass on a CPU spends as much time on transposes as on the product.
    out = product("ND,VD->NV", scaled.reshape(-1, scaled.shape[-1]), weight_VD)
    if head.bias_V is not None:
        out = out + head.bias_V.astype(jnp.float32)
    if head.softcap is not None:
        out = head.softcap * jnp.tanh(out / head.softcap)
    padded = head.weight_VD.shape[0]
    if head.vocab_size < padded or forbidden:
        ids = jnp.arange(padded)
        never = ids >= head.vocab_size
        for token in forbidden:
            never |= ids == token
        out = jnp.where(never, NEVER, out)
    return out.reshape(*scaled.shape[:-1], padded)
