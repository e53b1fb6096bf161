"""Log-likelihood of given continuations, row by row: exact, by bounds, or by what papers use in their place.

Every result says how many draws it took, its standard error, and whether it is exact, a bound or neither. Draws are
spread over rows and passes one by one, so none is lost to a remainder (trap T23).
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_lm.architectures.base import Architecture, BoundModel
from diffusion_lm.core.errors import require
from diffusion_lm.core.rng import StreamKeys, fold_in_each
from diffusion_lm.core.special import SpecialTokens
from diffusion_lm.core.types import Batch
from diffusion_lm.nn.constrain import Constrain, no_constraint
from diffusion_lm.noise.weighting import BoundKind
from diffusion_lm.objectives.draws import shifted

START_STREAM = "scoring/start"
DRAW_STREAM = "scoring/draw"


class Estimator(Protocol):
    """One way to score rows; a frozen dataclass. Implementations: `scoring_estimators.py`, `scoring_bounds.py`."""

    def __hash__(self) -> int: ...

    @property
    def bound_kind(self) -> BoundKind:
        """Whether the mean is exact, a bound ("nelbo") or neither ("pseudo")."""
        ...

    @property
    def random_start(self) -> bool:
        """Whether the levels are shifted by one random number per example, or are the grid 0, 1/n, 2/n, ..."""
        ...

    @property
    def draws(self) -> int:
        """How many draws a row takes where one is not exact."""
        ...

    @property
    def append_eos(self) -> bool:
        """Whether the choices of a question are scored with EOS behind them."""
        ...

    def exact_for(self, tokens: int) -> bool:
        """Returns whether a single draw of a row with that many target tokens is exact."""
        ...

    def nll(self, model: BoundModel, batch: Batch, keys: StreamKeys, level_B: jax.Array) -> jax.Array:
        """Returns f32[B], one draw of each row at noise levels f32[B] in [0, 1): 0 is the most noise."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class Scores:
    """Scores of B rows.

    Attributes:
      log_likelihood: f64[B] in nats, the mean over draws of what `kind` says.
      standard_error: f64[B] of that mean from the draws' spread; an overestimate where levels are evenly spaced.
        0 where one draw is exact, NaN where one draw was taken and is not.
      draws: i64[B].
      tokens: i64[B], scored tokens.
      kind: what the values are.
      samples: the draws of each row.
    """

    log_likelihood: np.ndarray
    standard_error: np.ndarray
    draws: np.ndarray
    tokens: np.ndarray
    kind: BoundKind
    samples: tuple[np.ndarray, ...]


def score(
    estimator: Estimator, model: BoundModel, batch: Batch, keys: StreamKeys, *, rows_per_pass: int | None = None
) -> Scores:
    """Returns the scores of every row of a batch, one example a row.

    Args:
      estimator: how to score.
      model: the network.
      batch: conditioning and continuations; noise is keyed by `example_ids`, so rows with the same id share it.
      keys: the root of the noise.
      rows_per_pass: (row, draw) pairs per forward pass; None = as many as the batch has rows.

    Raises:
      ConfigError: a row has nothing to score, or holds packed examples.
    """
    tokens = np.asarray((batch.loss_weights > 0) & batch.target_mask).sum(axis=1)
    require(
        bool((tokens > 0).all()),
        f"row {int(np.argmin(tokens))} has no token to score, and an empty continuation has no likelihood but 1",
        where="score",
        fix="Leave empty continuations out.",
    )
    require(
        bool((np.asarray(batch.segment_ids) <= 1).all()),
        "rows with several packed examples cannot be scored one by one",
        where="score",
        fix="Give one example a row.",
    )
    targets = np.asarray(batch.target_mask).sum(axis=1)
    draws = np.array([1 if estimator.exact_for(int(count)) else estimator.draws for count in targets])
    pairs = [(row, draw) for row, count in enumerate(draws) for draw in range(count)]
    step = compiled_draws(estimator, model.architecture, model.constrain)
    rows_per_pass = len(draws) if rows_per_pass is None else rows_per_pass
    values: list[list[float]] = [[] for _ in draws]
    for first in range(0, len(pairs), rows_per_pass):
        rows, numbers = (np.array(part) for part in zip(*pairs[first : first + rows_per_pass], strict=True))
        chosen = model.constrain.rows(jax.tree.map(lambda x, rows=rows: x[rows], batch))
        nll = step(model.params, chosen, keys, numbers, draws[rows])
        for row, value in zip(rows, np.asarray(nll, np.float64), strict=True):
            values[row].append(-float(value))
    samples = tuple(np.array(row) for row in values)
    return Scores(
        log_likelihood=np.array([row.mean() for row in samples]),
        standard_error=np.array(
            [
                0.0 if estimator.exact_for(int(count)) else _standard_error(row)
                for row, count in zip(samples, targets, strict=True)
            ]
        ),
        draws=draws,
        tokens=tokens,
        kind=estimator.bound_kind,
        samples=samples,
    )


@functools.cache
def compiled_draws(estimator: Estimator, architecture: Architecture, constrain: Constrain = no_constraint):
    """Returns the jitted `(params, batch, keys, numbers, draws) -> f32[B]`, one draw a row."""

    def run(params, batch: Batch, keys: StreamKeys, numbers: jax.Array, draws: jax.Array) -> jax.Array:
        level = numbers / draws
        if estimator.random_start:
            level = shifted(keys.example_uniform(START_STREAM, batch.row_ids), level)
        # Each draw of an example is an example of its own to everything that is keyed by it.
        draw_keys = fold_in_each(keys.per_example(DRAW_STREAM, batch.row_ids), numbers)
        ids = jax.vmap(lambda key: jax.random.bits(key, (), jnp.uint32))(draw_keys)
        batch = batch.replace(example_ids=jnp.broadcast_to(ids[:, None], batch.tokens.shape))
        return constrain.whole(estimator.nll(BoundModel(architecture, params, constrain), batch, keys, level))

    return jax.jit(run)


