"""The gradient of every objective is the derivative of its loss, through losses with their own backward pass."""

import dataclasses

import gin_objects
import jax
import jax.numpy as jnp
import model_stubs as stubs
import numpy as np
import pytest

from diffusion_lm.core.rng import StreamKeys

pytestmark = pytest.mark.thorough

KEYS = StreamKeys.create(7, 11)
BATCH = stubs.make_batch([2, 5, 3, 4], [9, 3, 8, 5], 12, filler=1)
FILES = gin_objects.files("objectives")
OWN_IDENTITY = {"diffusion_gemma", "genmd4", "introspective", "sundae", "sundae_sampled"}
"""Files whose loss stops a gradient or adds one on purpose: docs/exactness.md names the test of their identity."""


def check_gradient(objective):
    """Along the gradient itself, central differences of a step that changes the loss by about 0.3 %."""
    model = stubs.nano_for(objective, **stubs.QUICK)

    @jax.jit
    def loss(params):
        return objective.loss(dataclasses.replace(model, params=params), BATCH, KEYS, train=False).loss_sum

    value, gradient = jax.value_and_grad(loss)(model.params)
    length = float(jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(gradient))))
    step = 0.003 * float(value) / length**2

    def moved(by):
        return float(loss(jax.tree.map(lambda p, g: p + by * g, model.params, gradient)))

    slope = (moved(step) - moved(-step)) / (2 * step * length)
    np.testing.assert_allclose(slope, length, rtol=0.02)


@pytest.mark.parametrize("path", [path for path in FILES if path.stem not in OWN_IDENTITY], ids=lambda path: path.stem)
def test_the_gradient_of_every_objective_file_is_its_finite_difference(path):
    check_gradient(gin_objects.build(path, "OBJECTIVE"))
    stubs.forget()


def test_the_balance_of_two_losses_is_a_constant_of_the_gradient():
    """`NextToken.balanced` scales the next-token loss by a ratio that is held fixed in the gradient."""
    balanced = gin_objects.build(gin_objects.GIN / "objectives" / "introspective.gin", "OBJECTIVE")
    next_token = dataclasses.replace(balanced.next_token, balanced=False)
    plain = dataclasses.replace(balanced, next_token=next_token)
    model, row = stubs.nano_for(balanced, **stubs.QUICK), stubs.rows_of(BATCH, [0])

    def gradient(objective):
        return stubs.loss_and_grad(objective, model, row, KEYS)

    terms, found = gradient(balanced)
    diffusion, one = gradient(dataclasses.replace(plain, next_token=None))
    both, two = gradient(plain)
    assert next_token.diffusion_weight == 1.0, "as without a next-token loss"
    weight = next_token.weight
    below = (both.loss_sum - diffusion.loss_sum) / weight
    ratio = diffusion.loss_sum / below
    expected = jax.tree.map(lambda a, b: a + ratio * (b - a), one, two)
    stubs.assert_close(found, expected, scaled=1e-3)
    np.testing.assert_allclose(terms.loss_sum, diffusion.loss_sum + ratio * weight * below, rtol=1e-4)
