import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats

from diffusion_lm.core.rng import StreamKeys
from diffusion_lm.noise.process import Absorbing
from diffusion_lm.samplers.view import View

ROWS, SLOTS, TAIL = 32, 8192, 1e-3


def noise():
    """What rules add to their ranks, a quarter of a million draws of it."""
    ids = jnp.broadcast_to(jnp.arange(ROWS, dtype=jnp.uint32)[:, None], (ROWS, SLOTS))
    keys = StreamKeys.create(0).per_token("t", ids, jnp.broadcast_to(jnp.arange(SLOTS), (ROWS, SLOTS)))
    every, step = jnp.ones((ROWS, SLOTS), bool), jnp.zeros(ROWS, jnp.int32)
    canvas, log_prob = jnp.zeros((ROWS, SLOTS), jnp.int32), jnp.zeros((ROWS, SLOTS))
    return View(
        canvas, every, every, step, step + 1, log_prob, keys, process=Absorbing(), vocab_size=8, mask_id=4
    ).gumbel("order")


def follows_gumbel(draws):
    """The whole sample and its upper tail against exp(-exp(-g)), and no grid under the largest values."""
    tail = np.exp(-draws[draws > -np.log(TAIL)].astype(np.float64))  # exp(-g), about uniform in (0, TAIL)
    steps = tail[tail < 1000 * 2.0**-24] * 2.0**24  # a float32 uniform near 1 moves in steps of 2^-24
    assert len(steps) > 5
    return (
        scipy.stats.kstest(draws, "gumbel_r").pvalue > 1e-3
        and scipy.stats.kstest(tail / TAIL, "uniform").pvalue > 1e-3
        and np.abs(steps - np.round(steps)).max() > 0.1
    )


def test_T05_epsilon_in_gumbel():
    """The noise of ranks and routes has an upper tail; a float32 uniform, with an epsilon or without, has a grid."""
    assert follows_gumbel(np.asarray(jax.jit(noise)()).ravel())
    u = jax.random.uniform(jax.random.key(0), (ROWS * SLOTS,))
    for epsilon in (0.0, 1e-10):
        faulty = -jnp.log(epsilon - jnp.log(u + epsilon))
        assert not follows_gumbel(np.asarray(faulty))
