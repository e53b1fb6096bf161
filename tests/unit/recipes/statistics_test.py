"""Intervals agree with scipy and with closed forms, and mean what they say."""

import numpy as np
import pytest
import sacrebleu
from scipy import stats as scipy_stats

from diffusion_lm.core.errors import ConfigError
from diffusion_lm.recipes import statistics


def test_bootstrap_of_a_mean_agrees_with_scipy():
    values = np.random.default_rng(1).gamma(2.0, 10.0, size=200)
    ours = statistics.bootstrap(statistics.mean_rows(values), statistics.ratio, resamples=8000)
    theirs = scipy_stats.bootstrap((values,), np.mean, n_resamples=8000, method="percentile", rng=2)
    width = theirs.confidence_interval.high - theirs.confidence_interval.low
    assert ours.low == pytest.approx(theirs.confidence_interval.low, abs=0.06 * width)
    assert ours.high == pytest.approx(theirs.confidence_interval.high, abs=0.06 * width)


def test_bootstrap_of_a_ratio_of_sums_agrees_with_scipy():
    generator = np.random.default_rng(5)
    tokens = generator.integers(1, 50, size=150).astype(float)
    losses = tokens * generator.gamma(3.0, 1.0, size=150)
    ours = statistics.bootstrap(np.stack([losses, tokens], 1), statistics.ratio, resamples=8000)
    theirs = scipy_stats.bootstrap(
        (losses, tokens),
        lambda a, b, axis: a.sum(axis) / b.sum(axis),
        paired=True,
        vectorized=True,
        n_resamples=8000,
        method="percentile",
        rng=3,
    ).confidence_interval
    np.testing.assert_allclose(ours, theirs, atol=0.06 * (theirs.high - theirs.low))


def test_interval_covers_the_truth_as_often_as_it_says():
    generator = np.random.default_rng(7)
    hits = 0
    for trial in range(300):
        values = generator.normal(3.0, 2.0, size=80)
        low, high = statistics.bootstrap(statistics.mean_rows(values), statistics.ratio, resamples=300, seed=trial)
        hits += low <= 3.0 <= high
    assert 0.90 <= hits / 300 <= 0.98


def test_corpus_bleu_from_summed_statistics():
    generator = np.random.default_rng(0)
    words = np.array(["le", "la", "chat", "chien", "mange", "voit", "une", "pomme", "petite", "maison", "ici", "là"])
    references = [" ".join(generator.choice(words, size=9)) for _ in range(60)]
    outputs = [" ".join(word if generator.random() < 0.7 else "non" for word in line.split()) for line in references]
    metric = sacrebleu.BLEU()
    rows = np.array(metric._extract_corpus_statistics(outputs, [references]), np.float64)

    def aggregate(total):
        return metric._compute_score_from_stats([int(x) for x in total]).score

    score = metric.corpus_score(outputs, [references]).score
    assert aggregate(rows.sum(0)) == pytest.approx(score)
    low, high = statistics.bootstrap(rows, aggregate, resamples=500)
    assert low < score < high
    assert high - low < 0.5 * score


def test_same_seed_same_interval_and_chunks_do_not_matter(monkeypatch):
    rows = statistics.mean_rows(np.random.default_rng(0).normal(size=50))
    once = statistics.bootstrap(rows, statistics.ratio, resamples=200, seed=4)
    monkeypatch.setattr(statistics, "_CHUNK_DRAWS", 50 * 7)
    assert statistics.bootstrap(rows, statistics.ratio, resamples=200, seed=4) == once
    assert statistics.bootstrap(rows, statistics.ratio, resamples=200, seed=5) != once


def test_paired_difference_is_narrower_than_unpaired_and_signed():
    generator = np.random.default_rng(3)
    difficulty = generator.normal(50, 20, size=120)
    first, second = difficulty + 2 + generator.normal(0, 1, 120), difficulty + generator.normal(0, 1, 120)
    rows = statistics.mean_rows(first), statistics.mean_rows(second)
    paired = statistics.paired_difference(*rows, statistics.ratio)
    alone = statistics.bootstrap(rows[0], statistics.ratio)
    assert paired.value == pytest.approx(np.mean(first - second))
    assert 0 < paired.low < paired.value < paired.high
    assert paired.high - paired.low < 0.2 * (alone.high - alone.low)
    assert paired.above_zero == 1.0
    reverse = statistics.paired_difference(*rows[::-1], statistics.ratio)
    np.testing.assert_allclose([reverse.low, reverse.high], [-paired.high, -paired.low], rtol=1e-9)


