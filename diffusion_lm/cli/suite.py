"""Implements `evaluate --suite`: runs the evaluations of a gin file on the model of a run."""

import argparse
import dataclasses

from diffusion_lm.cli import config
from diffusion_lm.cli.output import progress
from diffusion_lm.cli.run_folder import OpenRun
from diffusion_lm.cli.search_path import split_search_path
from diffusion_lm.core.errors import require
from diffusion_lm.evaluation.generation import GenerationEvaluation
from diffusion_lm.evaluation.scoring_task import ScoringEvaluation, mismatches

SuiteEvaluation = GenerationEvaluation | ScoringEvaluation


def evaluations(arguments: argparse.Namespace, opened: OpenRun) -> tuple[SuiteEvaluation, ...]:
    """Returns the evaluations of SUITE; each records how its estimator differs from the training of the run.

    Raises:
      ConfigError: the file defines no suite, two of its evaluations have the same name, or an estimator uses a mask
        token that the run was not trained with.
    """
    search_path = split_search_path(arguments.gin_search_path)
    found = config.load([arguments.suite], arguments.gin, search_path, macros=["SUITE"]).build_macro("SUITE")
    suite = found if isinstance(found, tuple | list) else (found,)
    names = [one.name for one in suite if isinstance(one, GenerationEvaluation | ScoringEvaluation)]
    require(
        len(names) == len(suite) == len(set(names)) > 0,
        f"SUITE = {suite!r}: must be a non-empty tuple of ScoringEvaluation and GenerationEvaluation",
        where=arguments.suite,
        fix="Give each evaluation a different name.",
    )
    return tuple(_compared(one, opened) for one in suite)


def _compared(evaluation: SuiteEvaluation, opened: OpenRun) -> SuiteEvaluation:
    if not isinstance(evaluation, ScoringEvaluation):
        return evaluation
    unlike = mismatches(evaluation.estimator, opened.run.objective)
    for difference in unlike:
        progress(f"warning: {evaluation.name}: {difference}")
    return dataclasses.replace(evaluation, mismatches=unlike)
