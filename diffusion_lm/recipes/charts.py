"""Draws the charts of the report as SVG, so that the page needs neither a chart library nor network access."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from markupsafe import Markup

from diffusion_lm.recipes import svg
from diffusion_lm.recipes.crossover import Crossover, SpeedSeries
from diffusion_lm.recipes.svg import Style, el

PANEL = 340  # width of one panel: one fills a phone screen, three fill a desktop screen


class Dot(NamedTuple):
    """One row of a dot plot; `value` is None if the arm has no score."""

    label: str
    style: Style
    value: float | None
    low: float | None
    high: float | None
    best: bool


def dot_plot(dots: Sequence[Dot], *, title: str, unit: str, places: int, reference: Dot | None = None) -> Markup:
    """Returns a dot plot of one task's scores with 95% intervals, and a dashed line at the score of `reference`."""
    row, right, top = 30, 46, 6
    left = min(132.0, 20 + svg.GLYPH * 12 * max((len(dot.label) for dot in dots), default=4))
    height = top + row * len(dots) + 34
    base = top + row * len(dots)
    ends = [x for dot in dots for x in (dot.value, dot.low, dot.high) if x is not None] or [1.0]
    low, high = min(0.0, *ends), max(ends) or 1.0
    x_of = _linear(low, high, left, PANEL - right)
    ticks = [tick for tick in svg.linear_ticks(low, high) if low <= tick <= high]
    parts = [
        _vertical_grid(ticks, x_of, top, base),
        svg.text((left + PANEL - right) / 2, base + 31, unit, "axis", "middle"),
    ]
    if reference and reference.value is not None:
        parts.append(svg.line(x_of(reference.value), top, x_of(reference.value), base, f"ref {reference.style.colour}"))
    readings = []  # the same numbers as text, for screen readers
    for index, dot in enumerate(dots):
        y = top + row * (index + 0.5)
        weight = "strong" if dot.best else ""
        parts.append(svg.text(left - 12, y + 4, svg.clip(dot.label, left - 14), f"label {weight}".strip(), "end"))
        if dot.value is None:
            parts.append(svg.text(left + 4, y + 4, "not scored", "axis"))
            continue
        interval = ""
        if dot.low is not None and dot.high is not None:
            parts.append(svg.line(x_of(dot.low), y, x_of(dot.high), y, f"bar {dot.style.colour}"))
            interval = f" [{dot.low:.{places}f}, {dot.high:.{places}f}]"
        readings.append(f"{dot.label} {dot.value:.{places}f}{interval}")
        parts.append(el("g", el("title", readings[-1]), svg.marker(dot.style, x_of(dot.value), y)))
        end = max(x_of(dot.high) if dot.high is not None else 0.0, x_of(dot.value) + 6)
        parts.append(svg.text(end + 7, y + 4, f"{dot.value:.{places}f}", f"value {weight}".strip()))
    return svg.figure(PANEL, height, f"{title}, {unit}: {'; '.join(readings)}", *parts)


class Curve(NamedTuple):
    """One series of a training panel: points (step, value), and whether they were measured on held-out data."""

    label: str
    style: Style
    points: tuple[tuple[float, float], ...]
    held_out: bool = False


