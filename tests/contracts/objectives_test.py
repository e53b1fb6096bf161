"""What every objective of `gin/objectives/` owes; a new gin file is found and checked without a word here."""

import dataclasses

import gin_objects
import jax
import jax.numpy as jnp
import model_stubs as stubs
import numpy as np
import pytest

from diffusion_lm.core.rng import StreamKeys
from diffusion_lm.objectives.rdm import Rdm

pytestmark = pytest.mark.thorough

FILES = gin_objects.files("objectives")
KEYS = StreamKeys.create(7, 11)
QUICK = {"dropout_rate": 0.2, **stubs.QUICK}
RAGGED = stubs.make_batch([2, 5, 3, 4, 2, 3, 6, 2], [9, 3, 8, 5, 2, 8, 4, 6], 12, filler=1)


@pytest.fixture(scope="module", params=FILES, ids=lambda path: path.stem)
def objective(request):
    """One file after the other, as the scope arranges it, so that the programs of one are freed before the next."""
    yield gin_objects.build(request.param, "OBJECTIVE")
    stubs.forget()


@pytest.fixture
def model(objective):
    return stubs.nano_for(objective, **QUICK)


def test_there_are_objectives():
    names = {path.stem for path in FILES}
    assert {"autoregressive", "prefix_autoregressive", "sundae", "mdlm", "llada", "diffullama", "dream", "rdm"} <= names


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_built_twice_it_is_equal_and_hashable(path):
    objective, again = (gin_objects.build(path, "OBJECTIVE") for _ in range(2))
    assert objective == again
    assert hash(objective) == hash(again)
    assert objective.bound_kind in ("exact", "nelbo", "pseudo")
    assert objective.needs().passes >= 1


def check_finite_and_weighted(objective, model, batch):
    terms, grads = stubs.loss_and_grad(objective, model, batch, KEYS)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((grads, terms)))
    assert any(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads))
    # Objectives with another normaliser count replaced tokens, or examples, as RDM always does.
    counts_tokens = not isinstance(objective, Rdm) and getattr(objective, "normaliser", "scored") == "scored"
    assert 0 < terms.weight <= batch.loss_weights.sum()
    assert bool(terms.others) <= objective.needs().several_weights, "the training step has to know"
    if counts_tokens:
        assert terms.weight == batch.loss_weights.sum(), "the weight counts scored tokens"
    assert 0 < terms.metrics["nll_per_real_token"].weight <= batch.loss_weights.sum()
    again, _ = stubs.loss_and_grad(objective, model, batch, KEYS)
    stubs.assert_close(again, terms, rtol=0)

    unscored = batch.replace(loss_weights=batch.loss_weights.at[0].set(0))
    fewer, _ = stubs.loss_and_grad(objective, model, unscored, KEYS)
    assert fewer.weight < terms.weight
    if counts_tokens:
        assert fewer.weight == terms.weight - batch.loss_weights[0].sum()
    assert all(part.total < whole.total for part, whole in zip(fewer.parts, terms.parts, strict=True))
    double, _ = stubs.loss_and_grad(objective, model, batch.replace(loss_weights=2 * batch.loss_weights), KEYS)
    stubs.assert_close(double.parts, jax.tree.map(lambda x: 2 * x, terms.parts), rtol=1e-5)


def test_finite_weights_respected_and_deterministic(objective, model):
    check_finite_and_weighted(objective, model, RAGGED)


def test_finite_weights_respected_and_deterministic_on_an_encoder_decoder(objective):
    batch = stubs.make_batch([1, 1, 1], [9, 4, 7], 10, encoder=True)
    check_finite_and_weighted(objective, stubs.nano_for(objective, stubs.nano_encoder_decoder, **QUICK), batch)


def test_what_stands_under_the_padding_does_not_matter(objective, model):
    rubbish = RAGGED.replace(tokens=jnp.where(RAGGED.segment_ids == 0, 9, RAGGED.tokens))
    expected, _ = stubs.loss_and_grad(objective, model, RAGGED, KEYS)
    stubs.assert_close(stubs.loss_and_grad(objective, model, rubbish, KEYS)[0], expected, rtol=1e-6)


