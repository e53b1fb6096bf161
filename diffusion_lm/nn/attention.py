"""Scaled dot-product attention behind one entry point."""

import jax
import jax.numpy as jnp

from diffusion_lm.core.errors import ConfigError

IMPLEMENTATIONS = ("xla", "cudnn")
_HIDDEN = -1e30
_NOTHING_SEEN = -1e29


def attend(
    q_BQHE: jax.Array,
    k_BTKE: jax.Array,
    v_BTKE: jax.Array,
    *,
    mask: jax.Array,
    bias: jax.Array | None = None,
    softcap: float | None = None,
    implementation: str = "xla",
) -> jax.Array:
    """Returns softmax(q k^T + bias) v over the visible keys. Queries come pre-scaled.

    Query head h reads key/value head h // (H // K), so grouped-query attention needs no repeated keys. The softmax is
    float32 whatever the inputs are. A query that sees nothing gets 0, with a gradient of 0.

    Args:
      q_BQHE: queries.
      k_BTKE: keys, K dividing H.
      v_BTKE: values.
      mask: bool[B|1,Q,T], True where the key is visible.
      bias: f32[H,Q,T] or f32[B|1,H,Q,T], added to the scores.
      softcap: scores become softcap * tanh(scores / softcap), before bias and mask.
      implementation: "xla" runs everywhere; "cudnn" is flash attention on NVIDIA GPUs, in bfloat16, without softcap.

    Returns:
      [B,Q,H,E] in the dtype of the values.

    Raises:
      ConfigError: the implementation is unknown or cannot do what is asked.
    """
    if bias is not None and bias.ndim == 3:
        bias = bias[None]
    if implementation == "xla":
        return _attend_xla(q_BQHE, k_BTKE, v_BTKE, mask, bias, softcap)
    if implementation == "cudnn":
        return _attend_cudnn(q_BQHE, k_BTKE, v_BTKE, mask, bias, softcap)
    raise ConfigError(
        f"There is no attention implementation {implementation!r}",
        where="TransformerSpec.attention",
        fix=f"Choose one of {', '.join(IMPLEMENTATIONS)}.",
    )


def _attend_xla(q_BQHE, k_BTKE, v_BTKE, mask, bias, softcap):
    B, Q, H, E = q_BQHE.shape
    K = k_BTKE.shape[2]
    q_BQKGE = q_BQHE.reshape(B, Q, K, H // K, E)
    scores = jnp.einsum("BQKGE,BTKE->BKGQT", q_BQKGE, k_BTKE, preferred_element_type=jnp.float32)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.reshape(bias.shape[0], K, H // K, *bias.shape[2:])
    scores = jnp.where(mask[:, None, None], scores, _HIDDEN)
    # The weights stay unnormalised and the much smaller output is divided instead: one pass over [B,H,Q,T] less. The
    # floor under the maximum makes the weights of a query that sees nothing underflow to 0 rather than to equal shares.
    maximum = jnp.maximum(jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)), _NOTHING_SEEN)
    weights = jnp.exp(scores - maximum)
    total_BKGQ = weights.sum(axis=-1)
    out = jnp.einsum("BKGQT,BTKE->BQKGE", weights.astype(v_BTKE.dtype), v_BTKE, preferred_element_type=jnp.float32)
    total_BQKG = jnp.moveaxis(jnp.where(total_BKGQ > 0, total_BKGQ, 1.0), 3, 1)
    return (out / total_BQKG[..., None]).astype(v_BTKE.dtype).reshape(B, Q, H, E)


def _attend_cudnn(q_BQHE, k_BTKE, v_BTKE, mask, bias, softcap):
    if softcap is not None or v_BTKE.dtype == jnp.float32:
        raise ConfigError(
            "attention='cudnn' has neither soft-capping nor float32",
            where="TransformerSpec.attention",
            fix="Set TransformerSpec.dtype = 'bfloat16' and no softcap, or attention = 'xla'.",
        )
    B, Q, _, _ = q_BQHE.shape
    mask_B1QT = jnp.broadcast_to(mask[:, None], (B, 1, Q, mask.shape[-1]))
    out = jax.nn.dot_product_attention(
        q_BQHE,
        k_BTKE,
        v_BTKE,
        bias=None if bias is None else bias.astype(q_BQHE.dtype),
        mask=mask_B1QT,
        scale=1.0,
        implementation="cudnn",
    )
    return jnp.where(mask_B1QT[:, 0].any(-1)[:, :, None, None], out, 0)
