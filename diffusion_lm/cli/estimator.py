"""What `evaluate --estimator` does: the estimator of a gin file on a run's data, and a file that keeps its numbers."""

import argparse
import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from diffusion_lm.cli import config
from diffusion_lm.cli.output import facts, plain, progress, say
from diffusion_lm.cli.run_folder import OpenRun
from diffusion_lm.cli.search_path import split_search_path
from diffusion_lm.core.errors import ConfigError, require
from diffusion_lm.core.files import as_path, read_json, write_text
from diffusion_lm.data.grain_source import GrainSource
from diffusion_lm.data.iterator import DataPipeline
from diffusion_lm.evaluation.scoring_task import ScoringEvaluation, unlike_training
from diffusion_lm.training.card import first_difference

FOLDER = "scores"
"""Where a run folder keeps scores, one file a configuration."""


def evaluations(arguments: argparse.Namespace, opened: OpenRun) -> tuple[ScoringEvaluation, ...]:
    """Returns what `--estimator` scores: each split that the run is evaluated on, or that of `--task`.

    Raises:
      ConfigError: the file defines no estimator, the run's noise is another one, or no data is named.
    """
    search_path = split_search_path(arguments.gin_search_path)
    loaded = config.load([arguments.estimator], arguments.gin, search_path, macros=["ESTIMATOR"])
    estimator = loaded.build_macro("ESTIMATOR")
    unlike = unlike_training(estimator, opened.run.objective)
    for difference in unlike:
        progress(f"warning: {difference}")
    return tuple(
        ScoringEvaluation(
            data=data,
            estimator=estimator,
            unlike_training=unlike,
            name=f"score/{data.sources[0].task}/{data.sources[0].split}",
            limit=arguments.limit,
            batch_size=arguments.batch_size,
            seed=arguments.seed,
        )
        for data in _data(arguments, opened)
    )


def refuse_another(path: str | None, chosen: Sequence[ScoringEvaluation], opened: OpenRun) -> None:
    """Raises `ConfigError` where `--json` names a file that holds scores of another configuration."""
    if path in (None, "-") or not as_path(path).exists():
        return
    there = read_json(path)
    found = there.get("evaluations", {}) if isinstance(there, dict) else {"": {}}
    here = {one.name: json.loads(json.dumps(_configuration(one, opened))) for one in chosen}
    before = {name: result.get("configuration") for name, result in found.items()}
    difference = first_difference(before, here, "evaluations")
    require(
        difference is None,
        f"{path} holds scores of another configuration: {difference}",
        where="--json",
        fix="Name another file, or remove that one.",
    )


def record(evaluation: ScoringEvaluation, opened: OpenRun, result: Mapping[str, Any]) -> dict[str, Any]:
    """Writes one evaluation's numbers to WORKDIR/scores; returns its configuration and the file.

    The file's name holds a hash of the configuration, so no other configuration's file is ever replaced.
    """
    configuration = _configuration(evaluation, opened)
    mark = hashlib.sha256(json.dumps(configuration, sort_keys=True).encode()).hexdigest()[:10]
    name = f"{evaluation.name.split('/', 1)[1].replace('/', '.')}.{type(evaluation.estimator).__name__}.{mark}.json"
    path = opened.folder / FOLDER / name
    kept = {"workdir": str(opened.folder), "name": evaluation.name, **result, "configuration": configuration}
    write_text(path, json.dumps(plain(kept), indent=1, ensure_ascii=False) + "\n")
    return {"configuration": configuration, "file": str(path)}


def show(results: Mapping[str, Any]) -> None:
    """Prints under the table what its numbers are: how estimated, on which tokens, and where they are kept."""
    for name, result in results.items():
        conditions = result["conditions"]
        tokeniser = conditions["tokeniser"]
        say()
        facts(
            [
                (name, ""),
                ("kind", f"{conditions['kind']}: {conditions['meaning']}"),
                ("estimator", type(conditions["estimator"]).__name__),
                ("tokeniser", f"{tokeniser['size']} pieces, sha256 {tokeniser['sha256'][:12]}"),
                ("bytes", conditions["bytes"]),
                ("file", result["file"]),
            ]
        )


def _configuration(evaluation: ScoringEvaluation, opened: OpenRun) -> dict[str, Any]:
    return {"step": opened.step, **evaluation.identity}


def _data(arguments: argparse.Namespace, opened: OpenRun) -> list[DataPipeline]:
    """Returns the splits to score, laid out as the model was trained."""
    trained = opened.run.data
    if arguments.task:
        sources = [(GrainSource(arguments.task, arguments.split, arguments.root or trained.sources[0].root),)]
    else:
        evaluated = (getattr(getattr(one, "task", one), "data", None) for one in opened.evaluations)
        sources = list(dict.fromkeys(data.sources for data in evaluated if data is not None))
    if not sources:
        raise ConfigError("no data is named", where="--task", fix="Give --task NAME with --split.")
    found = []
    for one in sources:
        pretraining = None if one[0].manifest.has_inputs else trained.pretraining
        found.append(dataclasses.replace(trained, sources=one, weights=None, pack=False, pretraining=pretraining))
    return found
