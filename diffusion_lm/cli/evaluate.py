"""Scores the model of a run folder: the teacher-forced bound and the metrics of decoded completions.

What is scored is what the run's configuration evaluates (TrainRun.evaluations), or, for a stage of a comparison, the
comparison's tasks; the checkpoint is the one that the run selected, else the newest. Settings can be overridden with
--gin flags.

With --suite FILE (`diffusion-lm list suites`) it is what a published protocol evaluates: tasks with their prompts,
lengths, estimators and samplers, whatever the run itself was evaluated on. --gin flags then set the suite's parameters.

With --estimator FILE (`diffusion-lm list scoring`) the likelihood of targets is estimated, or, for a task whose
examples have choices, which of them the model prefers; on the data of those evaluations, or of --task. --gin flags then
set the estimator's parameters. With --rolling whole documents are
scored, in windows, each token once.

With --judge DIR what the run generates is scored by the likelihood of an autoregressive run, next to its entropy and
distinct n-grams. The numbers of suites, estimators and judges are also written to WORKDIR/scores/."""

import argparse
import dataclasses
import time
from typing import Any

from diffusion_lm.cli import arguments as common
from diffusion_lm.cli.output import heading, progress, say, table
from diffusion_lm.core.errors import ConfigError, near_names


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's flags."""
    common.add_gin(parser)
    common.add_run_folder(parser)
    parser.add_argument("--suite", metavar="FILE", help="gin file that defines SUITE, e.g. gin/suites/diffullama.gin")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="run only these evaluations")
    parser.add_argument("--limit", type=int, metavar="N", help="score only the first N examples of each")
    parser.add_argument(
        "--estimator", metavar="FILE", help="gin file that defines ESTIMATOR, e.g. gin/scoring/llada_exact_count.gin"
    )
    parser.add_argument(
        "--rolling", action="store_true", help="with --estimator, score whole documents in windows, each token once"
    )
    parser.add_argument(
        "--context", type=int, default=1, metavar="N", help="tokens of context of a window with --rolling (default: 1)"
    )
    parser.add_argument(
        "--judge", metavar="DIR", help="autoregressive run whose likelihood scores what this run generates"
    )
    parser.add_argument("--task", metavar="NAME", help="materialised task to score with --estimator")
    parser.add_argument("--split", default="validation", metavar="NAME", help="its split (default: validation)")
    parser.add_argument("--root", metavar="DIR", help="where it was materialised")
    parser.add_argument("--batch_size", type=int, default=32, metavar="N", help="rows a pass with --estimator")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="root of the noise with --estimator")
    common.add_force(parser)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs the verb and returns `{"workdir", "step", "evaluations": {name: values}}`, and `selected_by` if it was."""
    from diffusion_lm.cli import estimator, judge, scores, suite
    from diffusion_lm.cli.run_folder import open_run

    _check_flags(arguments)
    kept = bool(arguments.estimator or arguments.suite or arguments.judge)
    opened = open_run(arguments, bindings=() if arguments.estimator or arguments.suite else arguments.gin)
    evaluations = opened.evaluations
    if arguments.estimator:
        evaluations = estimator.evaluations(arguments, opened)
    elif arguments.suite:
        evaluations = suite.evaluations(arguments, opened)
    elif arguments.judge:
        evaluations = judge.evaluations(arguments, opened)
    chosen = [_limited(one, arguments.limit) for one in _choose(evaluations, arguments.only)]
    # All samplers are looked at before the first of them decodes.
    unlike = {one.name: opened.mismatches(getattr(one, "sampler", None), force=arguments.force) for one in chosen}
    if kept:
        scores.refuse_another(arguments.json, chosen, opened)
    model = opened.load()
    results: dict[str, Any] = {}
    for evaluation in chosen:
        started = time.perf_counter()
        progress(f"evaluate  {evaluation.name}")
        note = getattr(getattr(evaluation, "task", evaluation).data, "vocabulary_note", None)
        cuts = getattr(evaluation, "cuts", ())
        for line in (note, *cuts):
            if line is not None:
                progress(str(line))
        values = {name: float(value) for name, value in evaluation.run(model, opened.step).items()}
        for difference in unlike[evaluation.name]:
            progress(f"warning: {difference}")
        results[evaluation.name] = {
            "values": values,
            "seconds": time.perf_counter() - started,
            **_conditions(evaluation, unlike[evaluation.name]),
            "cuts": [cut.plain() for cut in cuts],
        }
        if kept:
            results[evaluation.name] |= scores.record(evaluation, opened, results[evaluation.name])
    heading(f"{opened.folder}, step {opened.step:,}" + (f" ({opened.selected.metric})" if opened.selected else ""))
    rows = [
        ("" if number else name, metric, f"{value:.6g}")
        for name, result in results.items()
        for number, (metric, value) in enumerate(result["values"].items())
    ]
    table(["evaluation", "metric", "value"], rows, right=[2])
    for name, result in results.items():
        for cut in result["cuts"]:
            say(f"  {name}: {cut['text']}")
    if kept:
        estimator.show(results)
    return {"workdir": str(opened.folder), "step": opened.step, **_selection(opened), "evaluations": results}


def _selection(opened: Any) -> dict[str, Any]:
    """Returns what selected the checkpoint, where something did."""
    return {} if opened.selected is None else {"selected_by": opened.selected.metric}


def _check_flags(arguments: argparse.Namespace) -> None:
    """Raises `ConfigError` for flags that exclude each other, or that say nothing alone."""
    given = [name for name in ("suite", "estimator", "judge") if getattr(arguments, name)]
    if len(given) > 1:
        raise ConfigError(
            f"--{given[0]} and --{given[1]} are evaluations of their own",
            where=f"--{given[1]}",
            fix=f"Give --{given[0]} or --{given[1]}, one or the other.",
        )
    if arguments.rolling and not arguments.estimator:
        raise ConfigError(
            "rolling likelihood needs an estimator",
            where="--rolling",
            fix="Add --estimator, e.g. --estimator gin/scoring/autoregressive.gin.",
        )


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


def _conditions(evaluation: Any, unlike: tuple[str, ...]) -> dict[str, Any]:
    """Returns what a reader of a number must know about how it came about."""
    found = {"sampler": getattr(evaluation, "sampler", None), "seed": getattr(evaluation, "seed", None)}
    found["oracle"] = getattr(getattr(evaluation, "task", None), "oracle", None)
    objective = getattr(evaluation, "objective", None)
    if objective is not None:
        found["bound"] = objective.bound_kind
    found |= getattr(evaluation, "conditions", {})
    if unlike:
        found["unlike_training"] = list(unlike)
    return {"conditions": {name: value for name, value in found.items() if value is not None}}