def test_paired_difference_of_equal_arms_is_a_tie():
    rows = statistics.mean_rows(np.random.default_rng(0).normal(size=30))
    difference = statistics.paired_difference(rows, rows, statistics.ratio, resamples=50)
    assert difference == (0.0, 0.0, 0.0, 0.5)


def test_all_differences_are_the_paired_differences():
    generator = np.random.default_rng(2)
    tables = {
        name: statistics.mean_rows(generator.normal(shift, 1, 60)) for name, shift in zip("abc", (0, 1, 3), strict=True)
    }
    rows = statistics.all_differences(tables, statistics.ratio, resamples=200, seed=9)
    assert [(row["arm"], row["against"]) for row in rows] == [("a", "b"), ("a", "c"), ("b", "c")]
    for row in rows:
        alone = statistics.paired_difference(
            tables[row["arm"]], tables[row["against"]], statistics.ratio, resamples=200, seed=9
        )
        np.testing.assert_allclose([row["value"], row["low"], row["high"]], alone[:3], rtol=1e-9)


@pytest.mark.parametrize(("successes", "trials"), [(0, 20), (7, 20), (20, 20), (1, 974)])
def test_wilson_agrees_with_scipy(successes, trials):
    theirs = scipy_stats.binomtest(successes, trials).proportion_ci(0.95, method="wilson")
    np.testing.assert_allclose(statistics.wilson(successes, trials), (theirs.low, theirs.high), atol=1e-9)


def test_wilson_stays_open_at_the_ends():
    assert statistics.wilson(0, 30).high > 0.05
    assert statistics.wilson(30, 30).low < 0.95


@pytest.mark.parametrize(
    "call",
    [
        lambda: statistics.bootstrap(np.zeros((0, 2)), statistics.ratio),
        lambda: statistics.bootstrap(np.zeros(5), statistics.ratio),
        lambda: statistics.bootstrap(np.ones((5, 2)), statistics.ratio, resamples=0),
        lambda: statistics.bootstrap(np.ones((5, 2)), statistics.ratio, confidence=95),
        lambda: statistics.paired_difference(np.ones((5, 2)), np.ones((4, 2)), statistics.ratio),
        lambda: statistics.wilson(1, 0),
        lambda: statistics.wilson(4, 3),
    ],
)
def test_wrong_inputs_are_config_errors(call):
    with pytest.raises(ConfigError):
        call()


def test_one_replicate_is_none():
    stats = statistics.mean_rows(np.random.default_rng(0).random(30))
    assert statistics.bootstrap(stats[None], statistics.ratio) == statistics.bootstrap(stats, statistics.ratio)


def test_intervals_cover_the_replicates():
    """All examples agree within a replicate, so only the replicates differ: 4 of them, with means 0, 1, 2, 3."""
    tables = np.stack([statistics.mean_rows(np.full(50, float(value))) for value in range(4)])
    assert statistics.mean_score(tables, statistics.ratio) == 1.5
    low, high = statistics.bootstrap(tables, statistics.ratio, resamples=4000)
    # The mean of 4 draws of {0, 1, 2, 3}: P(mean <= 0.25) = 5/256 < 2.5 % < P(mean <= 0.5) = 15/256.
    assert (low, high) == (0.5, 2.5)
    assert statistics.bootstrap(tables[:1], statistics.ratio) == (0.0, 0.0)


def test_paired_differences_pair_the_replicates():
    """The second arm is one better in each replicate, whatever the seed: nothing is left to chance."""
    first = np.stack([statistics.mean_rows(np.full(50, float(value))) for value in (0, 5, 9)])
    second = np.stack([statistics.mean_rows(np.full(50, float(value + 1))) for value in (0, 5, 9)])
    found = statistics.paired_difference(second, first, statistics.ratio)
    assert (found.value, found.low, found.high) == pytest.approx((1.0, 1.0, 1.0))
    (row,) = statistics.all_differences({"b": second, "a": first}, statistics.ratio)
    assert (row["value"], row["low"], row["high"]) == pytest.approx((1.0, 1.0, 1.0))