def curve_panel(
    curves: Sequence[Curve], marks: Sequence[tuple[float, str]], *, title: str, top_value: float, low_value: float,
    last_step: float,
) -> Markup:  # fmt: skip
    """Returns the loss curve of one arm over all its stages, on a log axis if every loss is positive.

    `marks` are (first step, stage name).
    """
    left, right, top, bottom, height = 32, 8, 24, 26, 196
    x_of = _linear(0, last_step, left, PANEL - right)
    if low_value > 0:
        ticks = svg.log_ticks(low_value, top_value)
        y_of = _log(low_value / 1.1, top_value * 1.1, height - bottom, top)
    else:
        ticks = [tick for tick in svg.linear_ticks(low_value, top_value, 3) if low_value <= tick <= top_value]
        y_of = _linear(low_value, top_value or 1.0, height - bottom, top)
    parts = [_horizontal_grid(ticks, y_of, left, PANEL - right)]
    x_ticks = [t for t in svg.linear_ticks(0, last_step, 4) if t <= last_step * 1.001]
    parts += [svg.text(x_of(t), height - 8, svg.tick_label(t), "tick", "middle") for t in x_ticks]
    starts = [*marks, (last_step, "")]
    for index, (start, label) in enumerate(marks):
        room = x_of(starts[index + 1][0]) - x_of(start) - 6
        if start > 0:
            parts.append(svg.line(x_of(start), top - 14, x_of(start), height - bottom, "stage-line"))
        if room > 24:
            parts.append(svg.text(x_of(start) + 4, top - 8, svg.clip(label, room, 10.5), "tick"))
    for curve in curves:
        points = [(x_of(x), y_of(y)) for x, y in curve.points]
        if curve.held_out:
            parts += [el("circle", cx=x, cy=y, r=3.2, class_=f"hollow {curve.style.colour}") for x, y in points]
        elif len(points) > 1:
            parts.append(el("path", d=svg.path_of(points), class_=f"line {curve.style.colour}"))
    ends = [f"{c.label} ends at {c.points[-1][1]:.2f}" for c in curves if c.points]
    return svg.figure(PANEL, height, f"{title}: {'; '.join(ends)}", *parts)


def speed_chart(
    series: Sequence[tuple[SpeedSeries, Style]],
    crossings: Sequence[Crossover],
    *,
    width: int,
    height: int,
    direct: bool,
) -> Markup:
    """Returns seconds by output length on log axes; `direct` puts the labels at the line ends instead of a legend."""
    left, right, top, bottom = 50, (190 if direct else 14), 14, 42
    lengths = sorted({n for s, _ in series for n in s.lengths})
    times = [t for s, _ in series for t in s.seconds]
    x_of = _log(lengths[0] / 1.08, lengths[-1] * 1.08, left, width - right)
    low, high = min(times) / 1.4, max(times) * 1.4
    y_of = _log(low, high, height - bottom, top)
    parts: list[Markup] = []
    for tick in svg.log_ticks(low, high):
        parts.append(svg.line(left, y_of(tick), width - right, y_of(tick), "grid"))
        parts.append(svg.text(left - 7, y_of(tick) + 4, _seconds(tick), "tick", "end"))
    shown = lengths if len(lengths) <= (9 if direct else 6) else lengths[:: math.ceil(len(lengths) / 6)]
    for n in shown:
        parts.append(svg.line(x_of(n), top, x_of(n), height - bottom, "grid"))
        parts.append(svg.text(x_of(n), height - bottom + 17, svg.tick_label(n), "tick", "middle"))
    parts.append(svg.text((left + width - right) / 2, height - 5, "tokens generated", "axis", "middle"))
    for one, style in series:
        points = [(x_of(n), y_of(t)) for n, t in zip(one.lengths, one.seconds, strict=True)]
        parts.append(el("path", d=svg.path_of(points), class_=f"line thick {style.colour}"))
        for (x, y), n, t, spread in zip(points, one.lengths, one.seconds, one.spreads, strict=True):
            if spread > 0:
                ends = (y_of(t * (1 + spread / 2)), y_of(t * max(0.05, 1 - spread / 2)))
                parts.append(svg.line(x, ends[0], x, ends[1], f"whisker {style.colour}"))
            hint = f"{one.label}: {n:.0f} tokens in {_seconds(t)}"
            parts.append(el("g", el("title", hint), svg.marker(style, x, y, 4.0)))
    for found in crossings:
        if found.length and found.seconds:
            x, y = x_of(found.length), y_of(found.seconds)
            parts.append(el("circle", cx=x, cy=y, r=9, class_="ring"))
            parts.append(svg.text(x - 8, y - 12, f"≈ {found.length:.0f}", "note", "end"))
    if direct:
        wanted = [y_of(s.seconds[-1]) + 4 for s, _ in series]
        for (one, style), y in zip(series, _apart(wanted, 16, height - bottom), strict=True):
            x = x_of(one.lengths[-1]) + 12
            parts.append(svg.text(x, y, svg.clip(one.label, right - 16), f"series {style.colour}"))
    label = "Seconds per call by number of tokens generated, log-log. " + "; ".join(
        f"{s.label}: {_seconds(s.seconds[0])} at {s.lengths[0]:.0f}, {_seconds(s.seconds[-1])} at {s.lengths[-1]:.0f}"
        for s, _ in series
    )
    return svg.figure(width, height, label, *parts)


