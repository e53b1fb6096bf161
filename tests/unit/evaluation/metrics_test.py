"""Metrics against their published definitions."""

import itertools

import numpy as np
import pytest
import sacrebleu

from diffusion_lm.core.errors import ConfigError
from diffusion_lm.evaluation import metrics, metrics_rouge
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


@pytest.mark.parametrize(
    ("prediction", "right", "answered"),
    [
        ("<<16-3-4=9>> <<9*2=18>> #### 18", 1, 1),
        ("#### 18.0", 1, 1),
        ("#### $ 18\nand so on #", 1, 1),
        ("#### 9 #### 18", 1, 1),
        ("#### 18 #### 9", 0, 1),
        ("#### 180", 0, 1),
        ("#### eighteen", 0, 1),
        ("18", 0, 0),
        ("####", 0, 0),
        ("", 0, 0),
    ],
)
def test_final_answer_is_what_stands_behind_the_last_mark(prediction, right, answered):
    for reference in ({"answer": "18"}, "16 - 7 = 9; 9 * 2 = 18 #### 18"):
        scores = metrics.final_answers([reference, reference], [prediction, "#### 18"])
        assert scores == {"accuracy": 50 * right + 50, "answered": 50 * answered + 50}


def test_final_answer_with_thousands():
    assert metrics.final_answers([{"answer": "1400"}], ["#### 1,400"])["accuracy"] == 100
    assert metrics.final_answer("a #### 1,400 ") == "1400"


@pytest.mark.parametrize(
    ("steps", "solved"),
    [
        ("86+28=114,31-13=18,114-18=96", True),
        ("31-13=18,28-18=10,86+10=96", True),  # another solution
        (" 86 + 28 = 114, 31-13=18 ,114-18=96", True),
        ("86+28=114,31-13=18,114-18=95", False),  # a wrong step
        ("86+28=114,114-18=96,31-13=18", False),  # 18 is not there yet
        ("86+10=96", False),  # 10 never is
        ("31-13=18,114-18=96,86+28=114", False),
        ("86+28=114,86-13=73,114-18=96", False),  # 86 twice
        ("31-13=18", False),
        ("86+28=114,31-13=18,114-18=96,96/1=96", False),
        ("86+28=114,31-13=18", False),  # two numbers are left
        ("13-31=-18,86+28=114,114-18=96", False),
        ("96", False),
        ("", False),
    ],
)
def test_countdown_is_verified_step_by_step(steps, solved):
    reference = {"numbers": [86, 28, 13, 31], "goal": 96}
    assert metrics.countdown([reference], [steps]) == {"solved": 100.0 * solved}


def test_countdown_divides_exactly_and_takes_equal_numbers_once_each():
    twice = {"numbers": [6, 6, 3, 12], "goal": 14}
    assert metrics.countdown([twice], ["6*6=36,36/3=12,12+12=24"])["solved"] == 0
    assert metrics.countdown([twice], ["6/6=1,3-1=2,12+2=14"])["solved"] == 100
    assert metrics.countdown([twice], ["12/6=2,6/3=2,2+2=4"])["solved"] == 0
    assert metrics.countdown([{"numbers": [7, 2], "goal": 3}], ["7/2=3"])["solved"] == 0
    assert metrics.countdown([{"numbers": [7, 7], "goal": 0}], ["7/0=0,7-7=0"])["solved"] == 0


def test_bleu_says_which_tokenisation():
    """`intl` splits at Unicode punctuation that 13a leaves inside a word."""
    references, predictions = ["Das \u201eHaus\u201c steht dort drüben"], ["Das Haus steht dort drüben"]
    scores = {name: METRICS[name](references, predictions)["bleu"] for name in ("bleu", "bleu_intl")}
    for name, tokenize in (("bleu", "13a"), ("bleu_intl", "intl")):
        expected = sacrebleu.corpus_bleu(predictions, [references], tokenize=tokenize).score
        assert scores[name] == pytest.approx(expected, abs=1e-9)
        assert f"tok:{tokenize}" in METRICS[name].conditions
    assert scores["bleu"] != scores["bleu_intl"]
    assert metrics.bleu_intl(references, references)["bleu"] == pytest.approx(100)


@pytest.mark.parametrize(
    ("reference", "prediction", "expected"),
    [
        # Lin (2004), section 3: both candidates share one pair, ROUGE-L tells them apart.
        ("police killed the gunman", "police kill the gunman", (3 / 4, 1 / 3, 3 / 4)),
        ("police killed the gunman", "the gunman kill police", (3 / 4, 1 / 3, 1 / 2)),
        # The examples of the rouge-score package.
        (
            "The quick brown fox jumps over the lazy dog",
            "The quick brown dog jumps on the log.",
            (12 / 17, 4 / 15, 10 / 17),
        ),
        ("testing one two", "testing", (1 / 2, 0, 1 / 2)),
        ("testing one two", "testing one", (4 / 5, 2 / 3, 4 / 5)),
        ("a b", "", (0, 0, 0)),
        ("", "", (0, 0, 0)),
    ],
)
def test_rouge_of_published_examples(reference, prediction, expected):
    assert metrics_rouge.rouge_f1(reference, prediction) == pytest.approx(expected)
    scores = metrics.rouge([reference], [prediction])
    assert tuple(scores[name] for name in metrics_rouge.ROUGE_NAMES) == pytest.approx(tuple(100 * e for e in expected))


def test_rouge_is_a_mean_over_examples():
    rows = METRICS["rouge"].per_example_batch(["a b", "c d"], ["a b", "x"])
    assert METRICS["rouge"].aggregate(rows) == 50
    assert METRICS["rouge"].secondary(rows) == {"rouge1": 50, "rouge2": 50}


def test_the_last_number_counts():
    texts = ["so 3 x 4 = 12 apples. The answer is 1,234.", "18.00", "-7", "none", "2.50"]
    assert [metrics.last_number(text) for text in texts] == ["1234", "18", "-7", None, "2.5"]
    references = [{"answers": ["1234"]}, "18", "7", "4", {"answers": ["2.5"]}]
    assert metrics.number_match(references, texts)["accuracy"] == 60
    assert metrics.number_match(["1"], ["nothing"])["accuracy"] == 0
    with pytest.raises(ConfigError, match="'nothing': must contain a number"):
        metrics.number_match(["nothing"], ["nothing"])
