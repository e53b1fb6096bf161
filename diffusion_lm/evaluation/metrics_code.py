"""Rows of pass@k (Chen et al. 2021, section 2.1): samples are run with the tests of their problem."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from diffusion_lm.core.errors import require
from diffusion_lm.evaluation.code_runner import run_programs


def pass_at_k_estimate(samples: int, correct: int, k: int) -> float:
    """Returns the unbiased estimate 1 - C(n-c, k) / C(n, k) of the chance that one of k samples passes.

    Raises:
      ConfigError: for k below 1 or above the number of samples, where the estimator does not exist.
    """
    require(1 <= k <= samples, f"k = {k} with {samples} samples", where="pass@k", fix="Draw at least k samples.")
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def program_with_tests(reference: Mapping[str, Any], solution: str) -> str:
    """Returns the program that passes if the solution does: the solution, the set-up code, then the tests.

    `reference` is `{"setup": str, "tests": [statement, ...]}`, with the code around a gap as "before" and "after". A
    completion may close with MBPP's `[DONE]`.
    """
    solution = reference.get("before", "") + solution.split("[DONE]")[0] + reference.get("after", "")
    return "\n".join([solution, reference.get("setup", ""), *reference["tests"]]) + "\n"


def code_rows(references: Sequence[Mapping[str, Any]], samples: Sequence[Sequence[str]]) -> np.ndarray:
    """Returns f64[N, 4]: pass@1, pass@k at k = all samples, samples, 1."""
    programs = [program_with_tests(r, s) for r, group in zip(references, samples, strict=True) for s in group]
    results = iter(run_programs(programs))
    rows = []
    for group in samples:
        n, correct = len(group), sum(next(results).passed for _ in group)
        if n:
            rows.append([pass_at_k_estimate(n, correct, 1), pass_at_k_estimate(n, correct, n), n, 1.0])
        else:
            rows.append([0.0, 0.0, 0.0, 1.0])
    return np.asarray(rows, np.float64).reshape(-1, 4)
