"""Implements `evaluate --judge`: the likelihood of completions of a run under an autoregressive run."""

import argparse

from diffusion_lm.cli.run_folder import OpenRun, open_run
from diffusion_lm.core.errors import ConfigError
from diffusion_lm.evaluation.generative import GenerativeEvaluation, Judge


def evaluations(arguments: argparse.Namespace, opened: OpenRun) -> tuple[GenerativeEvaluation, ...]:
    """Returns one evaluation for each evaluation of the run that decodes, scored by the run of `--judge`.

    Raises:
      ConfigError: no evaluation of the run decodes, or the judge is not autoregressive.
    """
    if not opened.generation:
        raise ConfigError(
            "no evaluation of the run decodes completions",
            where="TrainRun.evaluations",
            fix="Bind evaluations, e.g. --gin.TrainRun.evaluations='[@GenerationEvaluation()]'.",
        )
    flags = argparse.Namespace(**{**vars(arguments), "workdir": arguments.judge, "step": None, "gin_file": []})
    found = open_run(flags, bindings=())
    judge = Judge(found.run, str(found.folder), found.step)
    return tuple(GenerativeEvaluation(one.task, one.sampler, judge, seed=one.seed) for one in opened.generation)
