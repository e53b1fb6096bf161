"""The opening mask: causal at one end, open at the other, one matrix a step, however it is run; growing blocks."""

import dataclasses

import gin_objects
import jax.numpy as jnp
import model_stubs as stubs
import numpy as np
import pytest

from diffusion_lm.core.errors import ConfigError
from diffusion_lm.core.rng import StreamKeys
from diffusion_lm.nn.masks import Causal, Segments
from diffusion_lm.nn.named_masks import named_visibility
from diffusion_lm.objectives.annealing import BlockSizes, MaskAnnealing
from diffusion_lm.objectives.block_diffusion import BlockDiffusion

KEYS = StreamKeys.create(7, 11)
BATCH = stubs.make_batch([2, 5, 3, 4], [9, 3, 8, 5], 12)
MODEL = stubs.nano(**stubs.QUICK)
OBJECTIVE = gin_objects.build(gin_objects.GIN / "objectives" / "diffullama_annealed.gin", "OBJECTIVE")
HALF = MaskAnnealing(steps=24)
"""Half open in step 11."""


def dense(visibility, batch=BATCH):
    rows, length = batch.tokens.shape
    return np.broadcast_to(np.asarray(visibility.dense(None, length)), (rows, length, length))


def test_the_rate_is_the_papers():
    rate = MaskAnnealing().rate
    assert OBJECTIVE.annealing == MaskAnnealing(10_000)
    np.testing.assert_allclose([rate(jnp.int32(s)) for s in (0, 4_999, 9_999, 50_000)], [1e-4, 0.5, 1.0, 1.0])


@pytest.mark.parametrize("per_example", [False, True])
@pytest.mark.parametrize("name", ["full", "prefix", "prefix_blind", "blocks:3"])
def test_closed_is_causal_and_open_is_the_visibility(name, per_example):
    annealing = MaskAnnealing(per_example=per_example)
    # Keys in the padding read position 0; nothing sees them.
    real = np.asarray(BATCH.segment_ids) > 0
    np.testing.assert_array_equal(dense(annealing.opened(0.0, name, BATCH, KEYS)), dense(Causal()))
    opened = dense(annealing.opened(1.0, name, BATCH, KEYS))
    np.testing.assert_array_equal(opened[real], dense(named_visibility(name, BATCH.target_mask))[real])


def test_losses_at_both_ends_are_those_of_fixed_masks():
    """The attention of adaptation step 0 is that of the autoregressive model, bit for bit where nothing is drawn."""

    def loss(**fields):
        objective = dataclasses.replace(OBJECTIVE, **{"annealing": None, **fields})
        return stubs.loss_and_grad(objective, MODEL, BATCH, KEYS)[0].loss_sum

    causal, full = loss(visibility="causal"), loss(visibility="full")
    assert loss(annealing=MaskAnnealing(steps=10**9)) == causal
    assert loss(annealing=MaskAnnealing(steps=1)) == loss(annealing=MaskAnnealing(steps=12)) == full
    assert loss(annealing=HALF) not in (causal, full)


def test_a_share_r_of_the_future_is_open_drawn_anew_in_each_step():
    shares, seen = [], []
    above = np.triu(np.ones((12, 12), bool), 1)
    for step in range(200):
        matrix = dense(HALF.opened(0.3, "full", BATCH, StreamKeys.create(7, step)))[0]
        assert matrix[~above].all()
        shares.append(matrix[above].mean())
        seen.append(matrix)
    # 200 x 66 entries: the standard error is 0.004.
    assert abs(np.mean(shares) - 0.3) < 0.016
    assert abs(np.mean(seen, axis=0)[above] - 0.3).max() < 0.15, "and of every pair"


def test_one_matrix_for_all_or_one_for_each():
    shared = dense(HALF.visibility("full", BATCH, KEYS))
    filled = np.asarray(BATCH.segment_ids) > 0
    for row in range(1, 4):
        both = filled[0] & filled[row]
        np.testing.assert_array_equal(shared[row][both][:, both], shared[0][both][:, both])
    own = dense(dataclasses.replace(HALF, per_example=True).visibility("full", BATCH, KEYS))
    assert (own[0][:8, :8] != own[1][:8, :8]).any()
    again = BATCH.replace(example_ids=BATCH.example_ids.at[1].set(BATCH.example_ids[0]))
    own = dense(dataclasses.replace(HALF, per_example=True).visibility("full", again, KEYS))
    np.testing.assert_array_equal(own[0][:8, :8], own[1][:8, :8])


