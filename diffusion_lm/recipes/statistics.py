"""How sure a score is: bootstrap intervals for corpus metrics, paired differences, the Wilson interval for pass rates.

Every metric here is a function of **summed sufficient statistics**: an example contributes one row of numbers, and the
score of any set of examples is a function of the sum of their rows. A mean has rows `(value, 1)`; corpus BLEU has rows
`(hypothesis length, reference length, matches 1..4, candidates 1..4)`. So the bootstrap never decodes or scores again.
"""

import itertools
from collections.abc import Callable, Mapping
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from diffusion_lm.core.errors import require

Aggregate = Callable[[np.ndarray], float]
"""Score of a set of examples from the sum of their rows: f64[K] -> float."""

_CHUNK_DRAWS = 4_000_000  # resample counts held at once; bounds memory for large evaluation sets


class Interval(NamedTuple):
    """A two-sided confidence interval, in the metric's own unit."""

    low: float
    high: float


class Difference(NamedTuple):
    """A paired difference of two arms on the same examples, `value = first - second`.

    Attributes:
      value: the observed difference.
      low, high: its percentile bootstrap interval.
      above_zero: share of the resamples in which the first arm scores higher (ties count half).
    """

    value: float
    low: float
    high: float
    above_zero: float


def mean_rows(values: np.ndarray) -> np.ndarray:
    """Returns the sufficient statistics f64[n, 2] of a mean over `values` f[n]; aggregate them with `ratio`."""
    values = np.asarray(values, np.float64)
    return np.stack([values, np.ones_like(values)], axis=1)


def ratio(total: np.ndarray) -> float:
    """First sum over second sum: the aggregate of `mean_rows`, and of any loss sum over its weight."""
    return float(total[0] / total[1]) if total[1] else 0.0


def bootstrap(
    stats: np.ndarray, aggregate: Aggregate, *, resamples: int = 1000, seed: int = 0, confidence: float = 0.95
) -> Interval:
    """Percentile bootstrap over examples (Efron and Tibshirani 1993, chapter 13; for MT metrics Koehn 2004).

    Args:
      stats: f[n, K], one row of sufficient statistics an example; or f[R, n, K], the rows of R replicates (other seeds,
        same examples), whose scores are averaged. Replicates are then drawn with replacement too.
      aggregate: turns the sum f64[K] of a resample's rows into its score.
      resamples: number of resamples, each of n examples drawn with replacement.
      seed: the same seed, n and number of resamples give the same interval.
      confidence: coverage of the interval.

    Returns:
      The interval; a single point when there is one example.

    Raises:
      ConfigError: no examples, a table that is not f[n, K], or numbers out of range.
    """
    stats = _checked(stats, resamples, confidence)
    return _percentiles(_resampled_scores([stats], aggregate, resamples, seed)[0], confidence)


def mean_score(stats: np.ndarray, aggregate: Aggregate) -> float:
    """Returns the score of f[n, K] statistics, or the mean of the replicates' scores of f[R, n, K]."""
    return float(np.mean([aggregate(table.sum(0)) for table in _with_replicates(stats)]))


