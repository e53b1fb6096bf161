"""Bounds are values of one sequence, whatever number of draws they take: exact likelihoods known in closed form."""

import dataclasses
import math
from typing import Any

import gin_objects
import jax
import jax.numpy as jnp
import model_stubs as stubs
import numpy as np
import pytest
import tiny_world

from diffusion_lm.core.rng import StreamKeys
from diffusion_lm.core.special import SpecialTokens
from diffusion_lm.data.schema import Record
from diffusion_lm.evaluation.likelihood import evaluate_bound
from diffusion_lm.evaluation.scoring import score
from diffusion_lm.evaluation.scoring_bounds import BlockNelbo, ObjectiveBound
from diffusion_lm.evaluation.scoring_task import ScoringEvaluation
from diffusion_lm.noise.process import Hybrid, Uniform
from diffusion_lm.objectives.autoregressive import Autoregressive
from diffusion_lm.objectives.block_diffusion import BlockDiffusion
from diffusion_lm.objectives.masked_diffusion import MaskedDiffusion
from diffusion_lm.objectives.uniform_diffusion import UniformDiffusion

KEYS = StreamKeys.create(3)
MASK, LENGTH, BYTES = 4, 5, 8
ALL, BUT_MASK = math.log(stubs.VOCAB), math.log(stubs.VOCAB - 1)
UNIFORM = stubs.table_model(np.zeros((2 * LENGTH + 6, stubs.VOCAB)))
BATCH = stubs.make_batch([2, 2], [LENGTH, LENGTH], LENGTH + 3)
MANY = stubs.make_batch([2] * 12, [LENGTH] * 12, LENGTH + 3)
MDLM = MaskedDiffusion()
PARTS = [
    (Autoregressive(), ALL),
    (MDLM, BUT_MASK),
    (UniformDiffusion(Uniform()), ALL),
    (UniformDiffusion(Hybrid()), BUT_MASK),
    (BlockDiffusion(block_size=2), BUT_MASK),
]


@dataclasses.dataclass(frozen=True, eq=False)
class Data:
    """A pipeline of one batch whose targets have `BYTES` bytes of text."""

    batch: Any
    specials: SpecialTokens = SpecialTokens(stubs.VOCAB, mask_id=MASK)

    @property
    def vocabulary(self):
        return self

    def decode(self, tokens):
        return "x" * BYTES

    def with_encoder(self, needed):
        return self

    def eval_batches(self, batch_size, *, limit=None):
        rows = self.batch.tokens.shape[0]
        yield self.batch, [Record((), (), row, "", "", "") for row in range(rows)]


def check_estimator(estimator, model, nats, batch=BATCH, length=LENGTH):
    """Nats per sequence, bits per token and bits per byte, within five of the reported standard errors."""
    scores = score(estimator, model, batch, KEYS, rows_per_pass=64)
    error = 5 * np.linalg.norm(scores.standard_error) / len(scores.draws) + 1e-4 * nats
    assert abs(-scores.log_likelihood.mean() - nats) < error
    assert error < 0.75 * nats, "and the error is small enough to see a factor of two"
    values = ScoringEvaluation(Data(batch), estimator, batch_size=64).run(model, 0)
    error = 5 * values["draw_error"] * length + 1e-4 * nats
    if estimator.bound_kind == "pseudo":
        return
    assert abs(values["nats_per_token"] * length - nats) < error
    assert values["bits_per_token"] == pytest.approx(values["nats_per_token"] / math.log(2))
    assert abs(values["bits_per_byte"] * BYTES * math.log(2) - nats) < error


@pytest.mark.parametrize(("objective", "per_token"), PARTS, ids=lambda value: type(value).__name__)
def test_a_uniform_predictor_costs_the_logarithm_of_the_vocabulary_a_token(objective, per_token):
    """The bound of a uniform predictor is tight under every noise, so each objective must say L log V."""
    check_estimator(ObjectiveBound(objective, draws=64), UNIFORM, LENGTH * per_token)
    if isinstance(objective, BlockDiffusion):
        check_estimator(BlockNelbo(objective, draws=8), UNIFORM, LENGTH * per_token)


def test_draws_multiply_neither_sums_nor_weights():
    """`bound` is one estimate: its sums are those of one pass over the data, with any number of draws."""
    for objective in (MDLM, UniformDiffusion(Uniform())):
        few, many = (
            stubs.bound(dataclasses.replace(objective, evaluation_draws=draws), UNIFORM, BATCH, KEYS)
            for draws in (16, 64)
        )
        for terms in (few, many):
            assert terms.weight == 2 * LENGTH
            assert terms.metrics["nll_per_real_token"].weight == 2 * LENGTH
        assert abs(few.loss_sum - many.loss_sum) < 0.5 * few.loss_sum


def test_evaluation_counts_each_token_once():
    values = evaluate_bound(UNIFORM, MDLM, Data(BATCH), batch_size=2)
    assert values["tokens"] == 2 * LENGTH
    assert values["bits_per_real_token"] == pytest.approx(BUT_MASK / math.log(2), rel=1e-5)


@dataclasses.dataclass(frozen=True, eq=False)
class CopyingArchitecture:
    """The posterior of targets that repeat one of `kinds` tokens: any visible token says all, else all are alike."""

    kinds: int

    @property
    def spec(self):
        return stubs.TableArchitecture(np.zeros((1, self.kinds + 1))).spec

    def hidden(self, params, inputs):
        tokens = inputs.tokens
        shown = jax.nn.one_hot(tokens[:, 1:], self.kinds + 1)[..., : self.kinds].max(axis=1)
        logits = jnp.pad(60.0 * shown, ((0, 0), (0, 1)))
        return stubs.Hidden(jnp.broadcast_to(logits[:, None], (*tokens.shape, self.kinds + 1)), None)

    def head(self, params):
        return stubs.Head(jnp.eye(self.kinds + 1), vocab_size=self.kinds + 1)


