"""Writes the report of a comparison as one self-contained HTML file.

The page loads nothing from the network: styles, script and charts are inline, and the content security policy allows
only that script. The template engine escapes all text from models and data sets.
"""

import base64
import hashlib
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from diffusion_lm.core.errors import ConfigError, require
from diffusion_lm.core.files import as_path, read_json, write_text
from diffusion_lm.recipes import charts, summary, svg, tables
from diffusion_lm.recipes.crossover import crossovers, speed_sentences, speed_series
from diffusion_lm.recipes.formatting import MISSING, count, is_number
from diffusion_lm.recipes.records import (
    ArmCard,
    Bound,
    Cell,
    JsonObject,
    LogRow,
    Playback,
    Results,
    Sample,
    Speed,
    TaskCard,
)
from diffusion_lm.recipes.showcase import Player, SampleCard, player, sample_cards
from diffusion_lm.recipes.stage_chart import Node, stage_chart, stage_forest
from diffusion_lm.recipes.svg import Style, arm_styles
from diffusion_lm.recipes.training_curves import curve_panels

_TEMPLATES = Path(__file__).with_name("templates")
_AGAIN = "Restore the file, or run the comparison again."
_COSTS = ("forward_passes_per_sample", "generated_tokens_per_sample")


def from_folder(workdir: str | Path) -> Path:
    """Writes the page of a finished comparison from the files in its folder, and returns the path of the page.

    `results.json` is required. Without `speed.json`, `samples.json`, `playback.json` or the stages' `metrics.jsonl` the
    page says that these parts are absent.

    Raises:
      ConfigError: the folder has no `results.json`, or a file is not what `compare` writes.
    """
    workdir = as_path(workdir)
    require(
        (workdir / "results.json").exists(),
        f"{workdir} has no results.json",
        where="--workdir",
        fix="Pass the folder of a finished comparison, or finish it: run its compare command again.",
    )

    def part(name: str, absent: Any) -> Any:
        path = workdir / name
        try:
            return read_json(path) if path.exists() else absent
        except ValueError as error:
            raise ConfigError(f"{path} is not valid JSON: {error}", where=str(path), fix=_AGAIN) from error

    results = part("results.json", {})
    try:
        stages = {stage["name"] for arm in results["arms"] for stage in arm.get("stages", ())}
        logs = {stage: workdir / "stages" / stage / "metrics.jsonl" for stage in sorted(stages)}
        return write(
            results,
            workdir,
            curves={stage: tables.read_jsonl(log) for stage, log in logs.items() if log.exists()},
            speed=part("speed.json", None),
            samples=part("samples.json", {}),
            playback=part("playback.json", {}),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"the files of {workdir} are not those of a comparison: {type(error).__name__}: {error}",
            where=str(workdir / "results.json"),
            fix=_AGAIN,
        ) from error


def write(
    results: Results,
    workdir: Path,
    *,
    curves: Mapping[str, Sequence[LogRow]],
    speed: Speed | None,
    samples: Mapping[str, Sequence[Sample]],
    playback: Mapping[str, Playback],
) -> Path:
    """Writes `workdir/report/index.html` and returns its path. The output is deterministic.

    All fields except `name`, `arms` and `tasks` are optional; the page says which parts are absent.

    Args:
      results: content of `results.json`:
        `name`, `title`, `notes` [str], `fingerprint`, `versions` {name: version}, `config` (text);
        `arms` [{`name`, `label`, `family` ("none", "ar", "diffusion"), `parameters`, `train_tokens`, `stages`
        [{`name`, `initial`, `steps`, `tokens`, `objective`}]}];
        `tasks` [{`name`, `label`, `metric`, `metric_label`, `higher_is_better`, `examples`}];
        `cells` {arm: {task: {`value`, `low`, `high`, `examples`, `per_example`, `secondary` {name: number},
        `conditions` {name: value}, and `selected_step`, `selected_of`, `selected_by` where the scored checkpoint was
        selected}}};
        `differences` {task: [{`arm`, `against`, `value`, `low`, `high`}]} from `statistics.all_differences`;
        `bounds` {arm: {task: {`nll_per_real_token`, `kind`, ...}}};
        `cuts` [{`used_by`, `text`, ...}], the data that was truncated to fit the rows (`results.cuts`).
      workdir: the comparison's folder.
      curves: for each stage, the rows of its metrics.jsonl.
      speed: `{"device", "rows": [{"label", "family", "length", "seconds", "spread", "batch_size",
        "forward_passes"}]}`, with `spread` = (max - min) / median; or None.
      samples: for each task, `[{"input", "reference", "outputs": {arm: {"text", "score"}}}]`.
      playback: for each task, `{"arm", "input", "reference", "frames": [[piece, ...], ...]}` with one frame per forward
        pass, and optionally `start`, the tokens before the first one.
    """
    path = as_path(workdir) / "report" / "index.html"
    write_text(path, render(results, curves=curves, speed=speed, samples=samples, playback=playback))
    return path


