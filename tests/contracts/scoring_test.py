"""What every estimator of `gin/scoring/` owes; a new gin file is found and checked without a word here."""

import dataclasses

import gin_objects
import jax
import model_stubs as stubs
import numpy as np
import pytest

from diffusion_lm.core.rng import StreamKeys
from diffusion_lm.evaluation import scoring

pytestmark = pytest.mark.thorough

FILES = gin_objects.files("scoring")
KEYS = StreamKeys.create(5)
MODEL = stubs.nano(**stubs.QUICK)
BATCH = stubs.make_batch([2, 5, 3, 4], [6, 2, 4, 5], 11)


@pytest.fixture(scope="module", params=FILES, ids=lambda path: path.stem)
def estimator(request):
    """One file after the other, with few draws: what is checked here does not depend on their number."""
    built = gin_objects.build(request.param, "ESTIMATOR")
    few = {field.name for field in dataclasses.fields(built) if field.init} & {"draws"}
    yield dataclasses.replace(built, draws=3) if few else built
    scoring.compiled_draws.cache_clear()
    stubs.forget()


def score(estimator, batch, model=MODEL):
    return scoring.score(estimator, model, batch, KEYS)


def test_there_are_estimators():
    assert {"autoregressive", "llada_exact_count", "block_nelbo", "udlm_nelbo"} <= {path.stem for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_built_twice_it_is_equal_and_hashable(path):
    estimator, again = (gin_objects.build(path, "ESTIMATOR") for _ in range(2))
    assert estimator == again
    assert hash(estimator) == hash(again)
    assert isinstance(estimator.append_eos, bool)


def test_scores_are_finite_and_say_what_they_are(estimator):
    scores = score(estimator, BATCH)
    assert scores.kind == estimator.bound_kind in ("exact", "nelbo", "pseudo")
    assert (scores.log_likelihood < 0).all()
    np.testing.assert_array_equal(scores.tokens, np.asarray(BATCH.target_mask).sum(axis=1))
    exact = [estimator.exact_for(int(count)) for count in scores.tokens]
    np.testing.assert_array_equal(scores.draws, np.where(exact, 1, estimator.draws))
    assert (scores.standard_error[exact] == 0).all()
    assert (scores.standard_error[~np.array(exact)] > 0).all()
    jax.tree.map(np.testing.assert_array_equal, score(estimator, BATCH).samples, scores.samples)


def test_a_row_does_not_depend_on_neighbours_padding_or_rubbish_under_it(estimator):
    whole = score(estimator, BATCH)
    alone = stubs.pad_right(stubs.rows_of(BATCH, [2]), 7)
    alone = alone.replace(tokens=np.where(alone.segment_ids == 0, 9, alone.tokens))
    np.testing.assert_allclose(score(estimator, alone).samples[0], whole.samples[2], rtol=1e-4)


def test_conditioning_matters_and_is_not_scored(estimator):
    """Another prompt, another score; and what a row counts are its target's tokens."""
    tokens = np.array(BATCH.tokens)
    tokens[0, 1] = tokens[0, 1] % 30 + 6
    changed = score(estimator, BATCH.replace(tokens=tokens))
    whole = score(estimator, BATCH)
    assert abs(changed.log_likelihood[0] - whole.log_likelihood[0]) > 1e-4
    np.testing.assert_allclose(changed.log_likelihood[1:], whole.log_likelihood[1:], rtol=1e-5)


def test_encoder_decoder(estimator):
    batch = stubs.make_batch([1, 1, 1], [6, 3, 4], 8, encoder=True)
    scores = score(estimator, batch, stubs.nano_encoder_decoder(**stubs.QUICK))
    assert np.isfinite(scores.log_likelihood).all()
