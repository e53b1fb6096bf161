import jax
import jax.numpy as jnp
import numpy as np

from diffusion_lm.nn.embeddings import relative_bias, relative_buckets, rotary
from diffusion_lm.nn.rope import LinearRope, Llama3Rope, YarnRope, base_frequencies


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


def test_linear_scaling_divides_positions():
    x = jax.random.normal(jax.random.key(0), (1, 3, 2, 8))
    positions = jnp.asarray([[3, 6, 12]])
    np.testing.assert_allclose(
        rotary(x, positions, 100.0, LinearRope(3.0)), rotary(x, positions // 3, 100.0), rtol=1e-5, atol=1e-6
    )


def test_llama3_and_yarn_stretch_what_turns_slowly():
    plain = base_frequencies(64, 10_000.0)
    for scaling in (Llama3Rope(8.0, original_max_positions=2048), YarnRope(8.0, original_max_positions=2048)):
        ratio = plain / scaling.frequencies(64, 10_000.0)
        assert ratio[0] == 1
        np.testing.assert_allclose(ratio[-1], 8.0, rtol=1e-6)
        assert (np.diff(ratio) >= -1e-6).all()
        assert ((ratio > 1.01) & (ratio < 7.9)).sum() >= 3
    # In LLaMA 3, wavelengths up to a quarter of the original stream are left alone and those beyond it stretched whole.
    wavelengths = 2 * np.pi / plain
    ratio = plain / Llama3Rope(8.0, original_max_positions=2048).frequencies(64, 10_000.0)
    np.testing.assert_allclose(ratio[wavelengths < 512], 1.0, rtol=1e-6)
    np.testing.assert_allclose(ratio[wavelengths > 2048], 8.0, rtol=1e-6)


def test_yarn_sharpens_the_scores():
    x = jnp.ones((1, 1, 1, 8))
    length = jnp.linalg.norm(rotary(x, jnp.zeros((1, 1), jnp.int32), 100.0, YarnRope(4.0, original_max_positions=16)))
    np.testing.assert_allclose(length, 8**0.5 * (0.1 * np.log(4.0) + 1), rtol=1e-6)
