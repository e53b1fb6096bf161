"""Block decoding sees what block training showed: states agree, and the decode is that of a slow loop over training."""

import dataclasses

import gin_objects
import jax
import jax.numpy as jnp
import model_stubs as stubs
import numpy as np
import pytest
from sampler_stubs import masked, without_ends

from diffusion_lm.core.alignment import SamePosition, Shifted
from diffusion_lm.core.errors import ConfigError
from diffusion_lm.core.rng import StreamKeys
from diffusion_lm.nn.masks import two_streams
from diffusion_lm.nn.named_masks import named_visibility
from diffusion_lm.objectives.block_diffusion import BlockDiffusion
from diffusion_lm.objectives.block_layout import blocks_of
from diffusion_lm.samplers.blocks import RowBlocks
from diffusion_lm.samplers.decoding import Decoding
from diffusion_lm.samplers.denoiser import Denoiser
from diffusion_lm.samplers.routing import Routed
from diffusion_lm.samplers.unmasking import Ancestral, Threshold

SIZE, MASK = 3, 4
BATCH = stubs.make_batch([2, 4, 3], [9, 6, 8], 12)
KEYS = StreamKeys.create(5)
MODEL = stubs.nano(**stubs.QUICK)
NAMES = {"target": f"blocks:{SIZE}", "example": f"example_blocks:{SIZE}"}


@pytest.mark.parametrize("causal_clean", [False, True])
@pytest.mark.parametrize("first_block", ["target", "example"])
@pytest.mark.parametrize("block", [0, 1, 2])
def test_a_canvas_under_block_visibility_equals_the_noisy_copy_of_training(block, first_block, causal_clean):
    ids, target = blocks_of(BATCH, SIZE, first_block).ids, BATCH.target_mask
    noisy = jnp.where((ids == block) & target, MASK, BATCH.tokens)
    doubled = MODEL(
        jnp.concatenate([noisy, BATCH.tokens], axis=1),
        visibility=two_streams(ids, causal_clean=causal_clean),
        positions=jnp.concatenate([BATCH.positions] * 2, axis=1),
        segment_ids=jnp.concatenate([BATCH.segment_ids] * 2, axis=1),
    ).values_BTD
    here = (ids == block) & (BATCH.segment_ids > 0)
    active = here & target
    denoiser = Denoiser.of(
        MODEL,
        BATCH,
        None,
        candidates=1,
        visibility=NAMES[first_block],
        alignment=SamePosition(),
        decoding=Decoding(),
        guidance=0.0,
        causal_context=causal_clean,
        feeds_back=False,
    )
    decoding = denoiser.run(jnp.where((ids >= block) & target, MASK, BATCH.tokens), active).conditional
    rows = np.asarray(jnp.any(active, axis=1))
    assert rows.any()
    length = BATCH.tokens.shape[1]
    noisy_states, clean_states = np.asarray(doubled[:, :length]), np.asarray(doubled[:, length:])
    decoded, here, ids = np.asarray(decoding.values_BTD), np.asarray(here)[rows], np.asarray(ids)[rows]
    np.testing.assert_allclose(decoded[rows][here], noisy_states[rows][here], atol=2e-5)
    # What shifted networks predict the first token of a block from: the clean copy's state before it.
    np.testing.assert_allclose(decoded[rows][ids < block], clean_states[rows][ids < block], atol=2e-5)


@pytest.mark.parametrize("block", [0, 1, 2])
def test_a_canvas_under_causal_visibility_equals_the_causal_copies_of_training(block):
    """I-DLM: both copies causal is one causal row, whose draft is a block of MASK."""
    ids = blocks_of(BATCH, SIZE, "target").ids
    doubled = MODEL(
        jnp.concatenate([jnp.where(BATCH.target_mask, MASK, BATCH.tokens), BATCH.tokens], axis=1),
        visibility=two_streams(ids, causal_noisy=True, causal_clean=True),
        positions=jnp.concatenate([BATCH.positions] * 2, axis=1),
        segment_ids=jnp.concatenate([BATCH.segment_ids] * 2, axis=1),
    ).values_BTD[:, : BATCH.tokens.shape[1]]
    decoding = MODEL(
        jnp.where((ids >= block) & BATCH.target_mask, MASK, BATCH.tokens),
        visibility=named_visibility("causal", BATCH.target_mask),
        positions=BATCH.positions,
        segment_ids=BATCH.segment_ids,
    ).values_BTD
    here = np.asarray((ids == block) & BATCH.target_mask)
    np.testing.assert_allclose(np.asarray(decoding)[here], np.asarray(doubled)[here], atol=2e-5)


def test_blocks_of_the_sampler_are_those_of_the_training():
    for first_block in ("target", "example"):
        blocks = RowBlocks.of(BATCH.target_mask, SIZE, None, NAMES[first_block])
        ids = np.asarray(blocks_of(BATCH, SIZE, first_block).ids)
        for row, number, mask in zip(ids, np.asarray(blocks.number), np.asarray(BATCH.target_mask), strict=True):
            np.testing.assert_array_equal(number[mask], row[mask] - row[mask].min())
            assert (number[~mask] == -1).all()
    np.testing.assert_array_equal(blocks.counts, [4, 3, 3])
    np.testing.assert_array_equal(blocks.steps_in(jnp.array([0, 0, 0])), [1, 2, 3])
    # A window with a hole: the block in the hole has no slot and is none.
    holed = jnp.array([[0, 0, 1, 1, 0, 0, 0, 0, 1, 1]], bool)
    number = RowBlocks.of(holed, 3, None, "example_blocks:3").number[0]
    np.testing.assert_array_equal(number, [-1, -1, 0, 1, -1, -1, -1, -1, 2, 3])