@pytest.mark.parametrize("per_example", [False, True])
def test_T27_T33_neither_padding_nor_packing_nor_microbatches_change_it(per_example):
    """The contract tests check the objective's file, whose mask is nearly closed; here it is half open."""
    annealing = dataclasses.replace(HALF, per_example=per_example)
    whole = dense(annealing.visibility("full", BATCH, KEYS))
    longer = stubs.pad_right(BATCH, 5)
    np.testing.assert_array_equal(dense(annealing.visibility("full", longer, KEYS), longer)[:, :12, :12], whole)
    part = stubs.rows_of(BATCH, [2, 1])
    np.testing.assert_array_equal(dense(annealing.visibility("full", part, KEYS), part), whole[[2, 1]])
    packed, at = stubs.packed(BATCH), 0
    inside = dense(annealing.visibility("full", packed, KEYS) & Segments(packed.segment_ids), packed)[0]
    for row, size in enumerate(np.asarray(BATCH.segment_ids).sum(axis=1)):
        np.testing.assert_array_equal(inside[at : at + size, at : at + size], whole[row][:size, :size])
        at += size
    assert inside.sum() < (np.asarray(packed.segment_ids)[0][:, None] == np.asarray(packed.segment_ids)[0]).sum()


def test_the_bound_is_that_of_the_open_mask():
    plain = dataclasses.replace(OBJECTIVE, annealing=None)
    expected = stubs.bound(plain, MODEL, BATCH, KEYS)
    np.testing.assert_array_equal(stubs.bound(OBJECTIVE, MODEL, BATCH, KEYS).loss_sum, expected.loss_sum)


def test_impossible_settings_are_errors():
    with pytest.raises(ConfigError, match="steps=0: must be an integer >= 1"):
        MaskAnnealing(steps=0)


@pytest.mark.thorough
def test_blocks_grow_and_shrink_with_the_steps():
    """In each phase the loss is that of a fixed block size, gradient for gradient; the bound is that of the last."""
    growth = BlockSizes(sizes=(1, 4, 64, 3), until=(2, 5, 9))
    np.testing.assert_array_equal(
        [growth.at(jnp.int32(s)) for s in (0, 1, 2, 4, 5, 8, 9, 99)], [1, 1, 4, 4, 64, 64, 3, 3]
    )
    grown = BlockDiffusion(3, growth=growth, first_block="example")
    for step, size in ((4, 4), (5, 64)):
        keys, fixed = StreamKeys.create(7, step), BlockDiffusion(size, first_block="example")
        terms, grads = stubs.loss_and_grad(grown, MODEL, BATCH, keys)
        expected, expected_grads = stubs.loss_and_grad(fixed, MODEL, BATCH, keys)
        np.testing.assert_allclose(terms.loss_sum, expected.loss_sum, rtol=1e-5)
        stubs.assert_close(grads, expected_grads, scaled=1e-4)
    plain = dataclasses.replace(grown, growth=None)
    np.testing.assert_array_equal(
        stubs.bound(grown, MODEL, BATCH, KEYS).loss_sum, stubs.bound(plain, MODEL, BATCH, KEYS).loss_sum
    )


@pytest.mark.parametrize(
    "fields",
    [{"sizes": (1, 2), "until": ()}, {"sizes": (0, 2), "until": (3,)}, {"sizes": (1, 2, 3), "until": (5, 5)}],
    ids=str,
)
def test_impossible_phases_are_errors(fields):
    with pytest.raises(ConfigError):
        BlockSizes(**fields)


def test_growth_must_end_at_the_block_size():
    with pytest.raises(ConfigError, match="growth"):
        BlockDiffusion(8, growth=BlockSizes((1, 4), (10,)))
