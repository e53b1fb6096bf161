"""Stratified draws of noise levels, and evaluation as the mean over several of them with frozen noise."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from diffusion_lm.core.checks import check_count
from diffusion_lm.core.rng import StreamKeys
from diffusion_lm.core.types import LossTerms

_GOLDEN = 2654435769
"""2^32 divided by the golden ratio: its multiples modulo 2^32 fill the circle evenly, however many there are."""


def shifted(uniform: jax.Array, offset: jax.Array | float) -> jax.Array:
    """Returns (uniform + offset) mod 1 in [0, 1): every stratum of a uniform draw is itself uniform (trap T13)."""
    total = uniform + offset
    return jnp.minimum(total - jnp.floor(total), 1.0 - 2.0**-24)


def spread(numbers: jax.Array) -> jax.Array:
    """Returns f32 offsets in [0, 1) for i32 numbers, such that any run of them is spread evenly over the interval.

    Consecutive numbers have distant offsets, so any prefix covers the interval and their count need not be known.
    """
    scrambled = numbers.astype(jnp.uint32) * jnp.uint32(_GOLDEN)
    return (scrambled >> 8).astype(jnp.float32) * jnp.float32(2.0**-24)


def bound_times(uniform: jax.Array, offset: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns times t = v^3 in (0, 1] for uniform v, and the factor 3 v^2 that their density asks for.

    Bounds weigh rare noise at small t by 1/t: with uniform times such an estimate has no finite variance, with these it
    has.
    """
    v = 1.0 - shifted(uniform, offset)
    return v**3, 3.0 * v * v


def check_draws(draws: int, where: str) -> None:
    """Raises `ConfigError` unless `draws` is a number of draws."""
    check_count(draws, where, "Use 1 or more; the error of a bound falls with the square root of their number.")


def mean_over_draws(keys: StreamKeys, draws: int, one: Callable[[jax.Array, StreamKeys], LossTerms]) -> LossTerms:
    """Returns the mean of `one(offset, keys)` over `draws` draws, one after another, with its `variance`.

    Sums and weights are those of one pass over the batch, whatever the number of draws: `loss_sum` estimates the loss
    of the batch in nats, and `weight` counts its tokens once. The variance comes from the spread of the batch's sums.

    The offsets 0, 1/draws, ... shift one uniform number per example, so that together they cover its strata; the keys
    differ, so that the noise does. The strata make the variance an overestimate.
    """

    def at(draw):
        return one(draw / draws, keys.replace(root=jax.random.fold_in(keys.root, draw)))

    per_draw = jax.lax.map(at, jnp.arange(draws))
    spread = jnp.var(per_draw.loss_sum, ddof=1) if draws > 1 else jnp.float32(jnp.nan)
    return jax.tree.map(lambda x: jnp.mean(x, axis=0), per_draw).replace(variance=spread / draws)
