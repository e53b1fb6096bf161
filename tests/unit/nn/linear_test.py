"""The product of activations and kernels against `tensordot`, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_lm.nn.linear import linear, product


@pytest.mark.parametrize(
    ("x_shape", "kernel_shape", "inputs"),
    [((2, 3, 4), (4, 5), 1), ((2, 3, 4), (4, 2, 3), 1), ((2, 3, 2, 4), (2, 4, 5), 2), ((3, 4), (4, 5), 1)],
    ids=["matrix", "into heads", "out of heads", "no rows"],
)
def test_values_and_gradients_are_those_of_tensordot(x_shape, kernel_shape, inputs):
    x, kernel = (jax.random.normal(jax.random.key(n), shape) for n, shape in enumerate((x_shape, kernel_shape)))

    def derived(product):
        value, pull = jax.vjp(product, x, kernel)
        return value, *pull(jnp.cos(value))

    expected = derived(lambda x, kernel: jnp.tensordot(x, kernel, axes=inputs))
    for ours, theirs in zip(derived(lambda x, kernel: linear(x, kernel, inputs)), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_the_kernel_takes_the_dtype_of_the_activations_and_its_gradient_keeps_its_own():
    x, kernel = jnp.ones((2, 3), jnp.bfloat16), jnp.ones((3, 4), jnp.float32)
    value, pull = jax.vjp(linear, x, kernel)
    d_x, d_kernel = pull(value)
    assert (value.dtype, d_x.dtype, d_kernel.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)


def test_rematerialisation_sees_the_product_and_keeps_it():
    x, kernel = jnp.ones((2, 3)), jnp.ones((3, 4))

    def products(policy):
        kept = jax.checkpoint(lambda x, kernel: jnp.sin(linear(jnp.sin(x), kernel)).sum(), policy=policy)
        return str(jax.make_jaxpr(jax.grad(kept, argnums=(0, 1)))(x, kernel)).count("dot_general")

    assert products(jax.checkpoint_policies.dots_saveable) == 3, "one forward and two backward"
    assert products(jax.checkpoint_policies.nothing_saveable) == 4, "the first is made again"


def test_a_float32_product_is_an_einsum_with_its_gradients():
    x, y = (jax.random.normal(jax.random.key(n), shape) for n, shape in enumerate(((2, 3, 4), (2, 5, 4))))

    def derived(product):
        value, pull = jax.vjp(product, x, y)
        return value, *pull(jnp.cos(value))

    expected = derived(lambda x, y: jnp.einsum("bqe,bke->bqk", x, y))
    for ours, theirs in zip(derived(lambda x, y: product("bqe,bke->bqk", x, y)), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_a_bfloat16_product_is_float32_and_multiplies_no_float32_in_its_gradients():
    x, y = (jax.random.normal(jax.random.key(n), (3, 4), jnp.bfloat16) for n in range(2))
    value, pull = jax.vjp(lambda x, y: product("qe,ke->qk", x, y), x, y)
    assert value.dtype == jnp.float32
    np.testing.assert_array_equal(value, jnp.einsum("qe,ke->qk", x.astype(jnp.float32), y.astype(jnp.float32)))
    g = jnp.sin(value)
    d_x, d_y = pull(g)
    rounded = g.astype(jnp.bfloat16).astype(jnp.float32)
    np.testing.assert_allclose(d_x.astype(jnp.float32), rounded @ y.astype(jnp.float32), rtol=2**-7)
    np.testing.assert_allclose(d_y.astype(jnp.float32), rounded.T @ x.astype(jnp.float32), rtol=2**-7)
    program = jax.make_jaxpr(jax.grad(lambda x: jnp.sin(product("qe,ke->qk", x, y)).sum()))(x)
    products = [equation for equation in program.eqns if equation.primitive.name == "dot_general"]
    assert {variable.aval.dtype for equation in products for variable in equation.invars} == {jnp.dtype("bfloat16")}
