"""Block decoding sees what block training showed: the two passes agree on every block."""

import jax.numpy as jnp
import model_stubs as stubs
import numpy as np
import pytest

from diffusion_lm.core.errors import ConfigError
from diffusion_lm.nn.masks import named_visibility, two_streams
from diffusion_lm.objectives.block_layout import blocks_of

SIZE, MASK = 3, 4
BATCH = stubs.make_batch([2, 4, 3], [9, 6, 8], 12)


@pytest.mark.parametrize("block", [0, 1, 2])
def test_a_canvas_under_block_visibility_equals_the_noisy_copy_of_training(block):
    model, ids = stubs.nano(), blocks_of(BATCH, SIZE, "target").ids
    noisy = jnp.where((ids == block) & BATCH.target_mask, MASK, BATCH.tokens)
    doubled = model(
        jnp.concatenate([noisy, BATCH.tokens], axis=1),
        visibility=two_streams(ids),
        positions=jnp.concatenate([BATCH.positions] * 2, axis=1),
        segment_ids=jnp.concatenate([BATCH.segment_ids] * 2, axis=1),
    ).values_BTD[:, : BATCH.tokens.shape[1]]
    canvas = jnp.where((ids >= block) & BATCH.target_mask, MASK, BATCH.tokens)
    decoding = model(
        canvas,
        visibility=named_visibility(f"blocks:{SIZE}", BATCH.target_mask),
        positions=BATCH.positions,
        segment_ids=BATCH.segment_ids,
    ).values_BTD
    here = np.asarray((ids == block) & BATCH.target_mask)
    assert here.any()
    np.testing.assert_allclose(np.asarray(decoding)[here], np.asarray(doubled)[here], atol=2e-5)


@pytest.mark.parametrize("name", ["blocks:0", "blocks:-1", "blocks:", "blocks", "blocks:4x"])
def test_block_visibility_needs_a_size(name):
    with pytest.raises(ConfigError, match="blocks:N"):
        named_visibility(name, BATCH.target_mask)
