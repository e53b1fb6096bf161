"""Confidence intervals: bootstrap for corpus metrics and paired differences, Wilson interval for pass rates.

Every metric here is a function of **summed sufficient statistics**: an example contributes one row of numbers, and the
score of a set of examples is a function of the sum of their rows. A mean has rows `(value, 1)`; corpus BLEU has rows
`(hypothesis length, reference length, matches 1..4, candidates 1..4)`. The bootstrap therefore resamples rows, and
neither decodes nor scores again.
"""

import itertools
from collections.abc import Callable, Mapping
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from diffusion_lm.core.errors import require

Aggregate = Callable[[np.ndarray], float]
"""Score of a set of examples from the sum of their rows: f64[K] -> float."""

_CHUNK_DRAWS = 4_000_000  # maximum number of resample counts in memory, for large evaluation sets


class Interval(NamedTuple):
    """A two-sided confidence interval, in the metric's unit."""

    low: float
    high: float


class Difference(NamedTuple):
    """A paired difference of two arms on the same examples, `value = first - second`.

    Attributes:
      value: the observed difference.
      low, high: its percentile bootstrap interval.
      above_zero: fraction of resamples in which the first arm scores higher (ties count half).
    """

    value: float
    low: float
    high: float
    above_zero: float


def mean_rows(values: np.ndarray) -> np.ndarray:
    """Returns the sufficient statistics f64[n, 2] of the mean of `values` f[n]; aggregate them with `ratio`."""
    values = np.asarray(values, np.float64)
    return np.stack([values, np.ones_like(values)], axis=1)


def ratio(total: np.ndarray) -> float:
    """Returns the first sum divided by the second: the aggregate of `mean_rows`, and of a loss sum and its weight."""
    return float(total[0] / total[1]) if total[1] else 0.0


def bootstrap(
    stats: np.ndarray, aggregate: Aggregate, *, resamples: int = 1000, seed: int = 0, confidence: float = 0.95
) -> Interval:
    """Percentile bootstrap over examples (Efron and Tibshirani 1993, chapter 13; for MT metrics Koehn 2004).

    Args:
      stats: f[n, K], one row of sufficient statistics per example; or f[R, n, K] for R replicates (different seeds,
        same examples), whose scores are averaged. Replicates are then also drawn with replacement.
      aggregate: maps the sum f64[K] of a resample's rows to its score.
      resamples: number of resamples, each of n examples drawn with replacement.
      seed: the interval is a function of seed, n and resamples.
      confidence: coverage of the interval.

    Returns:
      The interval; a single point if there is one example.

    Raises:
      ConfigError: no examples, wrong shape of `stats`, or `resamples` or `confidence` out of range.
    """
    stats = _checked(stats, resamples, confidence)
    return _percentiles(_resampled_scores([stats], aggregate, resamples, seed)[0], confidence)


def mean_score(stats: np.ndarray, aggregate: Aggregate) -> float:
    """Returns the score of statistics f[n, K], or the mean score of the replicates f[R, n, K]."""
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

    Both arms are scored on the same resampled examples. Difficulty of an example affects both, so the interval of the
    difference is much narrower than two separate intervals suggest.

    Args:
      first, second: statistics f[n, K] or f[R, n, K] of two arms; row i of both is the same example.
      aggregate, resamples, seed, confidence: as in `bootstrap`.

    Raises:
      ConfigError: as in `bootstrap`, or the two tables differ in shape.
    """
    first, second = _checked(first, resamples, confidence), _checked(second, resamples, confidence)
    require(
        first.shape == second.shape,
        f"statistics of two arms have different shapes: {first.shape} and {second.shape}",
        where="paired_difference",
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
    """Returns the paired differences of all pairs of arms on one task, as in `results["differences"][task]`.

    Args:
      tables: statistics f[n, K] or f[R, n, K] of each arm; row i of all of them is the same example.
      aggregate, resamples, seed, confidence: as in `bootstrap`.

    Returns:
      Rows `{"arm", "against", "value", "low", "high"}` with `value = score(arm) - score(against)`, in the order of
      `itertools.combinations`. Each resample is drawn once and scored once per arm.
    """
    if len(tables) < 2:
        return []
    checked = {name: _checked(table, resamples, confidence) for name, table in tables.items()}
    shapes = {table.shape for table in checked.values()}
    require(
        len(shapes) == 1,
        f"statistics of the arms have different shapes: {sorted(shapes)}",
        where="all_differences",
        fix="Score all arms on the same examples.",
    )
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
    """Returns the Wilson score interval of a pass rate in [0, 1] (Wilson 1927).

    Unlike the bootstrap interval it is not a single point if every example passes or fails. `successes` may be
    fractional, e.g. the sum over problems of the unbiased pass@k estimate.

    Raises:
      ConfigError: no trials, or successes outside [0, trials].
    """
    require(trials > 0, f"trials={trials}: must be >= 1", where="wilson")
    require(0 <= successes <= trials, f"successes={successes}: must be in [0, {trials}]", where="wilson")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    rate, z2 = successes / trials, z * z
    centre = (rate + z2 / (2 * trials)) / (1 + z2 / trials)
    half = z / (1 + z2 / trials) * np.sqrt(rate * (1 - rate) / trials + z2 / (4 * trials * trials))
    return Interval(float(max(0.0, centre - half)), float(min(1.0, centre + half)))


def _with_replicates(stats: np.ndarray) -> np.ndarray:
    """Returns f64[R, n, K], with R = 1 if `stats` has no replicate axis."""
    stats = np.asarray(stats, np.float64)
    return stats[None] if stats.ndim == 2 else stats


def _checked(stats: np.ndarray, resamples: int, confidence: float) -> np.ndarray:
    stats = _with_replicates(stats)
    require(
        stats.ndim == 3 and stats.shape[0] > 0 and stats.shape[1] > 0,
        f"statistics have shape {stats.shape}: must be [examples, K] or [replicates, examples, K], not empty",
        where="bootstrap",
        fix="Use mean_rows(values) for a plain mean.",
    )
    require(resamples > 0, f"resamples={resamples}: must be >= 1", where="Comparison.resamples")
    require(0 < confidence < 1, f"confidence={confidence}: must be in (0, 1)", where="bootstrap")
    return stats


def _resampled_scores(tables: list[np.ndarray], aggregate: Aggregate, resamples: int, seed: int) -> np.ndarray:
    """Returns scores f64[tables, resamples]; a resample draws n examples and R replicates with replacement.

    Examples and replicates are crossed, because every replicate was scored on the same examples. A resample therefore
    has one draw of examples for all replicates, and one draw of replicates for all examples (Owen 2007, "The pigeonhole
    bootstrap"). All tables f[R, n, K] share the draws.
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
    """Returns column sums f64[resamples, K] over draws of n rows with replacement.

    A resample is a multinomial vector with one count per example, so the sums are one matrix product.
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
