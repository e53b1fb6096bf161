"""Scores the model of a run folder: the teacher-forced bound and the metrics of decoded completions.

What is scored is what the run's configuration evaluates (TrainRun.evaluations), or, for a stage of a comparison, the
comparison's tasks; the checkpoint is the newest. Settings can be overridden with --gin flags."""

import argparse
import dataclasses
import time
from typing import Any

from diffusion_lm.cli import arguments as common
from diffusion_lm.cli.output import heading, progress, table
from diffusion_lm.core.errors import ConfigError, near_names


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's flags."""
    common.add_gin(parser)
    common.add_run_folder(parser)
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="run only these evaluations")
    parser.add_argument("--limit", type=int, metavar="N", help="score only the first N examples of each")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs the verb and returns `{"workdir", "step", "evaluations": {name: values}}`."""
    from diffusion_lm.cli.run_folder import open_run

    opened = open_run(arguments, bindings=arguments.gin)
    chosen = [_limited(one, arguments.limit) for one in _choose(opened.evaluations, arguments.only)]
    model = opened.load()
    results: dict[str, Any] = {}
    for evaluation in chosen:
        started = time.perf_counter()
        progress(f"evaluate  {evaluation.name}")
        values = {name: float(value) for name, value in evaluation.run(model, opened.step).items()}
        results[evaluation.name] = {
            "values": values,
            "seconds": time.perf_counter() - started,
            **_conditions(evaluation),
        }
    heading(f"{opened.folder}, step {opened.step:,}")
    rows = [
        ("" if number else name, metric, f"{value:.6g}")
        for name, result in results.items()
        for number, (metric, value) in enumerate(result["values"].items())
    ]
    table(["evaluation", "metric", "value"], rows, right=[2])
    return {"workdir": str(opened.folder), "step": opened.step, "evaluations": results}


def _choose(evaluations: tuple[Any, ...], names: list[str]) -> list[Any]:
    known = {evaluation.name: evaluation for evaluation in evaluations}
    if not known:
        raise ConfigError(
            "the run's configuration evaluates nothing",
            where="TrainRun.evaluations",
            fix="Bind evaluations, e.g. --gin.TrainRun.evaluations='[@BoundEvaluation()]'.",
        )
    for name in names:
        if name not in known:
            raise ConfigError(
                f"there is no evaluation {name!r}{near_names(name, known)}",
                where="--only",
                fix=f"Use {', '.join(known)}.",
            )
    return [known[name] for name in names or known]


def _limited(evaluation: Any, limit: int | None) -> Any:
    if limit is None:
        return evaluation
    if hasattr(evaluation, "task"):
        return dataclasses.replace(evaluation, task=dataclasses.replace(evaluation.task, limit=limit))
    return dataclasses.replace(evaluation, limit=limit)


def _conditions(evaluation: Any) -> dict[str, Any]:
    """Returns what a reader of a number must know about how it came about."""
    found = {"sampler": getattr(evaluation, "sampler", None), "seed": getattr(evaluation, "seed", None)}
    objective = getattr(evaluation, "objective", None)
    if objective is not None:
        found["bound"] = objective.bound_kind
    return {"conditions": {name: value for name, value in found.items() if value is not None}}
