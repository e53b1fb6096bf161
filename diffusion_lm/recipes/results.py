"""Assembles `results.json` and the sample completions of the report from the evaluations of all arms."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from diffusion_lm.recipes import statistics
from diffusion_lm.recipes.comparison import Arm, Comparison
from diffusion_lm.recipes.records import ArmCard, Bound, Cell, Evaluation, JsonObject, Results, Sample
from diffusion_lm.recipes.stage import Stage, stage_graph
from diffusion_lm.training.card import fingerprint, installed_versions

Evaluations = Mapping[tuple[str, str], Evaluation]
"""What `compare.compare` stores for each (arm, task): statistics, predictions, bound and costs."""


def assemble(comparison: Comparison, replicates: Sequence[Evaluations]) -> Results:
    """Returns the content of `results.json`, which the same configuration reproduces bit for bit (no times).

    Args:
      comparison: the configuration.
      replicates: the evaluations of each replicate. Values, secondary scores, bounds and costs are means over
        replicates. With more than one replicate, each cell lists the single values under `replicates`.
    """
    cells: dict[str, dict[str, Cell]] = {}
    bounds: dict[str, dict[str, Bound]] = {}
    for arm in comparison.arms:
        for task in comparison.tasks:
            found = [evaluations[arm.name, task.name] for evaluations in replicates]
            rows = _rows(found)
            low, high = statistics.bootstrap(
                rows, task.scorer.aggregate, resamples=comparison.resamples, seed=comparison.seed
            )
            sampler = arm.sampler_for(task.name)
            cells.setdefault(arm.name, {})[task.name] = {
                "value": _mean([one["value"] for one in found]),
                "low": low,
                "high": high,
                **({"replicates": [one["value"] for one in found]} if len(found) > 1 else {}),
                "examples": rows.shape[1],
                **_selection(found, arm.stage_for(task.name)),
                "secondary": _mean([one["secondary"] for one in found]),
                "conditions": {
                    "sampler": type(sampler).__name__,
                    **{f.name: _plain(getattr(sampler, f.name)) for f in dataclasses.fields(sampler)},
                    "samples_per_prompt": task.samples,
                    "forward_passes_per_sample": _mean([one["forward_passes"] for one in found]),
                    "generated_tokens_per_sample": _mean([one["generated_tokens"] for one in found]),
                    "oracle": task.oracle,
                    **({"unlike_training": list(unlike)} if (unlike := arm.mismatches(task.name)) else {}),
                },
            }
            if found[0]["bound"]:
                bounds.setdefault(arm.name, {})[task.name] = _mean_bound([one["bound"] for one in found])
    differences = {
        task.name: statistics.all_differences(
            {arm.name: _rows([one[arm.name, task.name] for one in replicates]) for arm in comparison.arms},
            task.scorer.aggregate,
            resamples=comparison.resamples,
            seed=comparison.seed,
        )
        for task in comparison.tasks
    }
    return {
        "name": comparison.name,
        "title": comparison.title or comparison.name,
        "notes": list(comparison.notes),
        "replicates": comparison.replicates,
        "fingerprint": fingerprint(comparison),
        "arms": [_arm_card(comparison, arm) for arm in comparison.arms],
        "tasks": [
            {
                "name": task.name,
                "label": task.title,
                "oracle": task.oracle,
                "metric": task.metric,
                "metric_label": task.scorer.label,
                "metric_conditions": task.scorer.conditions,
                "higher_is_better": True,
                "examples": cells[comparison.arms[0].name][task.name]["examples"],
            }
            for task in comparison.tasks
        ],
        "cells": cells,
        "differences": differences,
        "bounds": bounds,
        "cuts": cuts(comparison),
        "versions": installed_versions(),
    }


def cuts(comparison: Comparison) -> list[JsonObject]:
    """Returns which data were truncated to fit the rows: training data of each stage, then examples of each task.

    `used_by` is "stage NAME", "task NAME" or "bound NAME"; the other fields are those of `checks.Cut.plain`.
    """
    found: list[JsonObject] = []
    for stage in comparison.stages:
        found += [{"used_by": f"stage {stage.name}", **cut.plain()} for cut in stage.run.data.cuts("training")]
    for task in comparison.tasks:
        found += [{"used_by": f"task {task.name}", **cut.plain()} for cut in task.cuts]
        if comparison.bound_limit:
            bounds = task.data.cuts("scoring", comparison.bound_limit)
            found += [{"used_by": f"bound {task.name}", **cut.plain()} for cut in bounds]
    return found


def _arm_card(comparison: Comparison, arm: Arm) -> ArmCard:
    """Returns an arm's stages and budget; if tasks are fine-tuned separately, the stages of all tasks."""
    stages = stage_graph(arm.stage_for(task.name) for task in comparison.tasks)
    return {
        "name": arm.name,
        "label": arm.label or arm.name,
        "family": arm.family,
        "parameters": stages[-1].run.model.count_parameters()["total"],
        "train_tokens": sum(stage.train_tokens for stage in stages),
        "stages": [
            {
                "name": stage.name,
                "initial": stage.initial.name if isinstance(stage.initial, Stage) else stage.initial,
                "steps": stage.run.steps,
                "tokens": stage.train_tokens,
                "objective": type(stage.run.objective).__name__,
                **({} if stage.run.checkpoint.best is None else {"selected_by": stage.run.checkpoint.best.metric}),
            }
            for stage in stages
        ],
    }


