"""What the backward pass of the chunked loss keeps: never a copy of the head, nor logits, for every chunk."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import pytest

from diffusion_lm.nn import cross_entropy

ROWS, SLOTS, WIDTH, VOCAB, CHUNK = 2, 128, 8, 64, 64


def _shapes(jaxpr) -> Iterator[tuple[int, ...]]:
    for equation in _equations(jaxpr):
        yield from (variable.aval.shape for variable in equation.outvars if hasattr(variable.aval, "shape"))


def _equations(jaxpr) -> Iterator:
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: isinstance(x, jax.extend.core.ClosedJaxpr)
        ):
            if isinstance(value, jax.extend.core.ClosedJaxpr):
                yield from _equations(value.jaxpr)
            elif isinstance(value, jax.extend.core.Jaxpr):
                yield from _equations(value)


some_or_all = pytest.mark.parametrize("some", [False, True], ids=["all slots", "some slots"])


def _backward_pass(some):
    where = jnp.arange(SLOTS)[None].repeat(ROWS, 0) % 2 == 0 if some else None
    hidden = jnp.ones((ROWS, SLOTS, WIDTH))
    targets = jnp.zeros((ROWS, SLOTS), jnp.int32)

    def loss(weight, hidden):
        head = cross_entropy.Head(weight, vocab_size=VOCAB)
        return cross_entropy.chunked_nll(hidden, head, targets, CHUNK, where_BT=where).sum()

    return jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(jnp.ones((VOCAB, WIDTH)), hidden).jaxpr


@some_or_all
def test_logits_are_made_twice_and_their_normaliser_once(some):
    names = [equation.primitive.name for equation in _equations(_backward_pass(some))]
    assert names.count("dot_general") == 4, "forward, again, and two gradients"
    assert names.count("log") == 1


@some_or_all
def test_nothing_of_the_size_of_the_head_is_kept_per_chunk(some):
    shapes = set(_shapes(_backward_pass(some)))
    assert (VOCAB, WIDTH) in shapes, "the walk reaches the gradient of the head"
    kept = [shape for shape in shapes if len(shape) > 2 and shape[-2:] in ((VOCAB, WIDTH), (WIDTH, VOCAB))]
    assert not kept, "copies of the head"
    whole = ROWS * SLOTS * VOCAB
    assert not [s for s in shapes if s and s[-1] == VOCAB and jnp.prod(jnp.array(s)) >= whole], "all logits at once"
