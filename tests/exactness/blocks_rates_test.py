"""Efficient-DLM's rates: later tokens of a block are masked more, as many in all, and each counts one in the mean."""

import jax
import jax.numpy as jnp
import model_stubs as stubs
import numpy as np
import pytest

from diffusion_lm.core.rng import StreamKeys
from diffusion_lm.objectives.block_diffusion import CHOICE_STREAM, BlockDiffusion, MaskRates
from diffusion_lm.objectives.block_layout import blocks_of, later_rates

MASK = 4


def later(rate, half_life=2.0, batch=None, size=8, first_block="target"):
    """f64 rates of the tokens of each block at one block rate, and the blocks."""
    batch = stubs.make_batch([1], [2 * size], 2 * size + 1) if batch is None else batch
    blocks = blocks_of(batch, size, first_block)
    rates = later_rates(jnp.full(batch.tokens.shape, rate, jnp.float32), batch.target_mask, blocks, half_life)
    return np.asarray(rates, np.float64), blocks


@pytest.mark.parametrize("rate", [1e-3, 0.1, 0.5, 0.9, 0.999])
def test_later_tokens_are_masked_more_and_as_many_in_all(rate):
    rates, _ = later(rate)
    for block in (rates[0, 1:9], rates[0, 9:]):
        np.testing.assert_allclose(block.mean(), rate, rtol=1e-4)
        # -log(1 - r_i) = c w_i, the weights of Efficient-DLM.
        hazard = -np.log1p(-block)
        np.testing.assert_allclose(hazard / hazard[0], np.exp2((1 - rate) * np.arange(8) / 2.0), rtol=5e-3)
    even, _ = later(rate, half_life=1e6)
    np.testing.assert_allclose(even[0, 1:], rate, rtol=1e-4)


def test_later_rates_are_those_of_an_ordered_draw():
    """Where little is masked: one of n tokens picked by its weight, which is the paper's draw of one token."""
    rates, _ = later(1e-4)
    weights = np.exp2((1 - 1e-4) * np.arange(8) / 2.0)
    np.testing.assert_allclose(rates[0, 1:9] / (8 * 1e-4), weights / weights.sum(), rtol=2e-3)


def test_later_rates_of_partial_blocks_and_at_the_end():
    batch = stubs.make_batch([3, 5], [9, 4], 12)
    rates, blocks = later(0.4, batch=batch, size=4, first_block="example")
    target = np.asarray(batch.target_mask)
    for row in range(2):
        for run in set(np.asarray(blocks.runs)[row][target[row]]):
            block = rates[row][target[row] & (np.asarray(blocks.runs)[row] == run)]
            np.testing.assert_allclose(block.mean(), 0.4, rtol=1e-4)
    # The place of a token is that in its block, the conditioning in front of it included.
    hazard = -np.log1p(-rates[0][4:8])
    np.testing.assert_allclose(hazard / hazard[0], np.exp2(0.6 * np.arange(4) / 2.0), rtol=1e-3)
    np.testing.assert_array_equal(later(1.0)[0], 1.0)


@pytest.mark.parametrize("complementary", [False, True])
def test_T11_weight_is_not_inclusion_probability(complementary):
    """Each token counts one in the mean; with the weight of the block's rate, as released, early ones count less."""
    batch = stubs.make_batch([1] * 64, [8] * 64, 9)
    objective = BlockDiffusion(8, rates=MaskRates(0.2, 0.8, half_life=0.25), complementary=complementary)
    blocks = blocks_of(batch, 8, "target")

    @jax.jit
    def counted(step):
        keys = StreamKeys.create(2, step)
        rate = objective.block_rates(keys, batch, blocks)
        own = later_rates(rate, batch.target_mask, blocks, 2.0)
        masked = (keys.token_uniform(CHOICE_STREAM, batch.example_ids, batch.positions) < own) & batch.target_mask
        return (masked / own).mean(axis=0), (masked / rate).mean(axis=0)

    right, wrong = (np.mean(x, axis=0)[1:] for x in zip(*map(counted, range(100)), strict=True))
    np.testing.assert_allclose(right, 1.0, atol=0.15)
    assert wrong[0] < 0.7 < 1.3 < wrong[-1], "the test sees the mistake"
    # And the objective's loss is that: a network that does not look has the mean of its plain cross-entropy.
    table = np.random.default_rng(0).normal(size=(9, stubs.VOCAB)).astype(np.float32)
    table[:, MASK] = -1e9
    one = stubs.rows_of(batch, range(8))
    log_p = np.asarray(jax.nn.log_softmax(table, axis=-1))
    plain = -log_p[np.arange(9)[None], np.asarray(one.tokens)][np.asarray(one.target_mask)].sum()

    @jax.jit
    def mean_loss(steps):
        def loss(step):
            return objective.loss(stubs.table_model(table), one, StreamKeys.create(1, step)).loss_sum

        return jax.lax.map(loss, steps).mean()

    np.testing.assert_allclose(mean_loss(jnp.arange(400)), plain, rtol=0.03)