def test_the_bound_is_an_unbiased_estimate_and_no_quadrature():
    """64 times one of 16 tokens: -log p = log 16, all of which is the cost of the canvas that is nothing but MASK."""
    rows = np.repeat(np.arange(16).repeat(16)[:, None], 64, axis=1)
    model = stubs.BoundModel(CopyingArchitecture(16), {})
    special = SpecialTokens(17, mask_id=16)
    batches = [tiny_world.batch_of(rows[part::4], special) for part in range(4)]
    batches = [batch.replace(example_ids=batch.example_ids + 1000 * n) for n, batch in enumerate(batches)]
    terms = [stubs.bound(MDLM, model, batch, KEYS) for batch in batches]
    total = sum(terms[1:], terms[0])
    found, exact = float(total.loss_sum) / len(rows), math.log(16)
    assert exact == pytest.approx(2.773, abs=1e-3)
    error = math.sqrt(float(total.variance)) / len(rows)
    assert abs(found - exact) < 4 * error
    assert error < 0.25 * exact


def test_the_error_of_a_bound_is_that_of_repeated_draws():
    """`variance` against the spread over many seeds, without strata to make it an overestimate."""
    objective = UniformDiffusion(Uniform(), evaluation_draws=8)
    batch = stubs.make_batch([2] * 24, [4] * 24, 7)
    table = np.random.default_rng(0).normal(size=(stubs.VOCAB, stubs.VOCAB)).astype(np.float32)
    model = stubs.table_model(table, by_token=True)
    seeds = [StreamKeys.create(seed) for seed in range(80)]
    terms = [stubs.bound(objective, model, batch, keys) for keys in seeds]
    spread = np.std([float(one.loss_sum) for one in terms], ddof=1)
    said = math.sqrt(np.mean([float(one.variance) for one in terms]))
    assert 0.8 * spread < said < 1.6 * spread, "an overestimate, if anything, since the times are evenly spaced"


OBJECTIVES, ESTIMATORS = gin_objects.files("objectives"), gin_objects.files("scoring")


def uniform_network(objective):
    """A network with every layer that the objective needs and no opinion: all exponents are 1, all logits are 0."""
    model = stubs.nano_for(objective, **stubs.QUICK)
    params = jax.tree.map(jnp.zeros_like, model.params)
    if "exponents" in params:
        params["exponents"] = {"raw": jnp.full_like(params["exponents"]["raw"], math.log(math.e - 1))}
    return stubs.BoundModel(model.architecture, params)


@pytest.mark.thorough
@pytest.mark.parametrize("path", OBJECTIVES, ids=lambda path: path.stem)
def test_every_objective_file_has_the_scale_of_one_sequence(path):
    """What has a likelihood says L log V; the loss of all others is that of `bound`, times the tokens."""
    objective = gin_objects.build(path, "OBJECTIVE")
    model = uniform_network(objective)
    if objective.bound_kind != "pseudo":
        has_mask = objective.needs().mask_token and objective.bound_kind == "nelbo"
        check_estimator(ObjectiveBound(objective, draws=32), model, LENGTH * (BUT_MASK if has_mask else ALL), MANY)
    else:
        scores = score(ObjectiveBound(objective, draws=32), model, MANY, KEYS, rows_per_pass=64)
        bound = stubs.bound(objective, model, MANY, KEYS)
        np.testing.assert_allclose(-scores.log_likelihood.mean(), LENGTH * float(bound.loss), rtol=0.4)
    stubs.forget()


@pytest.mark.thorough
@pytest.mark.parametrize("path", ESTIMATORS, ids=lambda path: path.stem)
def test_every_estimator_file_has_the_scale_of_one_sequence(path):
    estimator = gin_objects.build(path, "ESTIMATOR")
    own = getattr(estimator, "objective", None)
    model = UNIFORM if own is None else uniform_network(own)
    has_mask = getattr(estimator, "needs_mask_token", False) or (own is not None and own.needs().mask_token)
    # The unweighted grid loses the draws that mask nothing: docs/scoring.md.
    kept = np.mean([1 - (1 - k / 32) ** LENGTH for k in range(1, 33)]) if path.stem == "diffullama_grid" else 1.0
    check_estimator(estimator, model, kept * LENGTH * (BUT_MASK if has_mask else ALL), MANY)


@pytest.mark.parametrize("filler", [stubs.EOS, stubs.PAD], ids=["EosFilled", "PadFilled"])
def test_scores_are_over_the_real_tokens_of_a_filled_window(filler):
    """Three tokens and EOS in a window of 16: 16 log V nats over 4 tokens, be the filler EOS (LLaDA, Dream) or PAD."""
    batch = stubs.make_batch([2], [16], 18, filler=12)
    tokens = np.array(batch.tokens)
    tokens[0, 6:] = filler
    batch = batch.replace(tokens=jnp.asarray(tokens))
    model = stubs.table_model(np.zeros((18, stubs.VOCAB)))
    values = ScoringEvaluation(Data(batch), ObjectiveBound(Autoregressive()), batch_size=1).run(model, 0)
    assert values["tokens"] == 4
    assert values["perplexity_exact"] == pytest.approx(stubs.VOCAB**4, rel=1e-4)
    bound = evaluate_bound(model, Autoregressive(), Data(batch), batch_size=1)
    assert (bound["tokens"], bound["real_tokens"]) == (16, 4)
    assert bound["bits_per_real_token"] == pytest.approx(values["bits_per_token"], rel=1e-5)