@dataclasses.dataclass(frozen=True)
class Choice:
    """The answer to one multiple-choice question.

    Attributes:
      best: index of the choice with the highest log-likelihood ("acc" of the harness).
      best_normalised: index of the highest log-likelihood per unit of length ("acc_norm").
      margin: log-likelihood of the best choice over the second, in nats.
      margin_error: standard error of that difference over the shared draws; NaN where it cannot be told.
      kind: what the compared values are.
    """

    best: int
    best_normalised: int
    margin: float
    margin_error: float
    kind: BoundKind


def choose(
    estimator: Estimator,
    model: BoundModel,
    batch: Batch,
    keys: StreamKeys,
    questions: Sequence[int],
    *,
    lengths: Sequence[float] | None = None,
    rows_per_pass: int | None = None,
) -> dict[int, Choice]:
    """Returns the answer to each question whose choices are rows of the batch.

    The choices of a question share their noise levels and, slot by slot, their masks, so that their difference has
    less variance than each of them, and equal choices tie exactly (trap T25).

    Args:
      estimator: how to score.
      model: the network.
      batch: one choice a row, behind the prompt of its question.
      keys: the root of the noise.
      questions: B numbers; rows of one question have the same.
      lengths: B lengths by which `best_normalised` divides, e.g. bytes as in lm-evaluation-harness; None = tokens.
      rows_per_pass: as in `score`.
    """
    numbers = np.asarray(questions, np.uint32)
    require(
        numbers.shape == (batch.tokens.shape[0],),
        f"{len(numbers)} question numbers for {batch.tokens.shape[0]} rows",
        where="choose",
        fix="Give every row the number of its question.",
    )
    shared = batch.replace(example_ids=jnp.broadcast_to(jnp.asarray(numbers)[:, None], batch.tokens.shape))
    scores = score(estimator, model, shared, keys, rows_per_pass=rows_per_pass)
    return answers(scores, numbers.tolist(), scores.tokens if lengths is None else lengths)


def answers(scores: Scores, questions: Sequence[int], lengths: Sequence[float] | np.ndarray) -> dict[int, Choice]:
    """Returns the answer to each question whose choices are rows of `scores`; arguments as for `choose`."""
    numbers, per_length = np.asarray(questions), scores.log_likelihood / np.asarray(lengths, np.float64)
    found = {}
    for question in dict.fromkeys(numbers.tolist()):
        rows = np.nonzero(numbers == question)[0]
        order = rows[np.argsort(-scores.log_likelihood[rows], kind="stable")]
        best = int(np.nonzero(rows == order[0])[0][0])
        margin, error = float("nan"), float("nan")
        if len(order) > 1:
            margin = float(scores.log_likelihood[order[0]] - scores.log_likelihood[order[1]])
            error = _difference_error(scores, order[0], order[1])
        found[question] = Choice(best, int(np.argmax(per_length[rows])), margin, error, scores.kind)
    return found


def continuation_batch(
    prompts: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[int]],
    row_length: int,
    *,
    special: SpecialTokens,
) -> Batch:
    """Returns one row [BOS, prompt, continuation] per pair, the continuation scored.

    Raises:
      ConfigError: a pair does not fit. It is never cut or given a score of its own: a missing score of 0 would be the
        best of all log-likelihoods (trap T22).
    """
    rows = [
        [special.bos_id, *prompt, *continuation] for prompt, continuation in zip(prompts, continuations, strict=True)
    ]
    for number, row in enumerate(rows):
        require(
            len(row) <= row_length,
            f"pair {number} has {len(row)} tokens with BOS, and a row {row_length}",
            where="continuation_batch.row_length",
            fix="Shorten the prompt from the left, or give longer rows.",
        )
    used = np.arange(row_length) < np.array([[len(row)] for row in rows])
    starts = np.array([[1 + len(prompt)] for prompt in prompts])
    target = used & (np.arange(row_length) >= starts)
    padded = np.array([list(row) + [special.pad_id] * (row_length - len(row)) for row in rows], np.int32)
    return Batch(
        tokens=jnp.asarray(padded),
        target_mask=jnp.asarray(target),
        loss_weights=jnp.asarray(target, jnp.float32),
        segment_ids=jnp.asarray(used, jnp.int32),
        positions=jnp.asarray(np.where(used, np.arange(row_length), 0), jnp.int32),
        example_ids=jnp.asarray(np.broadcast_to(np.arange(len(rows))[:, None], padded.shape), jnp.uint32),
        special=special,
    )


def _standard_error(samples: np.ndarray) -> float:
    return float(samples.std(ddof=1) / np.sqrt(len(samples))) if len(samples) > 1 else float("nan")


def _difference_error(scores: Scores, first: Any, second: Any) -> float:
    """Returns the standard error of a difference: paired where both have the same draws, of the sum otherwise."""
    if len(scores.samples[first]) == len(scores.samples[second]) > 1:
        return _standard_error(scores.samples[first] - scores.samples[second])
    return float(np.hypot(scores.standard_error[first], scores.standard_error[second]))
