"""Token statistics of the target windows alone: the conditioning never meets the vocabulary."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from diffusion_lm.core.types import TokenStats
from diffusion_lm.samplers.base import Model, Window

CHUNK = 32
"""Target slots a row that are put through the output projection together."""


def window_token_stats(
    model: Model,
    hidden: Any,
    window: Window,
    alignment: Any,
    *,
    keys_BT: jax.Array | None,
    score_BT: jax.Array,
    chunk: int = CHUNK,
    **draw,
) -> TokenStats:
    """Returns `model.token_stats` of the target tokens, skipping the projection elsewhere.

    With a large vocabulary and a long prompt the output projection costs more than the network, and all but the
    window's part of it is thrown away. The windows, which begin at another slot in every row, are moved side by side
    and worked off in chunks; chunks behind the longest window are skipped at run time, so no length has to be known
    beforehand.

    Args:
      model: the bound network.
      hidden: its states of all slots, [B,T,D].
      window: the target windows.
      alignment: which state predicts which token.
      keys_BT: a key for each token, where the temperature is above 0.
      score_BT: i32[B,T], the tokens whose log-probability is wanted.
      chunk: target slots per chunk; static.
      **draw: temperature, top_k, top_p and forbidden of `token_stats`.

    Returns:
      [B,T] statistics at the tokens they speak about; meaningless outside the window.
    """
    T = score_BT.shape[1]
    rows = jnp.arange(score_BT.shape[0])[:, None]
    chunk = min(chunk, T)

    def stats_of(number: jax.Array) -> TokenStats:
        tokens = jnp.minimum(window.starts[:, None] + number * chunk + jnp.arange(chunk), T - 1)
        states = jnp.take_along_axis(hidden.values_BTD, alignment.slot_of(tokens)[:, :, None], axis=1)
        keys = None if keys_BT is None else keys_BT[rows, tokens]
        return model.token_stats(hidden.replace(values_BTD=states), keys_BT=keys, score=score_BT[rows, tokens], **draw)

    nothing = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(stats_of, jax.ShapeDtypeStruct((), jnp.int32))
    )
    longest = jnp.max(window.sizes)

    def unless_empty(number: jax.Array) -> TokenStats:
        return jax.lax.cond(number * chunk < longest, functools.partial(stats_of, number), lambda: nothing)

    by_chunk = jax.lax.map(unless_empty, jnp.arange(-(-T // chunk)))
    in_window = jnp.maximum(jnp.arange(T) - window.starts[:, None], 0)

    def to_tokens(values: jax.Array) -> jax.Array:
        side_by_side = jnp.moveaxis(values, 0, 1).reshape(values.shape[1], -1)
        return jnp.take_along_axis(side_by_side, in_window, axis=1)

    return jax.tree.map(to_tokens, by_chunk)
