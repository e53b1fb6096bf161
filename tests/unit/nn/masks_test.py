import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_lm.core.errors import ConfigError
from diffusion_lm.nn import masks, named_masks

TARGET = jnp.array([[0, 0, 1, 1, 1], [0, 1, 1, 1, 1]], bool)


def test_named_visibilities_by_hand():
    expected = {
        "causal": ["10000", "11000", "11100", "11110", "11111"],
        "full": ["11111"] * 5,
        "prefix": ["11000", "11000", "11100", "11110", "11111"],
        "prefix_blind": ["11000", "11000", "11111", "11111", "11111"],
        "causal_prefix": ["10000", "11000", "11111", "11111", "11111"],
    }
    for name, rows in expected.items():
        dense = named_masks.named_visibility(name, TARGET).dense(None, 5)
        np.testing.assert_array_equal(dense[0].astype(int), [[int(c) for c in row] for row in rows], err_msg=name)


def test_unknown_name_suggests():
    with pytest.raises(ConfigError, match="did you mean causal"):
        named_masks.named_visibility("casual", TARGET)


@pytest.mark.parametrize(
    "visibility",
    [
        masks.Causal(),
        masks.Full(),
        masks.Causal() | masks.Conditioning(~TARGET),
        masks.Full() & masks.BlindConditioning(~TARGET),
        named_masks.named_visibility("causal_prefix", TARGET),
        masks.Block(2, jnp.array([2, 1])),
        masks.Block(2),
        named_masks.named_visibility("blocks:2", TARGET),
        named_masks.named_visibility("example_blocks:2", TARGET),
        masks.Causal() | (masks.Queries(TARGET) & masks.Conditioning(TARGET)),
        masks.ExplicitMask(jnp.arange(50).reshape(2, 5, 5) % 3 == 0),
        masks.ExplicitMask(jnp.arange(25).reshape(1, 5, 5) % 3 == 0),
        masks.Segments(jnp.array([[1, 1, 2, 2, 0], [1, 2, 2, 2, 2]])),
    ],
    ids=lambda v: type(v).__name__,
)
def test_query_slots_pick_rows_of_the_dense_mask(visibility):
    slots = jnp.array([[3, 0], [1, 4]])
    everything = jnp.broadcast_to(visibility.dense(None, 5), (2, 5, 5))
    picked = jnp.broadcast_to(visibility.dense(slots, 5), (2, 2, 5))
    np.testing.assert_array_equal(picked, jnp.take_along_axis(everything, slots[:, :, None], axis=1))


def test_blocks_begin_at_the_target_and_see_the_conditioning():
    dense = masks.Block(2, jnp.array([2, 1])).dense(None, 5).astype(int)
    np.testing.assert_array_equal(
        dense[0], [[1, 1, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    )


def test_blocks_begin_at_the_example():
    dense = named_masks.named_visibility("example_blocks:2", TARGET).dense(None, 5).astype(int)
    np.testing.assert_array_equal(
        dense[0], [[1, 1, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    )
    np.testing.assert_array_equal(dense[1], dense[0], "where the target begins does not matter")
    assert named_masks.named_blocks("example_blocks:12") == (12, "example")
    assert named_masks.named_blocks("blocks:12") == (12, "target")
    assert named_masks.named_blocks("full") is None


def test_slots_that_see_each_other():
    both = masks.Queries(TARGET) & masks.Conditioning(TARGET)
    target = np.asarray(TARGET)
    np.testing.assert_array_equal(both.dense(None, 5), target[:, :, None] & target[:, None, :])


def test_segments_hide_padding_from_itself():
    dense = masks.Segments(jnp.array([[1, 1, 2, 0]])).dense(None, 4).astype(int)
    np.testing.assert_array_equal(dense[0], [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]])


def test_expressions_are_pytrees():
    expression = masks.Causal() | masks.Conditioning(~TARGET) & masks.Block(4, jnp.array([2, 1]))
    dense = jax.jit(lambda v: v.dense(None, 5))(expression)
    np.testing.assert_array_equal(dense, expression.dense(None, 5))


def test_window_sees_what_is_near_on_both_sides():
    near = masks.SlidingWindow(3).dense(None, 5)
    slots = np.arange(5)
    np.testing.assert_array_equal(near[0], abs(slots[:, None] - slots) < 3)
    causal = (masks.Causal() & masks.SlidingWindow(3)).dense(None, 5)
    np.testing.assert_array_equal(causal.sum(axis=-1)[0], [1, 2, 3, 3, 3])
    # One query at slot 3 of a cache sees the same as that row of the whole.
    np.testing.assert_array_equal(masks.SlidingWindow(3).dense(jnp.asarray([[3]]), 5)[0, 0], near[0, 3])


def test_window_measures_inside_each_copy():
    near = masks.SlidingWindow(2, count=2).dense(None, 8)[0]
    for query in range(2):
        for key in range(2):
            block = near[4 * query : 4 * query + 4, 4 * key : 4 * key + 4]
            np.testing.assert_array_equal(block, near[:4, :4])
    np.testing.assert_array_equal(near[0, :4], [True, True, False, False])
