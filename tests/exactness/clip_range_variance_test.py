"""The variance by which BD3-LM's range of mask rates is chosen, in closed form."""

import math

import jax
import jax.numpy as jnp
import model_stubs as stubs
import numpy as np
import pytest

from diffusion_lm.core.rng import StreamKeys
from diffusion_lm.evaluation.clip_range import block_moments
from diffusion_lm.objectives.block_diffusion import BlockDiffusion, MaskRates

OBJECTIVE = BlockDiffusion(block_size=4, rates=MaskRates(stratified=False))


def uniform_model(length):
    """Every token has the same cross-entropy, log(V - 1) because MASK has no probability."""
    return stubs.table_model(np.zeros((length, stubs.VOCAB)))


@pytest.mark.parametrize(("low", "high"), [(0.3, 0.8), (0.5, 1.0), (1.0, 1.0)])
def test_the_variance_of_a_block_is_that_of_the_closed_form(low, high):
    """Of n tokens of cross-entropy c, K ~ Bin(n, r) masked at weight 1/r: variance c^2/n E[1/r - 1], mean c."""
    batch = stubs.make_batch([1] * 600, [8] * 600, 9)
    run = jax.jit(lambda *args: block_moments(OBJECTIVE, uniform_model(9), args[0], StreamKeys.create(0), *args[1:]))
    moments = run(batch, jnp.float32(low), jnp.float32(high))
    cost = math.log(stubs.VOCAB - 1)
    inverse = 1.0 if low == high else math.log(high / low) / (high - low)
    expected = cost**2 / 4 * (inverse - 1)
    # Blocks are counted from the target: two of four tokens in each row.
    assert moments.blocks == 1200
    np.testing.assert_allclose(moments.mean, cost, atol=5 * (max(expected, 1e-9) / 1200) ** 0.5 + 1e-5)
    # Where the variance is 0, the difference of two sums of squares in float32 is what remains.
    np.testing.assert_allclose(moments.variance, expected, rtol=0.25, atol=2e-5)


def test_short_blocks_count_their_own_tokens():
    """A last block of one token costs c/r or 0, not a quarter of it."""
    batch = stubs.make_batch([1], [5], 6)
    moments = block_moments(OBJECTIVE, uniform_model(6), batch, StreamKeys.create(0), 1.0, 1.0)
    assert moments.blocks == 2
    np.testing.assert_allclose(moments.mean, math.log(stubs.VOCAB - 1), rtol=1e-5)
