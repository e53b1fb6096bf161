"""The few drawing parts the report's charts are made of: escaped SVG elements, axes, markers.

Colours are CSS classes (`k0`..., see templates/report.css), so that one drawing serves light and dark.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from markupsafe import Markup, escape

GLYPH = 0.56  # mean width of a character in ems, to keep labels inside their boxes


class Style(NamedTuple):
    """How an arm or series looks everywhere in the report: a colour class and a marker shape."""

    colour: str
    marker: str


PLAIN = Style("k-none", "circle")
_MARKERS = ("circle", "square", "triangle", "diamond", "down", "plus")
_FAMILY_COLOURS = {
    "none": ("k-none",),
    "ar": ("k-ar", "k-ar2", "k-ar3"),
    "diffusion": ("k-d0", "k-d1", "k-d2", "k-d3", "k-d4"),
}
STEP_STYLES = tuple(
    Style(f"k-s{index}", marker) for index, marker in enumerate(("circle", "triangle", "diamond", "down", "plus"))
)
AR_STYLE = Style("k-ar", "square")


def arm_styles(arms: Sequence[tuple[str, str]]) -> dict[str, Style]:
    """Gives every `(name, family)` a look: the colour says the family, and colour with marker say the arm."""
    seen: dict[str, int] = {}
    styles = {}
    for index, (name, family) in enumerate(arms):
        colours = _FAMILY_COLOURS.get(family, _FAMILY_COLOURS["none"])
        styles[name] = Style(colours[seen.get(family, 0) % len(colours)], _MARKERS[index % len(_MARKERS)])
        seen[family] = seen.get(family, 0) + 1
    return styles


def el(tag: str, *children: object, **attributes: object) -> Markup:
    """An element with escaped attributes and children; `class_` and `stroke_width` give `class` and `stroke-width`."""
    parts = [
        Markup(' {}="{}"').format(name.rstrip("_").replace("_", "-"), _number(value))
        for name, value in attributes.items()
        if value is not None
    ]
    inner = Markup("").join(escape(child) for child in children)
    return Markup("<{}{}>{}</{}>").format(Markup(tag), Markup("").join(parts), inner, Markup(tag))


def figure(width: float, height: float, label: str, *children: object, class_: str = "chart") -> Markup:
    """A whole drawing that scales to its column; `label` is what a screen reader says in its place."""
    return el(
        "svg", el("title", label), *children, viewBox=f"0 0 {width:g} {height:g}", class_=class_, role="img",
        aria_label=label, style=f"max-width:{width * 1.3:.0f}px",
    )  # fmt: skip


def path_of(points: Sequence[tuple[float, float]]) -> str:
    """The `d` of a line through points."""
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def marker(style: Style, x: float, y: float, size: float = 5.0, **attributes: object) -> Markup:
    """The marker of a series at a point."""
    class_ = f"mark {style.colour}"
    s = size
    shapes = {
        "square": [(-s, -s), (s, -s), (s, s), (-s, s)],
        "triangle": [(0, -1.25 * s), (1.2 * s, 0.9 * s), (-1.2 * s, 0.9 * s)],
        "down": [(0, 1.25 * s), (1.2 * s, -0.9 * s), (-1.2 * s, -0.9 * s)],
        "diamond": [(0, -1.4 * s), (1.4 * s, 0), (0, 1.4 * s), (-1.4 * s, 0)],
        "plus": [
            (-s * a, -s * b)
            for a, b in ((1.3, 0.45), (0.45, 0.45), (0.45, 1.3), (-0.45, 1.3), (-0.45, 0.45), (-1.3, 0.45))
        ],
    }
    if style.marker == "circle":
        return el("circle", cx=x, cy=y, r=1.1 * s, class_=class_, **attributes)
    points = shapes[style.marker]
    if style.marker == "plus":
        points = points + [(-px, -py) for px, py in points]
    return el("path", d=path_of([(x + dx, y + dy) for dx, dy in points]) + "Z", class_=class_, **attributes)


def text(x: float, y: float, content: object, class_: str = "", anchor: str = "start") -> Markup:
    """A line of text."""
    return el("text", content, x=x, y=y, class_=class_ or None, text_anchor=None if anchor == "start" else anchor)


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    """A straight line."""
    return el("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def clip(label: str, width: float, size: float = 12.0) -> str:
    """Shortens a label to about `width` pixels at a font size."""
    room = max(3, int(width / (size * GLYPH)))
    return label if len(label) <= room else label[: room - 1] + "…"


def linear_ticks(low: float, high: float, target: int = 4) -> list[float]:
    """Round numbers that cover [low, high], about `target` of them."""
    if not high > low:
        high = low + 1.0
    raw = (high - low) / target
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * min((m for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999), default=10)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 10) for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2, 5 of every decade inside [low, high], thinned to the decades where there are many."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [m * 10.0**e for e in exponents for m in (1, 2, 5) if low * 0.999 <= m * 10.0**e <= high * 1.001]
    if len(ticks) > 7:
        ticks = [t for t in ticks if math.isclose(math.log10(t), round(math.log10(t)))]
    return ticks


def tick_label(value: float) -> str:
    """Shortest label of a tick: 0.5, 20, 4K."""
    if abs(value) >= 1e6:
        return f"{value / 1e6:g}M"
    return f"{value / 1e3:g}K" if abs(value) >= 1e4 or (abs(value) >= 1e3 and value % 500 == 0) else f"{value:g}"


def _number(value: object) -> object:
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else value
