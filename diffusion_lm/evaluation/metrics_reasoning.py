"""Statistics of metrics that check arithmetic: the answer after `####`, and the steps of Countdown."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

import numpy as np

ANSWER_MARK = "####"
_STEP = re.compile(r"\s*(\d+)\s*([-+*/])\s*(\d+)\s*=\s*(\d+)\s*")


def final_answer(text: str) -> str | None:
    """Returns the text after the last `####` of a chain of thought, without white space, commas and `$`.

    This is the convention of GSM8K (arXiv 2110.14168). Returns None if there is no mark or no text after it.
    """
    if ANSWER_MARK not in text:
        return None
    line = text.rsplit(ANSWER_MARK, 1)[1].strip().split("\n")[0]
    return re.sub(r"[\s,$]", "", line) or None


def same_answer(answer: str | None, reference: str) -> bool:
    """Returns whether two answers are the same text or the same number (`18` and `18.0`)."""
    if answer is None:
        return False
    if answer == reference:
        return True
    try:
        return Decimal(answer) == Decimal(reference)
    except InvalidOperation:
        return False


def answer_rows(references: Sequence[str], predictions: Sequence[str]) -> np.ndarray:
    """Returns f64[N, 3]: correct, has an answer, 1. A reference is the answer."""
    rows = []
    for reference, prediction in zip(references, predictions, strict=True):
        found = final_answer(prediction)
        rows.append([float(same_answer(found, reference)), float(found is not None), 1.0])
    return np.asarray(rows, np.float64).reshape(-1, 3)


def solves_countdown(numbers: Sequence[int], goal: int, steps: str) -> bool:
    """Returns whether `steps` reach the goal: every step is correct, uses available numbers, and all are used.

    Args:
      numbers: the numbers to use, each exactly once.
      goal: the only number that remains after the last step.
      steps: comma-separated equations such as `86+28=114`.
    """
    pool = Counter(numbers)
    for text in steps.strip().split(","):
        match = _STEP.fullmatch(text)
        if match is None:
            return False
        left, right, result = int(match[1]), int(match[3]), int(match[4])
        if not _is_right(left, match[2], right, result):
            return False
        pool.subtract([left, right])
        if min(pool[left], pool[right]) < 0:
            return False
        pool[result] += 1
    return +pool == Counter([goal])


def _is_right(left: int, operator: str, right: int, result: int) -> bool:
    if operator == "/":
        return right > 0 and left == right * result
    return {"+": left + right, "-": left - right, "*": left * right}[operator] == result


def countdown_rows(references: Sequence[Mapping[str, Any]], predictions: Sequence[str]) -> np.ndarray:
    """Returns f64[N, 2]: solved, 1. A reference is `{"numbers": [...], "goal": ...}`; any solution counts."""
    rows = [
        [float(solves_countdown(reference["numbers"], reference["goal"], prediction)), 1.0]
        for reference, prediction in zip(references, predictions, strict=True)
    ]
    return np.asarray(rows, np.float64).reshape(-1, 2)
