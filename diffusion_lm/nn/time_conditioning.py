"""Time conditioning that is added to the embedded tokens: sinusoidal features and two layers.

The features and layers are those of DDPM (arXiv 2006.11239) and of the networks of SEDD and MDLM (2310.16834,
2406.07524). There the embedding scales and shifts every norm. Here it is added once, before the blocks, so a network
that is adapted to diffusion keeps its blocks, and with fresh parameters it computes what it computed before.
"""

import math

import jax
import jax.numpy as jnp

from diffusion_lm.core.axes import AxesTree
from diffusion_lm.core.types import Params
from diffusion_lm.nn.linear import linear
from diffusion_lm.nn.transformer import TransformerSpec

FEATURES = 256
_MAX_PERIOD = 1e4
"""Periods range from 2 pi to 2 pi times this, for a time in thousandths."""


def init_time_conditioning(spec: TransformerSpec, key: jax.Array) -> Params:
    """Returns fresh parameters, which add zero: a network that gets them later starts out unchanged."""
    D, dtype = spec.model_dim, jnp.dtype(spec.param_dtype)
    return {
        "up": FEATURES**-0.5 * jax.random.normal(key, (FEATURES, D), dtype),
        "up_bias": jnp.zeros(D, dtype),
        "down": jnp.zeros((D, D), dtype),
        "down_bias": jnp.zeros(D, dtype),
    }


def time_conditioning_axes() -> AxesTree:
    """Returns the logical axes of `init_time_conditioning`'s tree."""
    return {"up": ("norm", "mlp"), "up_bias": ("mlp",), "down": ("mlp", "embed"), "down_bias": ("norm",)}


def time_conditioning_flops(spec: TransformerSpec) -> float:
    """Returns forward matmul FLOPs per token."""
    return 2.0 * spec.model_dim * (FEATURES + spec.model_dim)


def run_time_conditioning(spec: TransformerSpec, params: Params, time_BT: jax.Array) -> jax.Array:
    """Returns [B,T,D] in the compute dtype, to be added at each slot; exactly zero where the time is 0.

    Args:
      spec: the network's shape.
      params: from `init_time_conditioning`.
      time_BT: f32[B,T] in [0, 1].
    """
    x = time_features(time_BT).astype(spec.compute_dtype)
    x = jax.nn.silu(linear(x, params["up"]) + params["up_bias"].astype(x.dtype))
    x = linear(x, params["down"]) + params["down_bias"].astype(x.dtype)
    # Clean slots get no addend at all, so conditioning is processed as by the network without this layer.
    return jnp.where((time_BT > 0)[..., None], x, 0)


def time_features(time_BT: jax.Array) -> jax.Array:
    """Returns f32[B,T,FEATURES]: cosines and sines of 1000 t at `FEATURES / 2` frequencies from 1 down to 1/10000."""
    # A geometric series, as in sinusoidal position encodings.
    frequencies = jnp.exp(-math.log(_MAX_PERIOD) * jnp.arange(FEATURES // 2) / (FEATURES // 2))
    angles = 1000.0 * time_BT[..., None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def time_input(spec: TransformerSpec, rate: jax.Array | None, is_noisy: jax.Array) -> jax.Array | None:
    """Returns f32[B,T], the `time` of a forward pass; None if the network does not read one.

    Args:
      spec: the network's shape.
      rate: f32 that broadcasts to [B,T], the noise rate 1 - alpha(t); None = no time conditioning in this pass.
      is_noisy: bool[B,T], the slots that may hold noise; the time of the others is 0.
    """
    if rate is None or not spec.time_conditioning:
        return None
    return jnp.where(is_noisy, rate, 0.0)
