"""Statistics of ROUGE (Lin 2004), with the tokenisation and F1 of the rouge-score package."""

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

ROUGE_NAMES = ("rouge1", "rouge2", "rougeL")


def rouge_tokens(text: str) -> list[str]:
    """Returns the runs of ASCII letters and digits of the lower-cased text, without stemming, as rouge-score does."""
    return re.findall(r"[a-z0-9]+", text.lower())


def rouge_f1(reference: str, prediction: str) -> tuple[float, float, float]:
    """Returns the F1 of unigrams, of bigrams, and of the longest common subsequence, each in [0, 1]."""
    gold, found = rouge_tokens(reference), rouge_tokens(prediction)
    scores = []
    for n in (1, 2):
        ours, theirs = (Counter(zip(*(tokens[i:] for i in range(n)), strict=False)) for tokens in (found, gold))
        scores.append(_f1(sum((ours & theirs).values()), sum(ours.values()), sum(theirs.values())))
    longest = _f1(_common_subsequence(gold, found), len(found), len(gold))
    return scores[0], scores[1], longest


def _f1(shared: int, predicted: int, gold: int) -> float:
    return 2 * shared / (predicted + gold) if shared else 0.0


def _common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    """Returns the length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for x in a:
        above = 0  # value of the previous row at column j - 1
        for j, y in enumerate(b, 1):
            above, row[j] = row[j], above + 1 if x == y else max(row[j], row[j - 1])
    return row[-1]


def rouge_rows(references: Sequence[str], predictions: Sequence[str]) -> np.ndarray:
    """Returns f64[N, 4]: the three scores of `ROUGE_NAMES`, 1."""
    rows = [[*rouge_f1(r, p), 1.0] for r, p in zip(references, predictions, strict=True)]
    return np.asarray(rows, np.float64).reshape(-1, 4)