PAIRS = {
    "same_position": {"alignment": SamePosition()},
    "same_position_causal_clean": {"alignment": SamePosition(), "causal_clean": True},
    "clean_context": {"alignment": Shifted()},
    "seed": {"alignment": Shifted(), "block_start": "seed"},
    "seed_causal_clean": {"alignment": Shifted(), "block_start": "seed", "causal_clean": True},
}


def slow_decode(objective, run, row, sub_block, threshold):
    """Tokens and passes of one row: the training pass over [noisy ; clean], looked at block by block."""
    blocks = blocks_of(row, objective.block_size, objective.first_block)
    ids, starts = np.asarray(blocks.ids)[0], np.asarray(blocks.is_start)[0]
    target, tokens = np.asarray(row.target_mask)[0], np.array(row.tokens)[0]
    tokens[target], passes = MASK, 0
    shifted, length = objective.alignment == Shifted(), len(tokens)
    rank = np.arange(length) if objective.first_block == "example" else np.arange(length) - target.argmax()
    for block in sorted(set(ids[target])):
        inside = target & (ids == block)
        for sub in sorted(set(rank[inside] // sub_block)):
            while (open_slots := np.flatnonzero(inside & (rank // sub_block == sub) & (tokens == MASK))).size:
                probs = np.asarray(run(jnp.asarray(np.concatenate([tokens, tokens])[None]), row, blocks.ids))[0]
                if objective.block_start == "seed" and starts[open_slots[0]]:
                    open_slots = open_slots[:1]
                sources = [slot if not shifted else slot - 1 + (length if starts[slot] else 0) for slot in open_slots]
                best = probs[sources].max(axis=-1)
                chosen = (best >= threshold) | (np.arange(len(best)) == best.argmax())
                tokens[open_slots[chosen]] = probs[sources].argmax(axis=-1)[chosen]
                passes += 1
    return tokens, passes


@pytest.mark.parametrize("first_block", ["target", pytest.param("example", marks=pytest.mark.thorough)])
@pytest.mark.parametrize("pair", PAIRS)
def test_decoding_is_a_slow_loop_over_the_training_pass(pair, first_block):
    """Ragged rows, prompts that end inside a block, sub-blocks, seeds; every row as if it were alone."""
    size, sub_block, threshold = 4, 2, 0.15
    objective = BlockDiffusion(size, first_block=first_block, **PAIRS[pair])
    prompt = without_ends(stubs.as_prompt(stubs.make_batch([2, 5, 3, 1], [10, 6, 9, 4], 12)))
    sampler = masked(
        Threshold(threshold),
        alignment=objective.alignment,
        block=sub_block,
        seeds=objective.block_start == "seed",
        causal_context=objective.causal_clean,
        temperature=0.0,
        visibility=NAMES[first_block].replace(str(SIZE), str(size)),
    )
    decoded = stubs.generate(sampler, MODEL, prompt, KEYS)

    @jax.jit
    def run(tokens, row, ids):
        hidden = MODEL(
            tokens,
            visibility=two_streams(ids, causal_clean=objective.causal_clean),
            positions=jnp.tile(row.positions, (1, 2)),
            segment_ids=jnp.tile(row.segment_ids, (1, 2)),
        )
        return jax.nn.softmax(MODEL.logits(hidden).at[..., MASK].set(-jnp.inf), axis=-1)

    longest = 0
    for number in range(4):
        row = stubs.rows_of(prompt, [number])
        tokens, passes = slow_decode(objective, run, row, sub_block, threshold)
        target = np.asarray(row.target_mask)[0]
        np.testing.assert_array_equal(np.asarray(decoded.tokens)[number][target], tokens[target])
        assert passes < target.sum() or number == 3, "the threshold lets several tokens through at once"
        longest = max(longest, passes)
    np.testing.assert_array_equal(decoded.forward_passes, longest)
    if first_block == "example":
        other = dataclasses.replace(sampler, visibility=f"blocks:{size}")
        assert (stubs.generate(other, MODEL, prompt, KEYS).tokens != decoded.tokens).any(), "the count matters"


@pytest.mark.parametrize("name", ["bd3lm", "sdar", "fast_dllm_v2", "nemotron"])
def test_files_of_one_method_agree(name):
    objective = gin_objects.build(gin_objects.GIN / "objectives" / f"{name}.gin", "OBJECTIVE")
    sampler = gin_objects.build(gin_objects.GIN / "samplers" / f"{name}.gin", "SAMPLER")
    assert objective.first_block == "example"
    assert sampler.visibility == f"example_blocks:{objective.block_size}"
    assert objective.block_size % sampler.blocks.size == 0
    assert (objective.alignment, objective.causal_clean) == (sampler.alignment, sampler.blocks.causal_context)
    assert (objective.block_start == "seed") == sampler.blocks.seeds


@pytest.mark.parametrize("name", ["blocks:0", "blocks:-1", "blocks:", "blocks", "blocks:4x", "example_blocks:0"])
def test_block_visibility_needs_a_size(name):
    with pytest.raises(ConfigError, match="blocks:N"):
        named_visibility(name, BATCH.target_mask)


@pytest.mark.parametrize(
    "fields",
    [
        {"seeds": True},
        {"causal_context": True},
        {"visibility": "blocks:4", "seeds": True, "unmask": Routed()},
    ],
    ids=str,
)
def test_orders_that_do_not_fit_the_network_are_errors(fields):
    with pytest.raises(ConfigError):
        masked(**({"unmask": Ancestral(), "block": 4} | fields))