def paired_difference(
    first: np.ndarray,
    second: np.ndarray,
    aggregate: Aggregate,
    *,
    resamples: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Difference:
    """Paired bootstrap of `aggregate(first) - aggregate(second)` (Koehn 2004).

    Both arms see the same resampled examples, so the interval is much narrower than what two separate
    intervals suggest: hard examples are hard for both.

    Args:
      first, second: f[n, K] or f[R, n, K] statistics of two arms, row i of both from the same example.
      aggregate, resamples, seed, confidence: as in `bootstrap`.

    Raises:
      ConfigError: as `bootstrap`, or when the two tables differ in shape.
    """
    first, second = _checked(first, resamples, confidence), _checked(second, resamples, confidence)
    require(
        first.shape == second.shape,
        f"A paired difference got statistics of shapes {first.shape} and {second.shape}",
        fix="Score both arms on the same examples.",
    )
    scores = _resampled_scores([first, second], aggregate, resamples, seed)
    differences = scores[0] - scores[1]
    low, high = _percentiles(differences, confidence)
    above = float(np.mean(differences > 0) + 0.5 * np.mean(differences == 0))
    return Difference(mean_score(first, aggregate) - mean_score(second, aggregate), low, high, above)


def all_differences(
    tables: Mapping[str, np.ndarray],
    aggregate: Aggregate,
    *,
    resamples: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> list[dict[str, str | float]]:
    """Paired differences of every two arms on one task, as the rows that `results["differences"][task]` holds.

    Args:
      tables: statistics f[n, K] or f[R, n, K] of each arm, row i of all of them from the same example.
      aggregate, resamples, seed, confidence: as in `bootstrap`.

    Returns:
      Rows `{"arm", "against", "value", "low", "high"}` with `value = score(arm) - score(against)`, in the order of
      `itertools.combinations`. Each resample is drawn once and scored once an arm.
    """
    if len(tables) < 2:
        return []
    checked = {name: _checked(table, resamples, confidence) for name, table in tables.items()}
    shapes = {table.shape for table in checked.values()}
    require(len(shapes) == 1, f"Arms scored on different examples: shapes {shapes}", fix="Score all on the same ones.")
    scores = dict(zip(checked, _resampled_scores([*checked.values()], aggregate, resamples, seed), strict=True))
    observed = {name: mean_score(table, aggregate) for name, table in checked.items()}
    rows: list[dict[str, str | float]] = []
    for first, second in itertools.combinations(checked, 2):
        low, high = _percentiles(scores[first] - scores[second], confidence)
        rows.append(
            {"arm": first, "against": second, "value": observed[first] - observed[second], "low": low, "high": high}
        )
    return rows


def wilson(successes: float, trials: int, *, confidence: float = 0.95) -> Interval:
    """Wilson score interval of a pass rate in [0, 1] (Wilson 1927).

    Unlike the bootstrap it does not collapse to a point when every example passes or fails. `successes` may be a
    fraction, e.g. the sum over problems of the unbiased pass@k estimate.

    Raises:
      ConfigError: no trials, or successes outside [0, trials].
    """
    require(trials > 0, f"A pass rate needs at least one trial, got {trials}")
    require(0 <= successes <= trials, f"A pass rate got {successes} successes of {trials} trials")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    rate, z2 = successes / trials, z * z
    centre = (rate + z2 / (2 * trials)) / (1 + z2 / trials)
    half = z / (1 + z2 / trials) * np.sqrt(rate * (1 - rate) / trials + z2 / (4 * trials * trials))
    return Interval(float(max(0.0, centre - half)), float(min(1.0, centre + half)))


def _with_replicates(stats: np.ndarray) -> np.ndarray:
    """Returns f64[R, n, K]: one replicate where there is no axis of replicates."""
    stats = np.asarray(stats, np.float64)
    return stats[None] if stats.ndim == 2 else stats


def _checked(stats: np.ndarray, resamples: int, confidence: float) -> np.ndarray:
    stats = _with_replicates(stats)
    require(
        stats.ndim == 3 and stats.shape[0] > 0 and stats.shape[1] > 0,
        f"The bootstrap needs statistics of shape [examples, K], got {stats.shape}",
        fix="Use mean_rows(values) for a plain mean.",
    )
    require(resamples > 0, f"The number of resamples must be positive, got {resamples}")
    require(0 < confidence < 1, f"Confidence must lie between 0 and 1, got {confidence}")
    return stats


def _resampled_scores(tables: list[np.ndarray], aggregate: Aggregate, resamples: int, seed: int) -> np.ndarray:
    """Scores f64[tables, resamples] of draws of n examples and of R replicates, each with replacement.

    Examples and replicates are crossed: every replicate was scored on the same examples, so a resample has one draw of
    examples for all replicates and one of replicates for all examples (Owen 2007, "The pigeonhole bootstrap"). All
    tables f[R, n, K] see the same draws.
    """
    replicates = tables[0].shape[0]
    columns = [table for stats in tables for table in stats]  # R tables f[n, K] for each of `tables`
    sums = _resampled_sums(np.concatenate(columns, axis=1), resamples, seed)
    scores = np.array([[aggregate(total) for total in part] for part in np.split(sums, len(columns), axis=1)]).reshape(
        len(tables), replicates, resamples
    )
    if replicates == 1:
        return scores[:, 0]
    uniform = np.full(replicates, 1.0 / replicates)
    counts = np.random.default_rng((seed, replicates)).multinomial(replicates, uniform, size=resamples)
    return np.einsum("arn,nr->an", scores, counts / replicates)


def _resampled_sums(stats: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Column sums f64[resamples, K] of `resamples` draws of n rows with replacement.

    A resample is a vector of counts, one an example, that is multinomial; the sums are then one matrix product.
    """
    examples = stats.shape[0]
    generator = np.random.default_rng(seed)
    uniform = np.full(examples, 1.0 / examples)
    step = max(1, _CHUNK_DRAWS // examples)
    parts = [
        generator.multinomial(examples, uniform, size=min(step, resamples - start)).astype(np.float64) @ stats
        for start in range(0, resamples, step)
    ]
    return np.concatenate(parts)


def _percentiles(scores: np.ndarray, confidence: float) -> Interval:
    low, high = np.quantile(scores, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(low), float(high))
