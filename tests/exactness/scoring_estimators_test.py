"""Likelihood estimators against enumeration, and the traps of scoring."""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import model_stubs as stubs
import numpy as np
import pytest
import tiny_world

from diffusion_lm.core.alignment import SamePosition, Shifted
from diffusion_lm.core.errors import ConfigError
from diffusion_lm.core.rng import StreamKeys
from diffusion_lm.evaluation.scoring import choose, continuation_batch, score
from diffusion_lm.evaluation.scoring_bounds import BlockNelbo
from diffusion_lm.evaluation.scoring_estimators import (
    ExactAutoregressive,
    ExactCount,
    StratifiedRates,
    UnweightedGrid,
    WeightedGrid,
)
from diffusion_lm.objectives.autoregressive import Autoregressive
from diffusion_lm.objectives.block_diffusion import BlockDiffusion

KEYS = StreamKeys.create(11)
V, L, MASK = 4, 3, 3
WORLD = tiny_world.canvas_model(V, L)
ROWS = np.array([[0, 1, 2], [2, 2, 0], [1, 0, 0], [2, 1, 1]])


def subset_nll():
    """{mask: f64[rows]}, the summed cross-entropy of the masked tokens for every non-empty mask."""
    log_p = tiny_world.log_softmax(WORLD.architecture.table, (MASK,))
    found = {}
    for masked in itertools.product([False, True], repeat=L):
        if any(masked):
            numbers = np.where(masked, MASK, ROWS) @ V ** np.arange(L - 1, -1, -1)
            nll = -np.take_along_axis(log_p[numbers], ROWS[..., None], axis=-1)[..., 0]
            found[masked] = (nll * np.array(masked)).sum(axis=1)
    return found


def nelbo():
    return sum(nll / (sum(masked) * math.comb(L, sum(masked))) for masked, nll in subset_nll().items())


