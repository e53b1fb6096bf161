"""When a canvas that is resampled at random may be called finished before the last step."""

import jax
import jax.numpy as jnp

from diffusion_lm.core.types import TokenStats


def settled(
    canvas: jax.Array,
    proposed: jax.Array,
    stats: TokenStats,
    target_mask: jax.Array,
    *,
    temperature: float,
    steps_left: jax.Array,
    tolerance: float,
) -> jax.Array:
    """Says which rows have reached a fixed point.

    A canvas that a step left unchanged is no proof under fresh noise: another draw may still change it. But the network
    is deterministic, so while the canvas stands the distributions stand too, and the chance of any later change can be
    bounded. A token of probability p (temperature 1) is redrawn, at temperature tau <= 1, with probability at least
    p^(1/tau) / (p^(1/tau) + (1-p)^(1/tau)); top-k and top-p only raise it. A row is settled when the step left it
    unchanged and the expected number of changes in all remaining steps is at most `tolerance`, so the law of the result
    is within `tolerance` (total variation) of running every step. At temperature 0 the bound is zero: exact.

    Args:
      canvas: i32[B,T], input of the step.
      proposed: i32[B,T], its output.
      stats: statistics of the step at the tokens they speak about.
      target_mask: bool[B,T].
      temperature: static. Above 1 the bound does not hold and no row is ever settled.
      steps_left: i32[], the steps that would follow.
      tolerance: largest expected number of changes that is given up.

    Returns:
      bool[B], of each row alone, so neighbours do not matter.
    """
    unchanged = jnp.all((canvas == proposed) | ~target_mask, axis=1)
    if temperature == 0:
        return unchanged
    if temperature > 1:
        return jnp.zeros_like(unchanged)
    log_p = jnp.minimum(stats.sample_log_prob, 0.0)
    log_odds = log_p - jnp.log(-jnp.expm1(log_p))
    change = jax.nn.sigmoid(-log_odds / temperature)
    expected_changes = steps_left * jnp.sum(jnp.where(target_mask, change, 0.0), axis=1)
    return unchanged & (expected_changes <= tolerance)
