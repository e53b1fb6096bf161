"""What `evaluate --suite` does: the evaluations of a gin file, on a run's model."""

import argparse
import dataclasses
from typing import Any

from diffusion_lm.cli import config
from diffusion_lm.cli.output import progress
from diffusion_lm.cli.run_folder import OpenRun
from diffusion_lm.cli.search_path import split_search_path
from diffusion_lm.core.errors import require
from diffusion_lm.evaluation.generation import GenerationEvaluation
from diffusion_lm.evaluation.scoring_task import ScoringEvaluation, mismatches


def evaluations(arguments: argparse.Namespace, opened: OpenRun) -> tuple[Any, ...]:
    """Returns the evaluations of the file's SUITE; what an estimator takes otherwise than the training is recorded.

    Raises:
      ConfigError: the file defines no suite, two of its evaluations have one name, or an estimator masks with a token
        that the run never saw as MASK.
    """
    search_path = split_search_path(arguments.gin_search_path)
    found = config.load([arguments.suite], arguments.gin, search_path, macros=["SUITE"]).build_macro("SUITE")
    suite = found if isinstance(found, tuple | list) else (found,)
    names = [one.name for one in suite if isinstance(one, GenerationEvaluation | ScoringEvaluation)]
    require(
        len(names) == len(suite) == len(set(names)) > 0,
        f"SUITE is {suite!r}",
        where=arguments.suite,
        fix="Make it a tuple of ScoringEvaluation and GenerationEvaluation with names of their own.",
    )
    return tuple(_compared(one, opened) for one in suite)


def _compared(evaluation: Any, opened: OpenRun) -> Any:
    if not isinstance(evaluation, ScoringEvaluation):
        return evaluation
    unlike = mismatches(evaluation.estimator, opened.run.objective)
    for difference in unlike:
        progress(f"warning: {evaluation.name}: {difference}")
    return dataclasses.replace(evaluation, mismatches=unlike)
