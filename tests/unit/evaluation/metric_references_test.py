"""Forms of references that data of the field come in: each is read as what it says, or refused by name."""

import collections
import random
import re
import string

import numpy as np
import pytest

from diffusion_lm.core.errors import ConfigError
from diffusion_lm.evaluation import metrics
from diffusion_lm.evaluation.metrics import METRICS

PASSES = "def f():\n    return 1"


def official_v2(questions, predictions):
    """SQuAD v2.0's scores in percent, written from the rules of Rajpurkar et al. 2018 and used by nothing else here.

    Args:
      questions: the answers of each question; a question without any is unanswerable.
      predictions: one text each; the empty one abstains.
    """

    def words(text):
        kept = [" " if c.isspace() else c for c in text.lower() if c not in set(string.punctuation)]
        return [word for word in re.split(r"\s+", re.sub(r"\b(?:the|an|a)\b", " ", "".join(kept))) if word]

    exact, f1 = [], []
    for answers, prediction in zip(questions, predictions, strict=True):
        usable = [words(answer) for answer in answers if words(answer)] or [[]]
        found = words(prediction)
        exact.append(100.0 * any(found == gold for gold in usable))
        overlaps = []
        for gold in usable:
            if not gold or not found:
                overlaps.append(100.0 * (gold == found))
                continue
            remaining, shared = list(gold), 0
            for word in found:
                if word in remaining:
                    remaining.remove(word)
                    shared += 1
            overlaps.append(200.0 * shared / (len(gold) + len(found)))
        f1.append(max(overlaps))
    has = [bool(answers) for answers in questions]
    scores = {"exact": np.mean(exact), "f1": np.mean(f1), "total": len(has)}
    for name, wanted in (("HasAns", True), ("NoAns", False)):
        chosen = [number for number, answerable in enumerate(has) if answerable == wanted]
        if chosen:
            scores[f"{name}_exact"] = np.mean([exact[number] for number in chosen])
            scores[f"{name}_f1"] = np.mean([f1[number] for number in chosen])
            scores[f"{name}_total"] = len(chosen)
    return scores


ADVERSARIAL = [
    ([], ""),
    ([], "The."),  # nothing is left of it: an abstention
    ([], "noon"),
    (["noon"], ""),
    (["noon", "at noon"], "At noon!"),
    (["the"], ""),  # an answer of which nothing is left
    (["the", "noon"], "a"),
    (["a"], "noon"),
    (["noon noon noon"], "noon noon"),
    (["U.S."], "us"),
    (["über den\tTeich"], "über   den teich"),
    (["anthem"], "the m"),
]


def test_squad_v2_is_the_official_script_on_random_and_adversarial_texts():
    draw = random.Random(0)
    vocabulary = ["the", "a", "noon", "Train", "train.", "8:15", "--", "an", "é", " "]

    def text():
        return " ".join(draw.choices(vocabulary, k=draw.randrange(5)))

    for number in range(200):
        cases = [([text() for _ in range(draw.randrange(4))], text()) for _ in range(6)] + ADVERSARIAL * (number == 0)
        questions, predictions = [list(part) for part in zip(*cases, strict=True)]
        expected = official_v2(questions, predictions)
        found = metrics.squad_v2([{"answers": answers} for answers in questions], predictions)
        assert found == pytest.approx(expected), cases


def test_squad_scores_unanswerable_questions_by_the_rule_of_v2_and_counts_them():
    references = [{"answers": ["noon"]}, {"answers": []}, {"answers": []}, {"answers": []}]
    scores = metrics.squad(references, ["noon", "", "the", "noon"])
    assert scores["f1"] == scores["em"] == pytest.approx(75)
    assert scores["answerable_f1"] == scores["answerable_em"] == pytest.approx(100)
    assert scores["unanswerable_em"] == pytest.approx(100 * 2 / 3)
    assert scores["unanswerable"] == 3
    assert set(metrics.squad(references[:1], ["noon"])) == {"f1", "em"}


