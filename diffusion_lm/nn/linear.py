"""Matrix products with hand-written gradients, for speed on CPUs and GPUs."""

import functools

import jax
import jax.numpy as jnp


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def linear(x: jax.Array, kernel: jax.Array, inputs: int = 1) -> jax.Array:
    """Returns the sum over the last axes of `x` and the first of `kernel`, in the dtype of `x`.

    JAX derives (g^T x)^T as the gradient of the kernel, and XLA's CPU backend then materialises g^T together with the
    operations that produce g: a feed-forward layer takes a third longer. Here the gradient is x^T g.

    Args:
      x: [...,inputs].
      kernel: [inputs,outputs], of any number of axes each.
      inputs: number of axes that are summed over.
    """
    return _forward(x, kernel, inputs)[0]


def _forward(x, kernel, inputs):
    # The product itself and not a call of `linear`: a rematerialisation policy could not look inside that.
    return jnp.tensordot(x, kernel.astype(x.dtype), axes=inputs), (x, kernel)


def _backward(inputs, residuals, g):
    x, kernel = residuals
    outputs = kernel.ndim - inputs
    last = [tuple(range(array.ndim - outputs, array.ndim)) for array in (g, kernel)]
    rows = tuple(range(x.ndim - inputs))
    d_x = jnp.tensordot(g, kernel.astype(g.dtype), axes=last)
    d_kernel = jnp.tensordot(x, g, axes=(rows, rows))
    return d_x, d_kernel.astype(kernel.dtype)


linear.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def product(subscripts: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """Returns an einsum in float32 whose gradient is rounded to the dtype of its operands; for scores and logits.

    Otherwise the gradient would enter two more products in float32. TPUs round it there anyway. GPUs would store a
    float32 array of the size of all scores, and multiply at a fraction of their bfloat16 rate.

    Args:
      subscripts: as `jnp.einsum` takes them.
      x: in the compute dtype.
      y: in the same dtype.
    """
    return _product_forward(subscripts, x, y)[0]


def _product_forward(subscripts, x, y):
    return jnp.einsum(subscripts, x, y, preferred_element_type=jnp.float32), (x, y)


def _product_backward(subscripts, residuals, g):
    x, y = residuals
    g = g.astype(x.dtype)
    (d_x,) = jax.linear_transpose(lambda x: jnp.einsum(subscripts, x, y), x)(g)
    (d_y,) = jax.linear_transpose(lambda y: jnp.einsum(subscripts, x, y), y)(g)
    return d_x, d_y


product.defvjp(_product_forward, _product_backward)
