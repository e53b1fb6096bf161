"""The time as an addend to the embedded tokens: sinusoidal features, two layers, zero when fresh and on clean slots.

The features and layers are those with which DDPM (arXiv 2006.11239) and the networks of SEDD and MDLM (2310.16834,
2406.07524) embed a time. There the embedding scales and shifts every norm; here it is added once, in front of the
blocks, so that a network which is adapted to diffusion keeps its blocks and starts out as itself.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from diffusion_lm.core.types import Params
from diffusion_lm.nn.linear import linear
from diffusion_lm.nn.transformer import TransformerSpec

FEATURES = 256
_SLOWEST = 1e4
"""Periods go from 2 pi to this many times that, of a time counted in thousandths."""


def init_time_conditioning(spec: TransformerSpec, key: jax.Array) -> Params:
    """Returns the parameters; fresh, they add nothing: a network that gets them later starts out as what it was."""
    D, dtype = spec.model_dim, jnp.dtype(spec.param_dtype)
    return {
        "up": FEATURES**-0.5 * jax.random.normal(key, (FEATURES, D), dtype),
        "up_bias": jnp.zeros(D, dtype),
        "down": jnp.zeros((D, D), dtype),
        "down_bias": jnp.zeros(D, dtype),
    }


def time_conditioning_axes() -> Any:
    """Returns the logical axes of `init_time_conditioning`'s tree."""
    return {"up": ("norm", "mlp"), "up_bias": ("mlp",), "down": ("mlp", "embed"), "down_bias": ("norm",)}


def time_conditioning_flops(spec: TransformerSpec) -> float:
    """Returns forward matmul FLOPs per token."""
    return 2.0 * spec.model_dim * (FEATURES + spec.model_dim)


def run_time_conditioning(spec: TransformerSpec, params: Params, time_BT: jax.Array) -> jax.Array:
    """Returns [B,T,D] in the compute dtype, what is added at each slot; exactly nothing where the time is 0.

    Args:
      spec: the network's shape.
      params: from `init_time_conditioning`.
      time_BT: f32[B,T] in [0, 1].
    """
    x = time_features(time_BT).astype(spec.compute_dtype)
    x = jax.nn.silu(linear(x, params["up"]) + params["up_bias"].astype(x.dtype))
    x = linear(x, params["down"]) + params["down_bias"].astype(x.dtype)
    return jnp.where((time_BT > 0)[..., None], x, 0)


def time_features(time_BT: jax.Array) -> jax.Array:
    """Returns f32[B,T,FEATURES], cosines and sines of 1000 t at `FEATURES / 2` frequencies from 1 down to 1/10000."""
    frequencies = jnp.exp(-math.log(_SLOWEST) * jnp.arange(FEATURES // 2) / (FEATURES // 2))
    angles = 1000.0 * time_BT[..., None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def told_time(spec: TransformerSpec, rate: jax.Array | None, noisy: jax.Array) -> dict[str, jax.Array]:
    """Returns the argument `time` of a forward pass, where the network reads one; nothing where it does not.

    Args:
      spec: the network's shape.
      rate: f32 that broadcasts to [B,T], the rate of noise; None tells nothing.
      noisy: bool[B,T], the slots that noise may have touched; the others are clean.
    """
    if rate is None or not spec.time_conditioning:
        return {}
    return {"time": jnp.where(noisy, rate, 0.0)}