def change_map(labels: Sequence[str], positions: int, changed: Sequence[set[int]]) -> Markup:
    """Returns a map with one row per frame and one column per position, dark where the frame changed the token."""
    width, row, left = 420, 11, 44
    size = (width - left) / max(positions, 1)
    parts: list[Markup] = []
    for index, label in enumerate(labels):
        y = index * row
        parts.append(svg.text(left - 6, y + 9, label, "tick", "end"))
        parts.append(el("rect", x=left, y=y + 0.5, width=size * positions, height=row - 1.5, class_="settled"))
        boxes = []
        for first, last in _runs(sorted(changed[index]), merge=size <= 3):
            wide = size * (last - first) - (0.5 if size > 3 else 0.0)
            boxes.append(f"M{left + first * size:.1f} {y + 0.5:g}h{wide:.1f}v9.5h{-wide:.1f}z")
        parts.append(el("path", d="".join(boxes), class_="changed"))
    counts = ", ".join(f"{label} {len(c)}" for label, c in zip(labels, changed, strict=True))
    return svg.figure(
        width, row * len(labels), f"Tokens changed out of {positions}: {counts}", *parts, class_="chart change-map"
    )


def _runs(indices: Sequence[int], merge: bool) -> list[tuple[int, int]]:
    """Returns half-open intervals of adjacent indices if `merge`, otherwise one interval per index."""
    runs: list[tuple[int, int]] = []
    for index in indices:
        if merge and runs and runs[-1][1] == index:
            runs[-1] = (runs[-1][0], index + 1)
        else:
            runs.append((index, index + 1))
    return runs


def _linear(low: float, high: float, start: float, end: float):
    return lambda value: start + (end - start) * (value - low) / ((high - low) or 1.0)


def _log(low: float, high: float, start: float, end: float):
    scale = _linear(math.log(low), math.log(high), start, end)
    return lambda value: scale(math.log(value))


def _vertical_grid(ticks, x_of, top: float, base: float) -> Markup:
    lines = [svg.line(x_of(t), top, x_of(t), base, "grid") for t in ticks]
    return Markup("").join(
        [*lines, *(svg.text(x_of(t), base + 15, svg.tick_label(t), "tick", "middle") for t in ticks)]
    )


def _horizontal_grid(ticks, y_of, left: float, right: float) -> Markup:
    lines = [svg.line(left, y_of(t), right, y_of(t), "grid") for t in ticks]
    return Markup("").join(
        [*lines, *(svg.text(left - 6, y_of(t) + 4, svg.tick_label(t), "tick", "end") for t in ticks)]
    )


def _apart(wanted: Sequence[float], gap: float, bottom: float) -> list[float]:
    """Returns label heights moved apart so that none overlap, in the same order and above `bottom`."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    placed = [0.0] * len(wanted)
    last = -math.inf
    for i in order:
        last = placed[i] = max(wanted[i], last + gap)
    # Labels pushed below the chart are moved up again, from the lowest one.
    limit = bottom
    for i in reversed(order):
        placed[i] = min(placed[i], limit)
        limit = placed[i] - gap
    return placed


def _seconds(value: float) -> str:
    if value >= 1:
        return f"{value:.3g} s"
    return f"{value * 1e3:.3g} ms" if value >= 1e-3 else f"{value * 1e6:.3g} µs"
