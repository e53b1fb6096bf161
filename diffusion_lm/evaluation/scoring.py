"""Log-likelihood of given continuations, one per row: exact, a bound, or a published substitute for either.

Every result has its number of draws, its standard error, and its kind (exact, bound or neither). (row, draw) pairs are
distributed over forward passes individually, so no draw is dropped if counts are not divisible (trap T23).
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Protocol

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
    """A likelihood estimator; a frozen dataclass. Implementations: `scoring_estimators.py`, `scoring_bounds.py`."""

    def __hash__(self) -> int: ...

    @property
    def bound_kind(self) -> BoundKind:
        """Whether the mean over draws is exact, a bound ("nelbo") or neither ("pseudo")."""
        ...

    @property
    def random_start(self) -> bool:
        """Whether the levels 0, 1/n, 2/n, ... are shifted by one random number per example."""
        ...

    @property
    def draws(self) -> int:
        """Number of draws per row, if one draw is not exact."""
        ...

    @property
    def append_eos(self) -> bool:
        """Whether EOS is appended to the choices of a question."""
        ...

    def exact_for(self, tokens: int) -> bool:
        """Returns whether a single draw is exact for a row with `tokens` target tokens."""
        ...

    def nll(self, model: BoundModel, batch: Batch, keys: StreamKeys, level_B: jax.Array) -> jax.Array:
        """Returns f32[B], one draw of -log p per row at noise levels f32[B] in [0, 1); 0 is the highest noise."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class Scores:
    """Scores of B rows.

    Attributes:
      log_likelihood: f64[B] in nats, mean over draws; `kind` says what it estimates.
      standard_error: f64[B], standard error of that mean over the draws; an overestimate if levels are evenly spaced.
        0 if one draw is exact, NaN if a single draw is not exact.
      draws: i64[B], number of draws.
      tokens: i64[B], number of scored tokens.
      kind: "exact", "nelbo" or "pseudo".
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
    """Returns the scores of every row of a batch with one example per row.

    Args:
      estimator: the estimator.
      model: the network.
      batch: conditioning and continuations; noise is keyed by `example_ids`, so rows with the same id share it.
      keys: random keys of the noise.
      rows_per_pass: (row, draw) pairs per forward pass; None = number of rows of the batch.

    Raises:
      ConfigError: a row has no token to score, or has several packed examples.
    """
    tokens = np.asarray((batch.loss_weights > 0) & batch.target_mask).sum(axis=1)
    require(
        bool((tokens > 0).all()),
        f"row {int(np.argmin(tokens))} has no token to score",
        where="score",
        fix="Remove empty continuations: their likelihood would always be 1.",
    )
    require(
        bool((np.asarray(batch.segment_ids) <= 1).all()),
        "the batch has rows with several packed examples, which cannot be scored separately",
        where="score",
        fix="Use one example per row.",
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
    """Returns a jitted `(params, batch, keys, numbers, draws) -> f32[B]`: draw number `numbers` of `draws` per row."""

    def run(params, batch: Batch, keys: StreamKeys, numbers: jax.Array, draws: jax.Array) -> jax.Array:
        level = numbers / draws
        if estimator.random_start:
            level = shifted(keys.example_uniform(START_STREAM, batch.row_ids), level)
        # Noise is keyed by example id, so each draw of an example gets its own id.
        draw_keys = fold_in_each(keys.per_example(DRAW_STREAM, batch.row_ids), numbers)
        ids = jax.vmap(lambda key: jax.random.bits(key, (), jnp.uint32))(draw_keys)
        batch = batch.replace(example_ids=jnp.broadcast_to(ids[:, None], batch.tokens.shape))
        return constrain.whole(estimator.nll(BoundModel(architecture, params, constrain), batch, keys, level))

    return jax.jit(run)


@dataclasses.dataclass(frozen=True)
class Answer:
    """The answer to one multiple-choice question.

    Attributes:
      best: index of the choice with the highest log-likelihood ("acc" of the harness).
      best_normalised: index of the choice with the highest log-likelihood per unit of length ("acc_norm").
      margin: log-likelihood of the best choice minus that of the second best, in nats.
      margin_error: standard error of `margin` over the shared draws; NaN if there are too few draws.
      kind: "exact", "nelbo" or "pseudo".
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
) -> dict[int, Answer]:
    """Returns the answer to each question whose choices are rows of the batch.

    The choices of a question share noise levels and, slot by slot, masks. The difference of two choices therefore has
    less variance than each of them, and equal choices tie exactly (trap T25).

    Args:
      estimator: the estimator.
      model: the network.
      batch: one choice per row, after the prompt of its question.
      keys: random keys of the noise.
      questions: B question numbers; rows of one question have the same number.
      lengths: B lengths by which `best_normalised` divides, e.g. bytes as in lm-evaluation-harness; None = tokens.
      rows_per_pass: as in `score`.
    """
    numbers = np.asarray(questions, np.uint32)
    require(
        numbers.shape == (batch.tokens.shape[0],),
        f"{len(numbers)} question numbers for {batch.tokens.shape[0]} rows",
        where="choose",
        fix="Pass one question number per row.",
    )
    shared = batch.replace(example_ids=jnp.broadcast_to(jnp.asarray(numbers)[:, None], batch.tokens.shape))
    scores = score(estimator, model, shared, keys, rows_per_pass=rows_per_pass)
    return answers(scores, numbers.tolist(), scores.tokens if lengths is None else lengths)


def answers(scores: Scores, questions: Sequence[int], lengths: Sequence[float] | np.ndarray) -> dict[int, Answer]:
    """Returns the answer to each question whose choices are rows of `scores`; arguments as in `choose`."""
    numbers, per_length = np.asarray(questions), scores.log_likelihood / np.asarray(lengths, np.float64)
    found = {}
    for question in dict.fromkeys(numbers.tolist()):
        rows = np.nonzero(numbers == question)[0]
        order = rows[np.argsort(-scores.log_likelihood[rows], kind="stable")]
        best = int(np.nonzero(rows == order[0])[0][0])
        margin, error = float("nan"), float("nan")
        if len(order) > 1:
            margin = float(scores.log_likelihood[order[0]] - scores.log_likelihood[order[1]])
            error = _difference_error(scores, int(order[0]), int(order[1]))
        found[question] = Answer(best, int(np.argmax(per_length[rows])), margin, error, scores.kind)
    return found


def continuation_batch(
    prompts: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[int]],
    row_length: int,
    *,
    special: SpecialTokens,
) -> Batch:
    """Returns one row [BOS, prompt, continuation] per pair; the continuation is scored.

    Raises:
      ConfigError: a pair does not fit into a row. It is neither truncated nor skipped, because a default score of 0
        would be the highest of all log-likelihoods (trap T22).
    """
    rows = [
        [special.bos_id, *prompt, *continuation] for prompt, continuation in zip(prompts, continuations, strict=True)
    ]
    for number, row in enumerate(rows):
        require(
            len(row) <= row_length,
            f"pair {number} has {len(row)} tokens with BOS, but a row has only {row_length}",
            where="continuation_batch.row_length",
            fix="Truncate the prompt on the left, or use longer rows.",
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


def _difference_error(scores: Scores, first: int, second: int) -> float:
    """Returns the standard error of a difference: paired if both rows have the same draws, else as if independent."""
    if len(scores.samples[first]) == len(scores.samples[second]) > 1:
        return _standard_error(scores.samples[first] - scores.samples[second])
    return float(np.hypot(scores.standard_error[first], scores.standard_error[second]))
