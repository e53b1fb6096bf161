import jax
import jax.numpy as jnp
import numpy as np

from diffusion_lm.nn.embeddings import relative_bias, relative_buckets, rotary


def test_buckets_follow_t5():
    """Values from T5's own function: bidirectional 32 buckets, 128 the largest distance."""
    distance = jnp.array([-1000, -128, -90, -8, -7, -1, 0, 1, 7, 8, 90, 128])
    buckets = relative_buckets(distance, bidirectional=True, buckets=32, max_distance=128)
    assert buckets.tolist() == [15, 15, 14, 8, 7, 1, 0, 17, 23, 24, 30, 31]
    past_only = relative_buckets(distance, bidirectional=False, buckets=32, max_distance=128)
    assert past_only.tolist() == [31, 31, 29, 8, 7, 1, 0, 0, 0, 0, 0, 0]


def test_toeplitz_bias_equals_gathered_bias_and_gradient():
    table = jax.random.normal(jax.random.key(0), (8, 3))
    slots = jnp.arange(11)[None]

    def biases(table, slots):
        return relative_bias(table, slots, 11, bidirectional=True, max_distance=10)

    np.testing.assert_allclose(biases(table, None), biases(table, slots), rtol=1e-6)
    weights = jax.random.normal(jax.random.key(1), (1, 3, 11, 11))
    gradients = [jax.grad(lambda table, s=s: jnp.sum(biases(table, s) * weights))(table) for s in (None, slots)]
    np.testing.assert_allclose(*gradients, rtol=1e-5, atol=1e-5)


def test_rotary_depends_on_relative_positions_only():
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 4, 2, 8))
    positions = jnp.arange(4)[None]

    def scores(shift):
        args = positions + shift, 100.0
        return jnp.einsum("bqhe,bthe->bhqt", rotary(q, *args), rotary(k, *args))

    np.testing.assert_allclose(scores(0), scores(7), atol=1e-4)
    np.testing.assert_allclose(jnp.linalg.norm(rotary(q, positions, 100.0)), jnp.linalg.norm(q), rtol=1e-5)
    assert jnp.abs(scores(0) - jnp.einsum("bqhe,bthe->bhqt", q, k)).max() > 0.1
