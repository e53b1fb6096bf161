"""Statistics of metrics that compare a text with answers: SQuAD F1 and exact match, containment, last number.

Normalisation follows SQuAD's official evaluate-v1.1.py (Rajpurkar et al. 2016).
"""

import re
import string
from collections import Counter
from collections.abc import Sequence

import numpy as np


def normalize_answer(text: str) -> str:
    """Lower-cases, removes ASCII punctuation, replaces articles by a space and collapses white space, in that order."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def answer_f1(prediction: str, answer: str) -> float:
    """Returns the token-overlap F1 of the normalised texts; 0 if they share no token (also if both are empty)."""
    predicted, gold = normalize_answer(prediction).split(), normalize_answer(answer).split()
    shared = sum((Counter(predicted) & Counter(gold)).values())
    if not shared:
        return 0.0
    precision, recall = shared / len(predicted), shared / len(gold)
    return 2 * precision * recall / (precision + recall)


def squad_rows(references: Sequence[Sequence[str]], predictions: Sequence[str]) -> np.ndarray:
    """Returns f64[N, 5]: exact match, F1, exact match of an unanswerable question, has an answer, 1.

    Exact match and F1 are maxima over the answers, as in v1.1, and 0 for an unanswerable question. v1.1 has no
    unanswerable questions; they are scored as in v2.0: 1 if the normalised prediction is empty, otherwise 0.
    """
    rows = []
    for answers, prediction in zip(references, predictions, strict=True):
        if not answers:
            rows.append([0.0, 0.0, float(not normalize_answer(prediction)), 0.0, 1.0])
            continue
        exact = max(float(normalize_answer(prediction) == normalize_answer(answer)) for answer in answers)
        rows.append([exact, max(answer_f1(prediction, answer) for answer in answers), 0.0, 1.0, 1.0])
    return np.asarray(rows, np.float64).reshape(-1, 5)


def squad_v2_rows(references: Sequence[Sequence[str]], predictions: Sequence[str]) -> np.ndarray:
    """Returns f64[N, 6]: exact match, F1, 1 for questions with answers; then the same three for those without.

    Rules of the official evaluate-v2.0.py (Rajpurkar et al. 2018): answers that are empty after normalisation are
    ignored, and if none remains, the prediction must be empty too. Whether a question has answers is determined before
    normalisation.
    """
    rows = []
    for answers, prediction in zip(references, predictions, strict=True):
        gold = [normalize_answer(answer) for answer in answers if normalize_answer(answer)]
        found = normalize_answer(prediction)
        if gold and found:
            exact = max(float(found == answer) for answer in gold)
            f1 = max(answer_f1(found, answer) for answer in gold)
        else:
            exact = f1 = float(not gold and not found)
        scores = [exact, f1, 1.0]
        rows.append([*scores, 0.0, 0.0, 0.0] if answers else [0.0, 0.0, 0.0, *scores])
    return np.asarray(rows, np.float64).reshape(-1, 6)


def contains_rows(references: Sequence[Sequence[str]], predictions: Sequence[str]) -> np.ndarray:
    """Returns f64[N, 2]: whether the normalised text contains a normalised answer, 1.

    This is DiffuLLaMA's metric for TriviaQA (arXiv 2410.17891). Answers that are empty after normalisation never match.
    """
    rows = []
    for reference, prediction in zip(references, predictions, strict=True):
        text, answers = normalize_answer(prediction), map(normalize_answer, reference)
        rows.append([float(any(answer and answer in text for answer in answers)), 1.0])
    return np.asarray(rows, np.float64).reshape(-1, 2)


def last_number(text: str) -> str | None:
    """Returns the last number of a text, without thousands separators and trailing zeros of the fraction, or None."""
    found = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
    if not found:
        return None
    number = found[-1].replace(",", "")
    return number.rstrip("0").rstrip(".") if "." in number else number


def number_rows(references: Sequence[Sequence[str]], predictions: Sequence[str]) -> np.ndarray:
    """Returns f64[N, 2]: whether the last number is (one of) the answer(s), 1."""
    rows = []
    for reference, prediction in zip(references, predictions, strict=True):
        answers = {last_number(answer) for answer in reference}
        rows.append([float(last_number(prediction) in answers - {None}), 1.0])
    return np.asarray(rows, np.float64).reshape(-1, 2)


def exact_rows(references: Sequence[Sequence[str]], predictions: Sequence[str]) -> np.ndarray:
    """Returns f64[N, 2]: whether the text equals (one of) the answer(s), ignoring surrounding white space, 1."""
    rows = [[float(any(p.strip() == a.strip() for a in r)), 1.0] for r, p in zip(references, predictions, strict=True)]
    return np.asarray(rows, np.float64).reshape(-1, 2)
