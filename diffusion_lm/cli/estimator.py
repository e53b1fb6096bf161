"""Implements `evaluate --estimator`: applies the estimator of a gin file to the data of a run."""

import argparse
import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from diffusion_lm.cli import config
from diffusion_lm.cli.output import facts, progress, say
from diffusion_lm.cli.run_folder import OpenRun
from diffusion_lm.cli.search_path import split_search_path
from diffusion_lm.core.errors import ConfigError
from diffusion_lm.data.grain_source import GrainSource
from diffusion_lm.data.iterator import DataPipeline
from diffusion_lm.evaluation.rolling import RollingEvaluation
from diffusion_lm.evaluation.scoring_task import ScoringEvaluation, mismatches


def evaluations(arguments: argparse.Namespace, opened: OpenRun) -> tuple[ScoringEvaluation, ...]:
    """Returns one evaluation per split: the splits that the run is evaluated on, or the split of `--task`.

    Raises:
      ConfigError: the file defines no estimator, its noise process differs from that of the run, or there is no data.
    """
    search_path = split_search_path(arguments.gin_search_path)
    loaded = config.load([arguments.estimator], arguments.gin, search_path, macros=["ESTIMATOR"])
    estimator = loaded.build_macro("ESTIMATOR")
    unlike = mismatches(estimator, opened.run.objective)
    for difference in unlike:
        progress(f"warning: {difference}")
    kind = functools.partial(RollingEvaluation, context=arguments.context) if arguments.rolling else ScoringEvaluation
    return tuple(
        kind(
            data=data,
            estimator=estimator,
            mismatches=unlike,
            name=f"{'rolling' if arguments.rolling else 'score'}/{data.sources[0].task}/{data.sources[0].split}",
            limit=arguments.limit,
            batch_size=arguments.batch_size,
            seed=arguments.seed,
        )
        for data in _data(arguments, opened)
    )


def show(results: Mapping[str, Any]) -> None:
    """Prints below the table how each number was estimated, over which tokens, and the file that stores it."""
    for name, result in results.items():
        conditions = result["conditions"]
        if "estimator" not in conditions:
            continue
        tokeniser = conditions["tokeniser"]
        say()
        facts(
            [
                (name, ""),
                ("kind", f"{conditions['kind']}: {conditions['meaning']}"),
                ("estimator", type(conditions["estimator"]).__name__),
                ("tokenizer", f"{tokeniser['size']} pieces, sha256 {tokeniser['sha256'][:12]}"),
                ("bytes", conditions["bytes"]),
                *([("windows", _windows(conditions))] if "window" in conditions else []),
                ("file", result["file"]),
            ]
        )


def _windows(conditions: Mapping[str, Any]) -> str:
    window, context = conditions["window"], conditions["context"]
    return f"{window} tokens per row; in every row after the first, at least {context} are context"


def _data(arguments: argparse.Namespace, opened: OpenRun) -> list[DataPipeline]:
    """Returns the splits to score, with the layout that the model was trained on."""
    trained = opened.run.data
    if arguments.task:
        sources = [(GrainSource(arguments.task, arguments.split, arguments.root or trained.sources[0].root),)]
    else:
        evaluated = (getattr(getattr(one, "task", one), "data", None) for one in opened.evaluations)
        sources = list(dict.fromkeys(data.sources for data in evaluated if data is not None))
    if not sources:
        raise ConfigError("no data to score", where="--task", fix="Pass --task NAME with --split.")
    found = []
    for one in sources:
        pretraining = None if one[0].manifest.has_inputs else trained.pretraining
        found.append(dataclasses.replace(trained, sources=one, weights=None, pack=False, pretraining=pretraining))
    return found