def render(
    results: Results,
    *,
    curves: Mapping[str, Sequence[LogRow]],
    speed: Speed | None,
    samples: Mapping[str, Sequence[Sample]],
    playback: Mapping[str, Playback],
) -> str:
    """Returns the page as HTML; the arguments are those of `write`."""
    results = _filled(results)
    arms, tasks = results["arms"], results["tasks"]
    styles = arm_styles([(arm["name"], arm.get("family", "none")) for arm in arms])
    labels = {arm["name"]: arm["label"] for arm in arms}
    script = (_TEMPLATES / "report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    cards: list[tuple[TaskCard, list[SampleCard]]] = [
        (task, sample_cards(samples[task["name"]], arms, len(tasks))) for task in tasks if samples.get(task["name"])
    ]
    players: list[tuple[TaskCard, str, Player]] = []
    for task in tasks:
        played = playback.get(task["name"])
        if played and (shown := player(played)):
            players.append((task, labels.get(played.get("arm", ""), ""), shown))
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["count"] = count
    environment.globals["marker"] = svg.marker
    return environment.get_template("report.html").render(
        results=results,
        arms=arms,
        tasks=tasks,
        styles=styles,
        summary=summary.summarise(results, speed),
        style_sheet=Markup((_TEMPLATES / "report.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_hash=digest,
        dot_plots=[(task, _dot_plot(results, task, styles)) for task in tasks],
        quality=tables.quality_rows(results),
        replicates=results.get("replicates", 1),
        headings=[tables.task_heading(task) for task in tasks],
        intervals=tables.intervals(results),
        forest=(forest := stage_forest(arms)),
        selections=tables.selections(results),
        stage_chart=_stage_chart(results, forest, styles),
        curve_panels=curve_panels(arms, curves, styles),
        speed=_speed(speed),
        cards=cards,
        players=players,
        settings=_settings(results),
        costs=_costs(results),
        bounds=_bounds(results),
        secondary=_secondary(results),
        missing=MISSING,
    )


def _filled(results: Results) -> Results:
    """Returns the results with defaults for optional fields, because the template rejects undefined names."""
    empty: Results = {"notes": [], "fingerprint": "", "versions": {}, "config": "", "cells": {}, "bounds": {}}
    filled = {**empty, **results, "title": results.get("title") or results["name"]}
    arm_fields: ArmCard = {"family": "none", "stages": [], "train_tokens": 0, "parameters": 0}
    task_fields: TaskCard = {"metric": "", "higher_is_better": True, "examples": 0}
    filled["arms"] = [{**arm_fields, "label": arm["name"], **arm} for arm in results["arms"]]
    filled["tasks"] = [
        {**task_fields, "label": task["name"], "metric_label": task.get("metric", ""), **task}
        for task in results["tasks"]
    ]
    return filled


def _dot_plot(results: Results, task: TaskCard, styles: Mapping[str, Style]) -> Markup:
    best = summary.best_arms(results, task)
    dots, reference = [], None
    for arm in results["arms"]:
        measured = summary.cell(results, arm["name"], task["name"])
        low, high = (summary.bounds_of(measured) if measured else None) or (None, None)
        value = measured["value"] if measured else None
        dots.append(charts.Dot(arm["label"], styles[arm["name"]], value, low, high, arm["name"] in best))
        if arm.get("family") == "ar" and reference is None:
            reference = dots[-1]
    unit = task.get("metric_label") or task.get("metric") or ""
    places = summary.digits(results, task["name"])
    return charts.dot_plot(dots, title=task["label"], unit=unit, places=places, reference=reference)


def _stage_chart(results: Results, forest: Sequence[Node], styles: Mapping[str, Style]) -> Markup | None:
    if not forest:
        return None
    captions = {}
    for arm in results["arms"]:
        tokens = arm.get("train_tokens")
        caption = f"{count(tokens)} training tokens" if tokens else "no training"
        captions[arm["label"]] = (caption, styles[arm["name"]])
    return stage_chart(forest, captions)


def _speed(speed: Speed | None) -> JsonObject | None:
    """Returns charts (wide and narrow), legend, sentences and table of the speed study; None without one."""
    series = speed_series(speed)
    if not series or speed is None:
        return None
    step_styles = itertools.cycle(svg.STEP_STYLES)
    styled = [(one, svg.AR_STYLE if one.kind == "ar" else next(step_styles)) for one in series]
    crossings = crossovers(series)
    lengths = sorted({n for one in series for n in one.lengths})
    times = [dict(zip(one.lengths, one.seconds, strict=True)) for one in series]
    batches = sorted({row["batch_size"] for row in speed["rows"] if is_number(row.get("batch_size"))})
    return {
        "wide": charts.speed_chart(styled, crossings, width=1000, height=430, direct=True),
        "narrow": charts.speed_chart(styled, crossings, width=charts.PANEL, height=330, direct=False),
        "legend": [(one.label, style) for one, style in styled],
        "sentences": speed_sentences(speed),
        "columns": [one.label for one in series],
        "rows": [(n, [f"{t[n]:.3g}" if n in t else MISSING for t in times]) for n in lengths],
        "device": speed.get("device") or "",
        "batch": ", ".join(str(b) for b in batches),
        "crosses": any(found.length for found in crossings),
    }


def _settings(results: Results) -> list[tuple[str, list[tuple[str, str]]]]:
    """Returns every distinct set of decoding settings, with the arms and tasks that use it."""
    used: dict[tuple[tuple[str, str], ...], dict[str, list[str]]] = {}
    for arm, task, measured in _scored(results):
        conditions = measured.get("conditions") or {}
        pairs = tuple((key.replace("_", " "), _plain(value)) for key, value in conditions.items() if key not in _COSTS)
        if pairs:
            used.setdefault(pairs, {}).setdefault(arm["label"], []).append(task["label"])
    entries = []
    for pairs, by_arm in used.items():
        all_tasks = all(len(tasks) == len(results["tasks"]) for tasks in by_arm.values())
        names = by_arm if all_tasks else [f"{arm} ({', '.join(tasks)})" for arm, tasks in by_arm.items()]
        entries.append((", ".join(names), list(pairs)))
    return entries


def _costs(results: Results) -> list[tuple[ArmCard, list[tuple[str, str]]]]:
    """Returns, per arm, (forward passes, generated tokens) per completion for each task; empty if none were counted."""
    rows = []
    for arm in results["arms"]:
        cells = []
        for task in results["tasks"]:
            conditions = (summary.cell(results, arm["name"], task["name"]) or {}).get("conditions") or {}
            passes, tokens = (conditions.get(key) for key in _COSTS)
            cells.append(
                (
                    f"{passes:,.1f}".removesuffix(".0") if is_number(passes) else MISSING,
                    f"for {tokens:,.1f} tokens" if is_number(tokens) else "",
                )
            )
        rows.append((arm, cells))
    return rows if any(cell[0] != MISSING for _, cells in rows for cell in cells) else []


def _scored(results: Results) -> list[tuple[ArmCard, TaskCard, Cell]]:
    return [
        (arm, task, measured)
        for arm in results["arms"]
        for task in results["tasks"]
        if (measured := summary.cell(results, arm["name"], task["name"]))
    ]


def _bounds(results: Results) -> list[tuple[ArmCard, list[tuple[str, str]]]]:
    """Returns, per arm, (value, kind) of the bound for each task; empty if no bound was measured."""
    measured = results.get("bounds") or {}
    rows = []
    for arm in results["arms"]:
        cells = []
        for task in results["tasks"]:
            bound = measured.get(arm["name"], {}).get(task["name"]) or {}
            cells.append((_nats(bound), bound.get("kind") or ""))
        rows.append((arm, cells))
    return rows if any(cell[0] != MISSING for _, cells in rows for cell in cells) else []


def _nats(bound: Bound) -> str:
    """Returns nats per real token as text, with the standard error if it is a likelihood or bound."""
    bits, error = bound.get("bits_per_real_token"), bound.get("bits_per_real_token_error")
    if bits is not None:
        return f"{bits * math.log(2):.3f}" + (f" ± {error * math.log(2):.3f}" if error is not None else "")
    value = bound.get("nll_per_real_token", bound.get("loss"))
    return f"{value:.3f}" if is_number(value) else MISSING


def _secondary(results: Results) -> list[tuple[str, list[tuple[str, str]]]]:
    return [
        (f"{arm['label']}, {task['label']}", [(key.replace("_", " "), _plain(value)) for key, value in found.items()])
        for arm, task, measured in _scored(results)
        if (found := measured.get("secondary"))
    ]


def _plain(value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