def test_T10_local_denominator(objective, model):
    """Microbatches of ragged targets, dropout on, add up to the whole batch: loss, weight, metrics and gradient."""
    terms, grads = stubs.loss_and_grad(objective, model, RAGGED, KEYS)
    parts = [
        stubs.loss_and_grad(objective, model, stubs.rows_of(RAGGED, range(i, i + 2)), KEYS) for i in range(0, 8, 2)
    ]
    summed, summed_grads = parts[0]
    for part, part_grads in parts[1:]:
        summed, summed_grads = summed + part, jax.tree.map(jnp.add, summed_grads, part_grads)
    stubs.assert_close(summed, terms, rtol=1e-4)
    stubs.assert_close(summed_grads, grads, scaled=2e-4)
    weights = [float(part.weight) for part, _ in parts]
    if np.ptp(weights) > 1e-3:  # A mean over examples has the same denominator in every microbatch of two.
        # Single losses may agree by chance, gradients of all parameters do not.
        local = jax.tree.map(
            lambda *leaves: np.mean([g / (w or 1.0) for g, w in zip(leaves, weights, strict=True)], axis=0),
            *(part_grads for _, part_grads in parts),
        )
        apart = jax.tree.map(
            lambda a, g: np.abs(a - g / terms.weight).max() / np.abs(g / terms.weight).max(), local, grads
        )
        assert max(jax.tree.leaves(apart)) > 1e-2, "the batch is ragged enough to see a local denominator"


def test_T15_nothing_masked(objective, model):
    """A batch in which nothing is scored, in which there is no target, or that is all padding: 0, and no NaN."""
    unscored = RAGGED.replace(loss_weights=jnp.zeros_like(RAGGED.loss_weights))
    no_target = unscored.replace(target_mask=jnp.zeros_like(RAGGED.target_mask))
    for batch in (unscored, no_target, no_target.replace(segment_ids=jnp.zeros_like(RAGGED.segment_ids))):
        terms, grads = stubs.loss_and_grad(objective, model, batch, KEYS)
        assert terms.loss == 0
        assert not terms.scored
        assert all(part.total == part.weight == 0 for part in terms.parts)
        assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(grads))
        assert all(np.isfinite(np.asarray(metric.value)) for metric in terms.metrics.values())


def test_T27_noise_depends_on_topology(objective, model):
    """Another order of the rows gives every row the same noise, the same dropout and the same loss."""
    shuffled = stubs.rows_of(RAGGED, [3, 1, 7, 5, 0, 2, 6, 4])
    terms, _ = stubs.loss_and_grad(objective, model, RAGGED, KEYS)
    stubs.assert_close(stubs.loss_and_grad(objective, model, shuffled, KEYS)[0], terms, rtol=1e-4)


def test_T31_T41_noisy_validation_and_padding(objective, model):
    """The bound does not depend on the step at which it is taken, nor on padding, and has no dropout."""
    first = stubs.bound(objective, model, RAGGED, KEYS)
    stubs.assert_close(stubs.bound(objective, model, RAGGED, StreamKeys.create(7, 12)), first, rtol=0)
    assert np.isfinite(first.loss)
    assert first.metrics["nll_per_real_token"].weight > 0
    still = stubs.BoundModel(stubs.nano_for(objective, **stubs.QUICK).architecture, model.params)
    stubs.assert_close(stubs.bound(objective, still, stubs.pad_right(RAGGED, 7), KEYS), first, rtol=1e-4)


def test_T33_packing_leak_and_positions(objective):
    """Examples packed into one row have the loss, the noise and the gradient they have in rows of their own."""
    model, batch = stubs.nano_for(objective, **stubs.QUICK), stubs.rows_of(RAGGED, [0, 1])
    packed = stubs.packed(batch)
    # Of one shape, so that both run one compiled program: two rows, the second of the packed batch empty.
    apart = stubs.pad_right(batch, packed.tokens.shape[1] - batch.tokens.shape[1])
    together = jax.tree.map(lambda x: jnp.concatenate([x, jnp.zeros_like(x)]), packed)
    terms, grads = stubs.loss_and_grad(objective, model, apart, KEYS)
    packed_terms, packed_grads = stubs.loss_and_grad(objective, model, together, KEYS)
    stubs.assert_close(packed_terms, terms, rtol=1e-4)
    stubs.assert_close(packed_grads, grads, scaled=2e-4)


def test_lowers_ahead_of_time(objective, model):
    """Shapes alone are enough: nothing in an objective looks at a value."""

    def loss(params, batch, keys):
        return objective.loss(dataclasses.replace(model, params=params), batch, keys).loss_sum

    abstract = jax.eval_shape(lambda: (model.params, RAGGED, KEYS))
    assert jax.jit(loss).lower(*abstract).as_text()
