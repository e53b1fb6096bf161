"""Evaluates a trained model: teacher-forced likelihood bounds and metrics of decoded completions.

By default it runs the evaluations of the run (TrainRun.evaluations) or, for a stage of a comparison, the tasks of the
comparison. It uses the best checkpoint if the run selects one, else the newest. --gin flags override settings.

--suite FILE runs a published evaluation protocol instead: tasks with their prompts, lengths, estimators and samplers
(`diffusion-lm list suites`). --gin flags then set parameters of the suite.

--estimator FILE estimates the likelihood of targets or, for tasks with answer choices, scores multiple choice
(`diffusion-lm list scoring`). The data are those of the run's evaluations, or of --task. --gin flags then set
parameters of the estimator. With --rolling it scores whole documents in windows, each token once.

--judge DIR scores the completions of the run by their likelihood under an autoregressive run, together with their
entropy and distinct n-grams.

Results of --suite, --estimator and --judge are also written to WORKDIR/scores/."""

import argparse
import dataclasses
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from diffusion_lm.cli import arguments as common
from diffusion_lm.cli.output import heading, progress, say, table
from diffusion_lm.core.errors import ConfigError, near_names

if TYPE_CHECKING:
    from diffusion_lm.cli.run_folder import OpenRun
    from diffusion_lm.cli.scores import Scored
    from diffusion_lm.evaluation.generative import GenerativeEvaluation
    from diffusion_lm.training.hooks import Evaluation

    AnyEvaluation = Evaluation | GenerativeEvaluation


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's flags."""
    common.add_gin(parser)
    common.add_run_folder(parser)
    parser.add_argument("--suite", metavar="FILE", help="gin file that defines SUITE, e.g. gin/suites/diffullama.gin")
    parser.add_argument(
        "--only", action="append", default=[], metavar="NAME", help="run only this evaluation; may be repeated"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="use only the first N examples of each evaluation")
    parser.add_argument(
        "--estimator", metavar="FILE", help="gin file that defines ESTIMATOR, e.g. gin/scoring/llada_exact_count.gin"
    )
    parser.add_argument(
        "--rolling", action="store_true", help="with --estimator: score whole documents in windows, each token once"
    )
    parser.add_argument(
        "--context", type=int, default=1, metavar="N", help="with --rolling: context tokens per window (default: 1)"
    )
    parser.add_argument(
        "--judge", metavar="DIR", help="autoregressive run that scores the completions of this run by likelihood"
    )
    parser.add_argument("--task", metavar="NAME", help="with --estimator: materialised task to score")
    parser.add_argument("--split", default="validation", metavar="NAME", help="split of --task (default: validation)")
    parser.add_argument("--root", metavar="DIR", help="directory of the materialised data (default: that of the run)")
    parser.add_argument(
        "--batch_size", type=int, default=32, metavar="N", help="with --estimator: rows per forward pass (default: 32)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="with --estimator: random seed (default: 0)")
    common.add_force(parser)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs the verb; returns `{"workdir", "step", "evaluations": {name: result}}`.

    The result also has `selected_by`, the metric that selected the checkpoint, if there is one.
    """
    from diffusion_lm.cli import estimator, judge, scores, suite
    from diffusion_lm.cli.run_folder import open_run

    _check_flags(arguments)
    recorded = bool(arguments.estimator or arguments.suite or arguments.judge)
    # With --estimator or --suite, the --gin flags belong to that file and not to the run.
    opened = open_run(arguments, bindings=() if arguments.estimator or arguments.suite else arguments.gin)
    evaluations: Sequence[AnyEvaluation] = opened.evaluations
    if arguments.estimator:
        evaluations = estimator.evaluations(arguments, opened)
    elif arguments.suite:
        evaluations = suite.evaluations(arguments, opened)
    elif arguments.judge:
        evaluations = judge.evaluations(arguments, opened)
    chosen = [_limited(one, arguments.limit) for one in _choose(evaluations, arguments.only)]
    # Check all samplers first, so that a mismatch in the last one does not waste the work of the others.
    unlike = {one.name: opened.mismatches(getattr(one, "sampler", None), force=arguments.force) for one in chosen}
    if recorded:
        scores.refuse_another(arguments.json, cast("list[Scored]", chosen), opened)
    model = opened.load()
    results: dict[str, Any] = {}
    for evaluation in chosen:
        started = time.perf_counter()
        progress(f"evaluate  {evaluation.name}")
        data = getattr(getattr(evaluation, "task", evaluation), "data", None)
        note = getattr(data, "vocabulary_note", None)
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
        if recorded:
            results[evaluation.name] |= scores.record(cast("Scored", evaluation), opened, results[evaluation.name])
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
    if recorded:
        estimator.show(results)
    return {"workdir": str(opened.folder), "step": opened.step, **_selection(opened), "evaluations": results}


def _selection(opened: "OpenRun") -> dict[str, Any]:
    """Returns `{"selected_by": metric}`, or an empty dict if no metric selected the checkpoint."""
    return {} if opened.selected is None else {"selected_by": opened.selected.metric}


def _check_flags(arguments: argparse.Namespace) -> None:
    """Raises `ConfigError` for flags that exclude each other, or that need another flag."""
    given = [name for name in ("suite", "estimator", "judge") if getattr(arguments, name)]
    if len(given) > 1:
        raise ConfigError(
            f"--{given[0]} and --{given[1]} cannot be combined",
            where=f"--{given[1]}",
            fix=f"Pass only one of --{given[0]} and --{given[1]}.",
        )
    if arguments.rolling and not arguments.estimator:
        raise ConfigError(
            "--rolling requires an estimator",
            where="--rolling",
            fix="Add --estimator, e.g. --estimator gin/scoring/autoregressive.gin.",
        )


def _choose(evaluations: "Sequence[AnyEvaluation]", names: Sequence[str]) -> "list[AnyEvaluation]":
    known = {evaluation.name: evaluation for evaluation in evaluations}
    if not known:
        raise ConfigError(
            "the configuration of the run has no evaluations",
            where="TrainRun.evaluations",
            fix="Bind evaluations, e.g. --gin.TrainRun.evaluations='[@BoundEvaluation()]'.",
        )
    for name in names:
        if name not in known:
            raise ConfigError(
                f"unknown evaluation {name!r}{near_names(name, known)}",
                where="--only",
                fix=f"Use one of {', '.join(known)}.",
            )
    return [known[name] for name in names or known]


def _limited(evaluation: "AnyEvaluation", limit: int | None) -> "AnyEvaluation":
    if limit is None:
        return evaluation
    configured: Any = evaluation  # a frozen dataclass with either a task or a limit of its own
    if hasattr(configured, "task"):
        return dataclasses.replace(configured, task=dataclasses.replace(configured.task, limit=limit))
    return dataclasses.replace(configured, limit=limit)


def _conditions(evaluation: "AnyEvaluation", unlike: tuple[str, ...]) -> dict[str, Any]:
    """Returns the conditions under which the numbers hold: sampler, seed, oracle information, kind of bound."""
    found = {"sampler": getattr(evaluation, "sampler", None), "seed": getattr(evaluation, "seed", None)}
    found["oracle"] = getattr(getattr(evaluation, "task", None), "oracle", None)
    objective = getattr(evaluation, "objective", None)
    if objective is not None:
        found["bound"] = objective.bound_kind
    found |= getattr(evaluation, "conditions", {})
    if unlike:
        found["unlike_training"] = list(unlike)
    return {"conditions": {name: value for name, value in found.items() if value is not None}}
