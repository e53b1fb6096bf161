"""The left-to-right chain, bounds row by row, and guided scores, against sums over all rows and values by hand."""

import itertools

import jax
import jax.numpy as jnp
import model_stubs as stubs
import numpy as np
import pytest
import tiny_world

from diffusion_lm.core.alignment import Shifted
from diffusion_lm.core.rng import StreamKeys
from diffusion_lm.evaluation.scoring import continuation_batch, score
from diffusion_lm.evaluation.scoring_bounds import ObjectiveBound
from diffusion_lm.evaluation.scoring_estimators import ExactCount, LeftToRight
from diffusion_lm.noise.process import Uniform
from diffusion_lm.objectives.autoregressive import Autoregressive
from diffusion_lm.objectives.uniform_diffusion import UniformDiffusion

KEYS = StreamKeys.create(11)
V, L, MASK = 4, 3, 3
WORLD = tiny_world.canvas_model(V, L)
ALL_ROWS = np.array(list(itertools.product(range(V - 1), repeat=L)))


def test_the_chain_is_a_probability_and_that_of_the_canvases_it_names():
    scores = score(LeftToRight(), WORLD, tiny_world.batch_of(ALL_ROWS), KEYS)
    np.testing.assert_allclose(np.exp(scores.log_likelihood).sum(), 1.0, rtol=1e-5)
    assert (scores.draws == 1).all()
    assert scores.kind == "exact"
    log_p = tiny_world.log_softmax(WORLD.architecture.table, (MASK,))
    row = ALL_ROWS[14]
    canvases = [np.where(np.arange(L) >= i, MASK, row) @ V ** np.arange(L - 1, -1, -1) for i in range(L)]
    by_hand = sum(log_p[canvas][i, row[i]] for i, canvas in enumerate(canvases))
    np.testing.assert_allclose(scores.log_likelihood[14], by_hand, rtol=1e-5)


def test_the_chain_stops_at_the_end_of_each_row():
    """A row's chain is as long as its own target, whatever the longest row of the batch needs."""
    batch = stubs.make_batch([2, 4, 3], [2, 5, 3], 9)
    together = score(LeftToRight(alignment=Shifted()), stubs.nano(), batch, KEYS)
    alone = score(LeftToRight(alignment=Shifted()), stubs.nano(), stubs.rows_of(batch, [0]), KEYS)
    np.testing.assert_allclose(alone.log_likelihood[0], together.log_likelihood[0], rtol=1e-5)
    causal = LeftToRight(
        alignment=Shifted(), visibility="causal"
    )  # then nothing sees the MASKs ahead: autoregression without MASK
    loss = sum(
        float(Autoregressive().loss(without_mask(), stubs.rows_of(batch, [row]), KEYS, train=False).loss_sum)
        for row in range(3)
    )
    scores = score(causal, stubs.nano(), batch, KEYS)
    np.testing.assert_allclose(-scores.log_likelihood.sum(), loss, rtol=1e-4)


def without_mask():
    """The nano network whose head gives MASK nothing."""
    model = stubs.nano()

    class Model:
        spec = model.spec

        def __call__(self, *args, **inputs):
            return model(*args, **inputs)

        def nll(self, hidden, targets, where):
            return model.nll(hidden, targets, where=where, forbidden=(4,))

    return Model()


def test_rows_of_an_objective_sum_to_its_bound():
    """The same noise keys give the same numbers, one by one or as the objective's own sum."""
    objective, model = UniformDiffusion(Uniform()), stubs.nano(**stubs.QUICK)
    batch = stubs.make_batch([2, 3], [5, 4], 8)
    rows = jax.jit(lambda batch: ObjectiveBound(objective).nll(model, batch, KEYS, jnp.zeros(2)))(batch)
    np.testing.assert_allclose(rows.sum(), objective.bound(model, batch, KEYS).loss_sum, rtol=1e-5)
    scores = score(ObjectiveBound(objective, draws=6), model, batch, KEYS)
    assert (np.array([np.ptp(samples) for samples in scores.samples]) > 0).all(), "every draw has noise of its own"
    assert scores.kind == "nelbo"


@pytest.mark.parametrize("guidance", [0.0, 1.5])
def test_guided_score_of_one_token_by_hand(guidance):
    """A shifted table by token: the prompt's last token predicts the answer, MASK in its place is unconditional."""
    table = np.random.default_rng(1).normal(size=(stubs.VOCAB, stubs.VOCAB)).astype(np.float32)
    model, batch = (
        stubs.table_model(table, by_token=True),
        continuation_batch([[7, 8]], [[9]], 6, special=stubs.SPECIAL),
    )
    logits = table[8] + guidance * (table[8] - table[4])
    expected = tiny_world.log_softmax(logits, (4,))[9]
    scores = score(ExactCount(5, Shifted(), guidance=guidance), model, batch, KEYS)
    np.testing.assert_allclose(scores.log_likelihood[0], expected, rtol=1e-5)
