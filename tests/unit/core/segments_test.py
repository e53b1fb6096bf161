import jax.numpy as jnp
import numpy as np

from diffusion_lm.core.segments import segment_max, segment_rank, segment_sum

SEGMENTS = jnp.array([[1, 1, 1, 2, 2, 0], [1, 2, 2, 2, 3, 3], [0, 0, 0, 0, 0, 0]])
VALUES = jnp.asarray(np.random.default_rng(0).permutation(18).reshape(3, 6), jnp.float32)


def by_hand(reduce):
    out = np.zeros((3, 6))
    for row, slot in np.ndindex(3, 6):
        same = np.asarray(SEGMENTS[row] == SEGMENTS[row, slot])
        out[row, slot] = reduce(np.asarray(VALUES[row])[same], float(VALUES[row, slot]))
    return out


def test_sums_maxima_and_ranks_stay_inside_their_segment():
    np.testing.assert_array_equal(segment_sum(VALUES, SEGMENTS), by_hand(lambda values, own: values.sum()))
    np.testing.assert_array_equal(segment_max(VALUES, SEGMENTS), by_hand(lambda values, own: values.max()))
    np.testing.assert_array_equal(segment_rank(VALUES, SEGMENTS), by_hand(lambda values, own: (values < own).sum()))