def grid_value(steps, weigh):
    """A discrete grid of rates, Bernoulli masks enumerated."""
    total = 0.0
    for k in range(1, steps + 1):
        t = k / steps
        for masked, nll in subset_nll().items():
            count = sum(masked)
            total = total + t**count * (1 - t) ** (L - count) * nll * weigh(t, count) / steps
    return total


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        (ExactCount(600), nelbo()),
        (StratifiedRates(3000), nelbo()),
        (BlockNelbo(BlockDiffusion(block_size=L), 600), None),
        (WeightedGrid(8), grid_value(8, lambda t, count: 1 / t)),
        (UnweightedGrid(8), grid_value(8, lambda t, count: L / count)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_estimators_agree_with_enumeration(estimator, expected):
    """The mean over many keys, or many draws, within five of its standard errors."""
    batch = tiny_world.batch_of(ROWS)
    if expected is None:
        return check_block_estimator(estimator)
    repeats = 1 if estimator.draws > 100 else 150
    runs = [score(estimator, WORLD, batch, StreamKeys.create(seed), rows_per_pass=2400) for seed in range(repeats)]
    samples = np.array([run.log_likelihood for run in runs])
    error = runs[0].standard_error if repeats == 1 else samples.std(axis=0, ddof=1) / np.sqrt(repeats)
    assert (np.abs(-samples.mean(axis=0) - expected) < 5 * error).all()
    assert (error < 0.1 * expected).all(), "and the error is small enough to say something"
    assert (runs[0].draws == estimator.draws).all()
    assert runs[0].kind == estimator.bound_kind
    assert (runs[0].tokens == L).all()


def check_block_estimator(estimator):
    """One block: the same conditionals as masked diffusion under a plain network that cannot see the target cleanly."""
    model, batch = stubs.nano(), stubs.make_batch([2, 2], [3, 3], 5)
    objective = estimator.objective
    got = score(dataclasses.replace(estimator, objective=objective), model, batch, KEYS, rows_per_pass=200)
    plain = score(ExactCount(600, visibility="prefix_blind"), model, batch, KEYS, rows_per_pass=200)
    spread = np.hypot(got.standard_error, plain.standard_error)
    assert (np.abs(got.log_likelihood - plain.log_likelihood) < 5 * spread).all()


def chain_nll(steps):
    """The exact likelihood of the process with that many steps, by a sum over all ways to reveal the row."""
    log_p = tiny_world.log_softmax(WORLD.architecture.table, (MASK,))
    subsets = list(itertools.product([False, True], repeat=L))
    reached = {masked: np.full(len(ROWS), float(all(masked))) for masked in subsets}
    for k in range(steps, 0, -1):
        following = {masked: np.zeros(len(ROWS)) for masked in subsets}
        for before, after in itertools.product(subsets, repeat=2):
            if any(late and not early for early, late in zip(before, after, strict=True)):
                continue
            numbers = np.where(before, MASK, ROWS) @ V ** np.arange(L - 1, -1, -1)
            p = np.exp(np.take_along_axis(log_p[numbers], ROWS[..., None], axis=-1)[..., 0])
            revealed = np.array(before) & ~np.array(after)
            way = ((k - 1) / k) ** sum(after) * np.where(revealed, p / k, 1.0).prod(axis=1)
            following[after] += reached[before] * way
        reached = following
    return -np.log(reached[(False,) * L])


def test_the_grid_is_a_bound_at_any_number_of_steps():
    """Of the process with as many steps; in the limit it is the continuous bound."""
    for steps in (1, 2, 8, 64):
        bound = grid_value(steps, lambda t, count: 1 / t)
        assert (bound >= chain_nll(steps) - 1e-9).all()
        assert steps == 1 or (bound > chain_nll(steps) + 1e-3).any()
    np.testing.assert_allclose(bound, nelbo(), rtol=0.02)
    without_weights = grid_value(64, lambda t, count: L / count)
    assert (without_weights < chain_nll(64)).any(), "without weights it is no bound"
    assert [kind.bound_kind for kind in (WeightedGrid(), UnweightedGrid())] == ["nelbo", "pseudo"]


def test_autoregressive_scores_are_the_objectives_loss():
    batch = stubs.make_batch([2, 4], [6, 3], 9)
    scores = score(ExactAutoregressive(), stubs.nano(), batch, KEYS)
    loss = Autoregressive().loss(stubs.nano(), batch, KEYS, train=False)
    np.testing.assert_allclose(-scores.log_likelihood.sum(), loss.loss_sum, rtol=1e-5)
    np.testing.assert_array_equal(scores.standard_error, 0)
    np.testing.assert_array_equal(scores.tokens, [6, 3])


@pytest.mark.parametrize(
    "make",
    [
        lambda alignment: ExactCount(7, alignment),
        lambda alignment: StratifiedRates(4000, alignment),
        lambda alignment: BlockNelbo(BlockDiffusion(4, alignment=alignment), 7),
    ],
    ids=["ExactCount", "StratifiedRates", "BlockNelbo"],
)
def test_T20_likelihood_ignores_shift(make):
    """A table by position: the state before the token is read where the model is shifted, and only there."""
    table = np.random.default_rng(0).normal(size=(6, stubs.VOCAB)).astype(np.float32)
    model, batch = stubs.table_model(table), continuation_batch([[7, 8]], [[9]], 6, special=stubs.SPECIAL)
    log_p = tiny_world.log_softmax(table, (4,))
    for alignment, slot in ((Shifted(), 2), (SamePosition(), 3)):
        scores = score(make(alignment), model, batch, KEYS, rows_per_pass=1000)
        tolerance = {"rtol": 1e-5} if scores.draws[0] == 1 else {"atol": 5 * scores.standard_error[0]}
        np.testing.assert_allclose(scores.log_likelihood[0], log_p[slot, 9], **tolerance)
    assert abs(log_p[2, 9] - log_p[3, 9]) > 0.3, "the two readings differ"
    alone = score(ExactAutoregressive(), model, batch, KEYS)
    np.testing.assert_allclose(alone.log_likelihood[0], tiny_world.log_softmax(table)[2, 9], rtol=1e-5)


def test_T22_overlong_request_scores_zero():
    with pytest.raises(ConfigError, match="pair 1 has 7 tokens"):
        continuation_batch([[5], [5, 6, 7]], [[8], [8, 9, 10]], 6, special=stubs.SPECIAL)
    with pytest.raises(ConfigError, match="no token to score"):
        score(ExactCount(), stubs.nano(), continuation_batch([[5]], [[]], 4, special=stubs.SPECIAL), KEYS)
    with pytest.raises(ConfigError, match="packed"):
        score(ExactCount(), stubs.nano(), stubs.packed(stubs.make_batch([1, 1], [3, 3], 5)), KEYS)


@dataclasses.dataclass(frozen=True, eq=False)
class CountingArchitecture(stubs.TableArchitecture):
    calls: list = dataclasses.field(default_factory=list)

    def hidden(self, params, inputs):
        jax.debug.callback(lambda rows=inputs.tokens.shape[0]: self.calls.append(rows))
        return super().hidden(params, inputs)


def counted(estimator, batch, **options):
    table = np.random.default_rng(0).normal(size=(stubs.VOCAB, stubs.VOCAB)).astype(np.float32)
    model = stubs.BoundModel(CountingArchitecture(table, by_token=True), {})
    scores = score(estimator, model, batch, KEYS, **options)
    jax.effects_barrier()
    return scores, model.architecture.calls


@pytest.mark.thorough
def test_T23_monte_carlo_remainder():
    """Seven draws in batches of three are seven; one token needs one forward pass and has no variance."""
    long = continuation_batch([[7]], [[8, 9, 10, 11]], 8, special=stubs.SPECIAL)
    scores, calls = counted(ExactCount(7), long, rows_per_pass=3)
    assert calls == [3, 3, 1]
    assert scores.draws[0] == len(scores.samples[0]) == 7
    assert scores.standard_error[0] > 0
    assert len(set(scores.samples[0])) > 1
    single = continuation_batch([[7]], [[8]], 8, special=stubs.SPECIAL)
    scores, calls = counted(ExactCount(128), single)
    assert calls == [1]
    assert scores.standard_error[0] == 0
    scores, calls = counted(ExactCount(5), continuation_batch([[7]] * 2, [[8], [8, 9]], 8, special=stubs.SPECIAL))
    assert sum(calls) == 6
    assert scores.draws.tolist() == [1, 5]
    assert np.isnan(counted(StratifiedRates(1), long)[0].standard_error[0]), "one draw says nothing of its spread"


def test_counts_are_evenly_spaced():
    """With as many draws as tokens every count is drawn once, so that a table without context has no variance."""
    table = np.random.default_rng(0).normal(size=(9, stubs.VOCAB)).astype(np.float32)
    table[:] = table[:1]
    batch = continuation_batch([[7]], [[8, 8, 8, 8, 8]], 9, special=stubs.SPECIAL)
    scores = score(ExactCount(5), stubs.table_model(table), batch, KEYS)
    np.testing.assert_allclose(scores.samples[0], 5 * tiny_world.log_softmax(table, (4,))[0, 8], rtol=1e-5)


def test_T25_choices_with_different_lengths():
    """Equal choices tie draw by draw, similar ones differ with less variance than under noise of their own."""
    model = stubs.nano()
    choices = [[8, 9, 10, 11], [8, 9, 10, 11], [8, 9, 10, 12], [8, 9]]
    batch = continuation_batch([[7, 6]] * 4, choices, 9, special=stubs.SPECIAL)
    estimator = ExactCount(40)
    shared = batch.replace(example_ids=jnp.zeros_like(batch.example_ids))
    together, apart = (score(estimator, model, rows, KEYS) for rows in (shared, batch))
    np.testing.assert_array_equal(together.samples[0], together.samples[1])
    assert not np.allclose(apart.samples[0], apart.samples[1])
    # A network without context: the last token alone tells the first and the third choice apart.
    table = stubs.table_model(np.random.default_rng(0).normal(size=(9, stubs.VOCAB)))
    rates = [score(StratifiedRates(200), table, rows, KEYS).samples for rows in (shared, batch)]
    with_common, without = (np.std(samples[0] - samples[2]) for samples in rates)
    assert with_common < 0.7 * without

    answer = choose(estimator, model, batch, KEYS, [3, 3, 3, 3])[3]
    assert answer.best == int(np.argmax(choose_scores(estimator, model, batch)))
    per_token = choose_scores(estimator, model, batch) / [4, 4, 4, 2]
    assert answer.best_normalised == int(np.argmax(per_token))
    assert answer.kind == "nelbo"
    tie = choose(estimator, model, stubs.rows_of(batch, [0, 1]), KEYS, [3, 3])[3]
    assert (tie.best, tie.margin, tie.margin_error) == (0, 0.0, 0.0)
    two = choose(ExactAutoregressive(), model, batch, KEYS, [1, 1, 2, 2], lengths=[1.0, 2.0, 1.0, 1.0])
    assert set(two) == {1, 2}
    assert two[2].margin_error == 0.0
    with pytest.raises(ConfigError, match="question numbers"):
        choose(estimator, model, batch, KEYS, [1])


def choose_scores(estimator, model, batch):
    same = batch.replace(example_ids=jnp.full_like(batch.example_ids, 3))
    return score(estimator, model, same, KEYS).log_likelihood


def test_rows_do_not_depend_on_their_company():
    model, batch = stubs.nano(), stubs.make_batch([2, 3, 2], [6, 4, 5], 9)
    together = score(ExactCount(6), model, batch, KEYS)
    alone = score(ExactCount(6), model, stubs.rows_of(batch, [1]), KEYS, rows_per_pass=4)
    np.testing.assert_allclose(alone.samples[0], together.samples[1], rtol=1e-4)


@pytest.mark.parametrize("make", [ExactCount, StratifiedRates, WeightedGrid, UnweightedGrid])
def test_impossible_settings_are_errors(make):
    with pytest.raises(ConfigError):
        make(0)
    with pytest.raises(ConfigError):
        make(3, visibility="sideways")
    with pytest.raises(ConfigError):
        BlockNelbo(BlockDiffusion(), 0)


@pytest.mark.parametrize(("length", "share"), [(1, 33 / 64), (4, 0.815)])
def test_the_unweighted_grid_favours_short_choices(length, share):
    """What docs/scoring.md says of it: draws without a masked token cost nothing, and short targets have more."""
    found = sum(1 - (1 - k / 32) ** length for k in range(1, 33)) / 32
    assert found == pytest.approx(share, abs=0.005)
    model = stubs.table_model(np.zeros((length + 2, stubs.VOCAB)))
    batch = continuation_batch([[7]] * 60, [[9] * length] * 60, length + 2, special=stubs.SPECIAL)
    scores = score(UnweightedGrid(32), model, batch, KEYS, rows_per_pass=960)
    cost = -scores.log_likelihood.mean() / (length * math.log(stubs.VOCAB - 1))
    assert cost == pytest.approx(share, abs=0.04)
