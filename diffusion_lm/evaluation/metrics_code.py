"""Statistics of pass@k (Chen et al. 2021, section 2.1): runs samples with the tests of their problem."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from diffusion_lm.core.errors import require
from diffusion_lm.evaluation.code_runner import run_programs


def pass_at_k_estimate(samples: int, correct: int, k: int) -> float:
    """Returns the unbiased estimate 1 - C(n-c, k) / C(n, k) of the probability that one of k samples passes.

    Raises:
      ConfigError: k is less than 1 or greater than the number of samples.
    """
    require(1 <= k <= samples, f"k={k}: must be in [1, {samples}]", where="pass@k", fix="Draw at least k samples.")
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def program_with_tests(reference: Mapping[str, Any], solution: str) -> str:
    """Returns a program with the solution, the setup code and the tests; it passes if the solution is correct.

    `reference` is `{"setup": str, "tests": [statement, ...]}`, for infilling also with the code "before" and "after"
    the gap. MBPP's `[DONE]` and the text after it are removed from the solution.
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
