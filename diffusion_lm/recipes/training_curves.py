"""Training curves: one panel per arm with all its stages in sequence; held-out values are rings."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from diffusion_lm.recipes.charts import Curve, curve_panel
from diffusion_lm.recipes.formatting import is_number
from diffusion_lm.recipes.records import ArmCard, LogRow
from diffusion_lm.recipes.svg import Style

_POINTS = 140  # maximum number of points per line; longer logs are averaged in groups of consecutive rows
_TRAIN_KEYS = ("nll_per_real_token", "train/nll_per_real_token", "loss", "train/loss")
_HELD_OUT_ENDINGS = ("/nll_per_real_token", "/loss")


def curve_panels(
    arms: Sequence[ArmCard],
    curves: Mapping[str, Sequence[LogRow]],
    styles: Mapping[str, Style],
) -> list[tuple[ArmCard, Markup]]:
    """Returns (arm, drawing) for every arm that has a curve.

    Arms of one family share the vertical axis. Losses of different families are different quantities.

    Args:
      arms: the arms of `results.json`.
      curves: for each stage, the rows of metrics.jsonl: `step`, and losses in total or per real token. Names such as
        `bound/nll_per_real_token` are held-out values.
      styles: style of each arm, by name.
    """
    drawn: dict[str, tuple[list[Curve], list[tuple[float, str]], float]] = {}
    for arm in arms:
        lines, marks, last = _arm_curves(arm, curves, styles[arm["name"]])
        if lines:
            drawn[arm["name"]] = (lines, marks, last)
    panels = []
    for arm in arms:
        if arm["name"] not in drawn:
            continue
        peers = [a["name"] for a in arms if a.get("family") == arm.get("family") and a["name"] in drawn]
        values = [y for name in peers for line in drawn[name][0] for _, y in line.points]
        last_step = max(drawn[name][2] for name in drawn)
        lines, marks, _ = drawn[arm["name"]]
        drawing = curve_panel(
            lines,
            marks,
            title=f"Training of {arm['label']}",
            top_value=max(values),
            low_value=min(values) if min(values) > 0 else min(0.0, *values),
            last_step=last_step,
        )
        panels.append((arm, drawing))
    return panels


def _arm_curves(
    arm: ArmCard, curves: Mapping[str, Sequence[LogRow]], style: Style
) -> tuple[list[Curve], list[tuple[float, str]], float]:
    ends: dict[str, float] = {}
    lines: list[Curve] = []
    marks: list[tuple[float, str]] = []
    before: str | None = None
    for stage in arm.get("stages") or ():
        name = stage["name"]
        start = ends.get(str(stage.get("initial", before)), 0.0)
        rows = [_flat(row) for row in curves.get(name) or ()]
        training, held_out = _training_points(rows, start), _held_out_points(rows, start)
        if training:
            lines.append(Curve(name, style, training))
        lines += [Curve(label, style, points, held_out=True) for label, points in held_out.items()]
        if (training or held_out) and not any(start == other for other, _ in marks):
            marks.append((start, name))
        last_logged = max((row["step"] for row in rows if is_number(row.get("step"))), default=0)
        ends[name] = start + max(stage.get("steps") or 0, last_logged)
        before = name
    return lines, marks, max(ends.values(), default=0.0)


def _flat(row: LogRow, prefix: str = "") -> LogRow:
    """Returns the row with nested values under names `outer/inner`."""
    flat: dict[str, Any] = {}
    for key, value in row.items():
        flat |= _flat(value, f"{prefix}{key}/") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


def _training_points(rows: Iterable[LogRow], start: float) -> tuple[tuple[float, float], ...]:
    points = []
    for row in rows:
        value = next((row[key] for key in _TRAIN_KEYS if is_number(row.get(key))), None)
        if value is not None and is_number(row.get("step")):
            points.append((start + row["step"], float(value)))
    if len(points) <= _POINTS:
        return tuple(points)
    parts = np.array_split(np.asarray(points), _POINTS)
    return tuple((float(x), float(y)) for x, y in (part.mean(0) for part in parts))


def _held_out_points(rows: Sequence[LogRow], start: float) -> dict[str, tuple[tuple[float, float], ...]]:
    """Returns the held-out series by name, using the first ending that occurs, so that a bound is not drawn twice."""
    for ending in _HELD_OUT_ENDINGS:
        series: dict[str, list[tuple[float, float]]] = {}
        for row in rows:
            for key, value in row.items():
                if (
                    key.endswith(ending)
                    and not key.startswith("train/")
                    and is_number(value)
                    and is_number(row.get("step"))
                ):
                    series.setdefault(key, []).append((start + row["step"], float(value)))
        if series:
            return {key: tuple(points) for key, points in series.items()}
    return {}
