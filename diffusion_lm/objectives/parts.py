"""Two choices of `Denoising` as functions: the noisy canvases of a batch, and what a sum is divided by."""

from typing import Any

import jax
import jax.numpy as jnp

from diffusion_lm.core.errors import near_names, require
from diffusion_lm.core.rng import StreamKeys
from diffusion_lm.core.segments import segment_sum
from diffusion_lm.core.types import Batch
from diffusion_lm.noise.corruption import Corrupted

VIEWS = ("one", "nested", "complementary")
NORMALISERS = ("scored", "replaced", "example")


def check_name(value: str, known: tuple[str, ...], where: str) -> None:
    """Raises `ConfigError` unless `value` is one of `known`."""
    require(
        value in known,
        f"there is no {value!r}{near_names(str(value), known)}",
        where=where,
        fix=f"Choose one of {', '.join(known)}.",
    )


def noisy_views(
    views: str,
    t_BT: jax.Array,
    batch: Batch,
    keys: StreamKeys,
    vocab_size: int,
    *,
    corruption: Any,
    schedule: Any,
    time: Any,
) -> list[tuple[jax.Array, Corrupted]]:
    """Returns the noisy canvases of a batch, each with its times f32[B,T].

    Args:
      views: "one" = the canvas at `t_BT`. "nested" = also one at times of its own, where the tokens chosen at the lower
        rate are among those chosen at the higher one; where the times are equal the choices are independent (RDM, arXiv
        2302.05737). "complementary" = also one in which exactly the other target tokens are noise.
      t_BT: f32[B,T], times of the first canvas.
      batch: the clean batch.
      keys: root of all draws.
      vocab_size: the model's.
      corruption: what a chosen token turns into.
      schedule: how a time maps to a rate.
      time: sampler of the times of a nested view.
    """

    def at(keys: StreamKeys, rate_BT: jax.Array) -> Corrupted:
        return corruption.corrupt(keys, batch, rate_BT, vocab_size=vocab_size)

    first = at(keys, 1.0 - schedule.alpha(t_BT))
    if views == "nested":
        # The same draws at another rate choose a subset or a superset. Equal times would choose the same tokens.
        apart = keys.replace(root=jax.random.fold_in(keys.root, 1))
        other_BT = time.draw(apart, batch.example_ids, strata=batch.strata)
        rate_BT = 1.0 - schedule.alpha(other_BT)
        again, nested = at(apart, rate_BT), at(keys, rate_BT)
        second = jax.tree.map(lambda a, n: jnp.where(other_BT == t_BT, a, n), again, nested)
        return [(t_BT, first), (other_BT, second)]
    if views == "complementary":
        noise = at(keys, jnp.ones_like(t_BT))
        rest = noise.replaced & ~first.replaced
        return [(t_BT, first), (1.0 - t_BT, Corrupted(jnp.where(rest, noise.tokens, batch.tokens), rest))]
    return [(t_BT, first)]


def normalised(
    normaliser: str, weights_BT: jax.Array, replaced_BT: jax.Array, batch: Batch
) -> tuple[jax.Array, jax.Array]:
    """Returns the weights under which losses are summed, f32[B,T], and what that sum is to be divided by, f32[].

    "scored" divides by the scored target tokens, "replaced" by those of them that are noise, "example" takes the mean
    over each example's scored tokens (of its packed example, not of its padded row; trap T09) and then over examples.
    """
    counts = batch.loss_weights
    if normaliser == "replaced":
        counts = jnp.where(replaced_BT, counts, 0.0)
    elif normaliser == "example":
        tokens = segment_sum((counts != 0).astype(jnp.float32), batch.segment_ids)
        share = 1.0 / jnp.maximum(tokens, 1.0)
        weights_BT, counts = weights_BT * share, counts * share
    return weights_BT, jnp.sum(counts, dtype=jnp.float32)