@pytest.mark.parametrize(
    "reference",
    [
        {"answers": {"text": ["noon", "12"], "answer_start": [1, 4]}},  # Hugging Face
        {"answers": [{"text": "noon", "answer_start": 1}, {"text": "12", "answer_start": 4}]},  # the official file
        {"text": ["noon", "12"], "answer_start": [1, 4]},
        {"answers": np.array([b"noon", b"12"], object)},  # TFDS
        {"answers": ("noon", "12")},
        {"answers": "noon"},
        "noon",
        ["noon"],
    ],
)
def test_answers_are_read_in_every_form_that_data_sets_have(reference):
    assert metrics.squad([reference], ["At noon."])["f1"] == pytest.approx(100 * 2 / 3)
    assert metrics.squad_v2([reference], ["noon"])["f1"] == 100
    assert metrics.exact_match([reference], ["noon"])["exact_match"] == 100
    assert metrics.contains([reference], ["at noon"])["contains"] == 100


def test_tests_that_are_one_text_are_one_test():
    for tests in ("assert f() == 1", ["assert f() == 1"]):
        assert metrics.pass_at_k([{"setup": "", "tests": tests}], [[PASSES]])["pass_at_1"] == 100
        assert metrics.pass_at_k([{"setup": "", "tests": tests}], [["def f(): pass"]])["pass_at_1"] == 0


@pytest.mark.parametrize("tests", [[], "", ["", " \n"], "# nothing", ["pass"][:0]])
def test_a_problem_without_tests_is_an_error_and_not_solved(tests):
    with pytest.raises(ConfigError, match=r"example 1 has no test \(metric pass_at_k\)"):
        metrics.pass_at_k([{"setup": "", "tests": "assert f() == 1"}, {"setup": "", "tests": tests}], [[PASSES], [""]])


WRONG = {
    "bleu": [None, 3, {"answers": ["a"]}, ["a", "b"], []],
    "bleu_intl": [["a", "b"]],
    "rouge": [None, 3, ["a", "b"], {"text": "a"}],
    "number_match": [None, {}, [], [["1"]], {"answers": []}, "one", True],
    "squad": [None, 3, {}, {"answers": None}, [1], [["a"]], {"answers": {"answer_start": [1]}}, {"answers": [{}]}],
    "squad_v2": [None, {"answers": 1}],
    "pass_at_1": [None, "assert f() == 1", {}, {"tests": 1}, {"tests": [1]}, {"tests": ["x"], "setup": ["y"]}, ["x"]],
    "pass_at_k": [{"tests": {"a": "x"}}, {"tests": ["x"], "before": 1}],
    "exact_match": [None, {}, 3, [], {"answers": []}, [["a"]]],
    "contains": [None, [], {"answers": []}],
    "final_answer": [None, "no mark", {"answer": None}, {"answer": ["18"]}, {"answers": "18"}, 3],
    "countdown": [None, {"numbers": "1,2", "goal": 3}, {"numbers": ["1", "2"], "goal": 3}, {"numbers": [1, 2]}, [1]],
}


def test_every_metric_has_wrong_references_here():
    assert set(WRONG) == set(METRICS)


@pytest.mark.parametrize(("name", "reference"), [(name, value) for name, values in WRONG.items() for value in values])
def test_a_reference_of_the_wrong_kind_is_one_sentence_with_example_and_metric(name, reference):
    metric = METRICS[name]
    prediction = ["x"] if metric.multiple_samples else "x"
    with pytest.raises(ConfigError, match=rf"^[^\n]*example 7 \(id 99\)[^\n]*\(metric {name}\)[^\n]*$"):
        metric.per_example_batch([reference], [prediction], names=["example 7 (id 99)"])


@pytest.mark.parametrize("name", sorted(METRICS))
def test_a_prediction_of_the_wrong_kind_is_refused_too(name):
    good = collections.defaultdict(lambda: "1") | {
        "pass_at_1": {"tests": "assert 1"},
        "pass_at_k": {"tests": "assert 1"},
        "final_answer": {"answer": "1"},
        "countdown": {"numbers": [1], "goal": 1},
    }
    for wrong in (None, 3, ["a", 1] if METRICS[name].multiple_samples else ["a"]):
        with pytest.raises(ConfigError, match=rf"example 0 .*\(metric {name}\)"):
            METRICS[name].per_example_batch([good.get(name, "1")], [wrong])


def test_numbers_may_be_numbers():
    assert metrics.number_match([18, {"answers": [3, "4"]}], ["it is 18", "4"])["accuracy"] == 100
    assert metrics.final_answers([{"answer": 18}], ["#### 18"])["accuracy"] == 100
