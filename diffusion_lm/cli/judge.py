"""What `evaluate --judge` does: the likelihood of a run's completions under another, autoregressive run."""

import argparse

from diffusion_lm.cli.run_folder import OpenRun, open_run
from diffusion_lm.core.errors import ConfigError
from diffusion_lm.evaluation.generative import GenerativeEvaluation, Judge


def evaluations(arguments: argparse.Namespace, opened: OpenRun) -> tuple[GenerativeEvaluation, ...]:
    """Returns an evaluation for each that decodes, scored by the newest checkpoint of `--judge`.

    Raises:
      ConfigError: the run decodes nothing, or the judge is not autoregressive.
    """
    if not opened.generation:
        raise ConfigError(
            "the run's configuration decodes nothing",
            where="TrainRun.evaluations",
            fix="Bind evaluations, e.g. --gin.TrainRun.evaluations='[@GenerationEvaluation()]'.",
        )
    flags = argparse.Namespace(**{**vars(arguments), "workdir": arguments.judge, "step": None, "gin_file": []})
    found = open_run(flags, bindings=())
    judge = Judge(found.run, str(found.folder), found.step)
    return tuple(GenerativeEvaluation(one.task, one.sampler, judge, seed=one.seed) for one in opened.generation)
