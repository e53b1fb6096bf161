"""Metrics against their published definitions."""

import itertools

import numpy as np
import pytest
import sacrebleu

from diffusion_lm.core.errors import ConfigError
from diffusion_lm.evaluation import metrics
from diffusion_lm.evaluation.metrics import METRICS

REFERENCES = ["le chat est sur le tapis rouge .", "bonjour le monde entier", "il fait beau aujourd'hui , non ?"]
PREDICTIONS = ["le chat est sur un tapis rouge .", "bonjour monde entier", ""]


def test_bleu_is_sacrebleu_and_bootstraps_over_summed_rows():
    metric = METRICS["bleu"]
    rows = metric.per_example_batch(REFERENCES, PREDICTIONS)
    assert metric.aggregate(rows) == pytest.approx(sacrebleu.corpus_bleu(PREDICTIONS, [REFERENCES]).score, abs=1e-9)
    assert metric.aggregate(rows.sum(0)) == metric.aggregate(rows)
    resample = [1, 0, 0]
    expected = sacrebleu.corpus_bleu([PREDICTIONS[i] for i in resample], [[REFERENCES[i] for i in resample]]).score
    assert metric.aggregate(rows[resample]) == pytest.approx(expected, abs=1e-9)
    assert "tok:13a" in metrics.bleu_signature()
    assert metrics.bleu_signature() in metric.conditions


def test_bleu_of_silence_is_zero_and_of_the_reference_is_100():
    assert metrics.bleu(["un", "deux"], ["", ""])["bleu"] == 0
    assert metrics.bleu(REFERENCES, REFERENCES)["bleu"] == pytest.approx(100)


@pytest.mark.parametrize(
    ("prediction", "answers", "exact", "f1"),
    [
        ("The Eiffel Tower!", ["eiffel tower"], 100, 100),
        ("in Paris, France", ["Paris", "France"], 0, 50),
        ("an apple", ["banana"], 0, 0),
        ("", ["the"], 100, 0),  # both normalise to nothing: the official rule says EM 1 and F1 0
        ("anthem", ["them"], 0, 0),  # articles are words, not parts of words
    ],
)
def test_squad_official_rules(prediction, answers, exact, f1):
    scores = metrics.squad([{"answers": answers}], [prediction])
    assert scores["em"] == pytest.approx(exact)
    assert scores["f1"] == pytest.approx(f1)


def test_pass_at_k_is_the_chance_that_a_random_subset_passes():
    for n, c in itertools.product(range(1, 6), repeat=2):
        for k in range(1, n + 1):
            if c <= n:
                subsets = list(itertools.combinations(range(n), k))
                chance = np.mean([any(i < c for i in subset) for subset in subsets])
                assert metrics.pass_at_k_estimate(n, c, k) == pytest.approx(chance)
    with pytest.raises(ConfigError, match="at least k samples"):
        metrics.pass_at_k_estimate(3, 1, 4)


def test_pass_at_k_runs_the_tests():
    references = [{"setup": "import math", "tests": ["assert f(2) == 4", "assert f(3) == 9"]}] * 2
    good, wrong, partly = "def f(x):\n    return x * x", "def f(x:", "def f(x):\n    return 2 * x"
    scores = metrics.pass_at_k(references, [[good, wrong, partly, wrong], [wrong] * 4])
    assert scores["pass_at_1"] == pytest.approx(12.5)
    assert scores["pass_at_k"] == pytest.approx(50)
    assert scores["k"] == 4
    assert METRICS["pass_at_1"].aggregate(METRICS["pass_at_1"].per_example_batch(references[:1], [good])) == 100


def test_exact_match_takes_any_reference():
    assert metrics.exact_match(["a ", {"answers": ["x", "b"]}], ["a", "b\n"])["exact_match"] == 100
    assert metrics.exact_match(["a"], ["A"])["exact_match"] == 0


def test_missing_predictions_are_refused():
    with pytest.raises(ConfigError, match="2 references but 1 predictions"):
        METRICS["squad"](["a", "b"], ["a"])
