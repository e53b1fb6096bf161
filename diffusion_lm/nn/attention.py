"""Scaled dot-product attention: one entry point for all implementations."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from diffusion_lm.core.errors import ConfigError, require
from diffusion_lm.nn.attention_mask import AttentionMask, DenseMask, SymbolicMask
from diffusion_lm.nn.constrain import Constrain, no_constraint
from diffusion_lm.nn.flash import fits, flash_backward, flash_forward
from diffusion_lm.nn.flash_kernels import HIDDEN, MAXIMUM_FLOOR
from diffusion_lm.nn.linear import product

IMPLEMENTATIONS = ("xla", "cudnn", "flash")


def attend(
    q_BQHE: jax.Array,
    k_BTKE: jax.Array,
    v_BTKE: jax.Array,
    mask: AttentionMask,
    *,
    softcap: float | None = None,
    implementation: str = "xla",
    drop: Callable[[jax.Array], jax.Array] | None = None,
    constrain: Constrain = no_constraint,
) -> jax.Array:
    """Returns softmax(q k^T + bias) v over the keys that the mask allows. Queries come pre-scaled.

    Query head h reads key/value head h // (H // K), so grouped-query attention needs no repeated keys. The softmax is
    float32 whatever the dtype of the inputs. A query without any allowed key gets 0, with a gradient of 0.

    Args:
      q_BQHE: queries.
      k_BTKE: keys, K dividing H.
      v_BTKE: values.
      mask: the allowed pairs of a query and a key, and the bias of their scores.
      softcap: scores become softcap * tanh(scores / softcap), before bias and mask.
      implementation: "xla" runs everywhere; "cudnn" is flash attention on NVIDIA GPUs, in bfloat16, without softcap;
        "flash" is `nn/flash.py` on TPUs if the mask is symbolic and the rows can be tiled, else "xla".
      drop: dropout of the attention probabilities, applied to an array with the rows as first axis; only for "xla".
      constrain: the placement of activations; kernels are split over devices accordingly.

    Returns:
      [B,Q,H,E] in the dtype of the values.

    Raises:
      ConfigError: the implementation is unknown or does not support the settings.
    """
    require(
        drop is None or implementation == "xla",
        f"attention={implementation!r}: has no dropout of attention probabilities",
        where="TransformerSpec.attention_dropout_rate",
        fix="Set it to 0.0, or use attention = 'xla'.",
    )
    if implementation == "flash" and isinstance(mask, SymbolicMask):
        return _attend_flash(q_BQHE, k_BTKE, v_BTKE, mask, softcap, constrain)
    if implementation in ("xla", "flash"):
        return _attend_xla(q_BQHE, k_BTKE, v_BTKE, mask.dense(), softcap, drop)
    if implementation == "cudnn":
        return _attend_cudnn(q_BQHE, k_BTKE, v_BTKE, mask.dense(), softcap)
    raise ConfigError(
        f"attention={implementation!r}: there is no such attention implementation",
        where="TransformerSpec.attention",
        fix=f"Use one of {', '.join(IMPLEMENTATIONS)}.",
    )


def _attend_xla(q_BQHE, k_BTKE, v_BTKE, mask: DenseMask, softcap, drop=None):
    B, Q, H, E = q_BQHE.shape
    T, K = k_BTKE.shape[1:3]
    G = H // K
    # Two batch axes, rows and columns: the layout that XLA's CPU backend multiplies fast. The queries of a group are
    # adjacent, so that a length that is sharded over devices stays the outer part of the axis.
    q_BKRE = q_BQHE.reshape(B, Q, K, G, E).transpose(0, 2, 1, 3, 4).reshape(B, K, Q * G, E)
    scores = product("BKRE,BTKE->BKRT", q_BKRE, k_BTKE)
    scores = scores.reshape(B, K, Q, G, T)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    if mask.bias is not None:
        scores = scores + mask.bias.reshape(mask.bias.shape[0], K, G, Q, T).transpose(0, 1, 3, 2, 4)
    # A sum instead of a `where` on the scores, which XLA would materialise: no score is large enough to change HIDDEN.
    scores = scores + jnp.where(mask.allowed, 0.0, HIDDEN)[:, None, :, None]
    # The weights stay unnormalised and the much smaller output is divided instead: one pass over [B,H,Q,T] less. The
    # floor of the maximum makes the weights of a query without keys underflow to 0 instead of being equal.
    maximum = jnp.maximum(jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)), MAXIMUM_FLOOR)
    weights = jnp.exp(scores - maximum)
    total = weights.sum(axis=-1, keepdims=True)
    # After the sum: the remaining probabilities of a query are scaled by 1 / (1 - rate) and not renormalised.
    weights = weights if drop is None else drop(weights)
    weights_BKRT = weights.astype(v_BTKE.dtype).reshape(B, K, Q * G, T)
    out = jnp.einsum("BKRT,BTKE->BKRE", weights_BKRT, v_BTKE, preferred_element_type=jnp.float32)
    out = out.reshape(B, K, Q, G, E) / jnp.where(total > 0, total, 1.0)
    return out.astype(v_BTKE.dtype).transpose(0, 2, 1, 3, 4).reshape(B, Q, H, E)


def _attend_cudnn(q_BQHE, k_BTKE, v_BTKE, mask: DenseMask, softcap):
    if softcap is not None or v_BTKE.dtype == jnp.float32:
        raise ConfigError(
            "attention='cudnn': supports neither softcap nor float32",
            where="TransformerSpec.attention",
            fix="Set TransformerSpec.dtype = 'bfloat16' and no softcap, or attention = 'xla'.",
        )
    B, Q, _, _ = q_BQHE.shape
    mask_B1QT = jnp.broadcast_to(mask.allowed[:, None], (B, 1, Q, mask.allowed.shape[-1]))
    try:
        out = jax.nn.dot_product_attention(
            q_BQHE,
            k_BTKE,
            v_BTKE,
            bias=None if mask.bias is None else mask.bias.astype(q_BQHE.dtype),
            mask=mask_B1QT,
            scale=1.0,
            implementation="cudnn",
        )
    except RuntimeError as error:
        if "cuDNN" not in str(error):
            raise
        raise ConfigError(
            f"attention='cudnn': cannot be compiled on this machine: {error}",
            where="TransformerSpec.attention",
            fix="Install cuDNN 9 (the cuda extra; to plan without a GPU, nvidia-cudnn-cu13, nvidia-cublas and "
            "nvidia-cuda-nvrtc), or use 'xla'.",
        ) from error
    return jnp.where(mask_B1QT[:, 0].any(-1)[:, :, None, None], out, 0)


def _attend_flash(q_BTHE, k_BTKE, v_BTKE, mask: SymbolicMask, softcap, constrain):
    group = q_BTHE.shape[2] // k_BTKE.shape[2]

    def per_shard(q, k, v, visibility, diagonals):
        require(
            q.shape[2] == group * k.shape[2],
            f"{k_BTKE.shape[2]} key/value heads cannot be split over as many devices as {q_BTHE.shape[2]} query heads",
            where="MeshSpec",
            fix="Split the heads over at most as many devices as there are key/value heads, or use attention = 'xla'.",
        )
        return _flash(softcap, q, k, v, visibility, diagonals)

    heads, kv_heads = ("batch", None, "heads", "head_dim"), ("batch", None, "kv_heads", "head_dim")
    axes = (heads, kv_heads, kv_heads, ("batch", None, None), ("heads", None))
    return constrain.split(per_shard, (q_BTHE, k_BTKE, v_BTKE, mask.visibility, mask.diagonals), axes, heads)


# `platform_dependent`, because the program may be compiled for devices of another platform than this process has.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _flash(softcap, q_BTHE, k_BTKE, v_BTKE, visibility, diagonals):
    return _flash_forward(softcap, q_BTHE, k_BTKE, v_BTKE, visibility, diagonals)[0]


def _flash_forward(softcap, *inputs):
    def dense(*inputs):
        out = _dense(softcap, *inputs)
        B, Q, H, _ = inputs[0].shape
        return out, jnp.zeros((B, H, Q), jnp.float32)

    kernel = functools.partial(flash_forward, softcap=softcap) if _fits(inputs) else dense
    out, logsumexp = jax.lax.platform_dependent(*inputs, tpu=kernel, default=dense)
    return out, (*inputs, out, logsumexp)


def _flash_backward(softcap, residuals, cotangent):
    def dense(q, k, v, visibility, diagonals, out, logsumexp, cotangent):
        del out, logsumexp
        _, pull = jax.vjp(
            lambda q, k, v, diagonals: _dense(softcap, q, k, v, visibility, diagonals), q, k, v, diagonals
        )
        return pull(cotangent)

    kernel = functools.partial(flash_backward, softcap=softcap) if _fits(residuals) else dense
    dq, dk, dv, d_diagonals = jax.lax.platform_dependent(*residuals, cotangent, tpu=kernel, default=dense)
    return dq, dk, dv, None, d_diagonals


_flash.defvjp(_flash_forward, _flash_backward)


def _fits(inputs) -> bool:
    q_BTHE, _, _, visibility, diagonals, *_ = inputs
    return fits(q_BTHE.shape[1], visibility.copies, diagonals is not None)


def _dense(softcap, q_BTHE, k_BTKE, v_BTKE, visibility, diagonals):
    mask = SymbolicMask(visibility, q_BTHE.shape[1], diagonals)
    return _attend_xla(q_BTHE, k_BTKE, v_BTKE, mask.dense(), softcap)