def _selection(found: Sequence[Evaluation], stage: Stage) -> JsonObject:
    """Returns the step of the scored checkpoint (per replicate) and its metric; empty if it was the last one."""
    if "selected_step" not in found[0]:
        return {}
    steps = [one["selected_step"] for one in found]
    return {
        "selected_step": steps if len(steps) > 1 else steps[0],
        "selected_of": stage.run.steps,
        "selected_by": found[0]["selected_by"],
    }


def shown_samples(comparison: Comparison, evaluations: Evaluations) -> dict[str, list[Sample]]:
    """Returns the first `comparison.shown` examples of each task with the completions of all arms."""
    shown: dict[str, list[Sample]] = {}
    for task in comparison.tasks:
        first = evaluations[comparison.arms[0].name, task.name]
        for index in range(min(comparison.shown, len(first["inputs"]))):
            outputs = {}
            for arm in comparison.arms:
                found = evaluations[arm.name, task.name]
                value = task.scorer.aggregate(np.asarray(found["statistics"][index], np.float64)[None])
                outputs[arm.name] = {"text": found["predictions"][index][0], "score": value}
            shown.setdefault(task.name, []).append(
                {"input": first["inputs"][index], "reference": first["references"][index], "outputs": outputs}
            )
    return shown


def _rows(found: Sequence[Evaluation]) -> np.ndarray:
    """Returns the sufficient statistics of one arm on one task as f64[replicates, examples, K]."""
    return np.asarray([one["statistics"] for one in found], np.float64)


def _mean(values: Sequence[Any]) -> Any:
    """Returns the mean of numbers, or of each number in nested dicts; other values must be equal and are kept."""
    first = values[0]
    if len(values) == 1:
        return first
    if isinstance(first, Mapping):
        return {key: _mean([one[key] for one in values]) for key in first}
    if any(value is None for value in values):  # None stands for a value that was not finite; so is the mean then
        return None
    return first if isinstance(first, str | bool) else float(np.mean(values))


def _mean_bound(bounds: Sequence[Bound]) -> Bound:
    """Returns the mean of the replicates' bounds; standard errors add in quadrature, as the draws are independent."""
    mean: Bound = _mean(bounds)
    errors = {key: [one[key] for one in bounds] for key in mean if key.endswith("_error")}
    return {**mean, **{key: float(np.linalg.norm(found)) / len(found) for key, found in errors.items()}}


def _plain(value: object) -> int | float | str | bool | None:
    return value if isinstance(value, int | float | str | bool | None) else repr(value)
