"""Building blocks of the report's charts: escaped SVG elements, axis ticks and markers.

Colours are CSS classes (`k-ar`, `k-d0`, ..., see templates/report.css), so that one drawing serves light and dark mode.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from markupsafe import Markup, escape

GLYPH = 0.56  # mean width of a character in ems, to keep labels inside their boxes


class Style(NamedTuple):
    """The colour class and marker shape of an arm or series, the same everywhere in the report."""

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
    """Returns a style for every `(name, family)`: colours identify families, colour and marker together the arm."""
    used: dict[str, int] = {}
    styles = {}
    for index, (name, family) in enumerate(arms):
        colours = _FAMILY_COLOURS.get(family, _FAMILY_COLOURS["none"])
        styles[name] = Style(colours[used.get(family, 0) % len(colours)], _MARKERS[index % len(_MARKERS)])
        used[family] = used.get(family, 0) + 1
    return styles


def el(tag: str, *children: object, **attributes: object) -> Markup:
    """Returns an element with escaped attributes and children; underscores in names become `-` (final ones vanish)."""
    parts = [
        Markup(' {}="{}"').format(name.rstrip("_").replace("_", "-"), _number(value))
        for name, value in attributes.items()
        if value is not None
    ]
    inner = Markup("").join(escape(child) for child in children)
    return Markup("<{}{}>{}</{}>").format(Markup(tag), Markup("").join(parts), inner, Markup(tag))


def figure(width: float, height: float, label: str, *children: object, class_: str = "chart") -> Markup:
    """Returns a whole drawing that scales to its column; `label` is its text for screen readers."""
    return el(
        "svg", el("title", label), *children, viewBox=f"0 0 {width:g} {height:g}", class_=class_, role="img",
        aria_label=label, style=f"max-width:{width * 1.3:.0f}px",
    )  # fmt: skip


def path_of(points: Sequence[tuple[float, float]]) -> str:
    """Returns the path data (attribute `d`) of a line through points."""
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def marker(style: Style, x: float, y: float, size: float = 5.0, **attributes: object) -> Markup:
    """Returns the marker of a series at a point."""
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
    """Returns a line of text."""
    return el("text", content, x=x, y=y, class_=class_ or None, text_anchor=None if anchor == "start" else anchor)


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    """Returns a straight line."""
    return el("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def clip(label: str, width: float, size: float = 12.0) -> str:
    """Shortens a label to about `width` pixels at a font size."""
    room = max(3, int(width / (size * GLYPH)))
    return label if len(label) <= room else label[: room - 1] + "…"


def linear_ticks(low: float, high: float, target: int = 4) -> list[float]:
    """Returns about `target` round numbers that cover [low, high]."""
    if not high > low:
        high = low + 1.0
    raw = (high - low) / target
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * min((m for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999), default=10)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 10) for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Returns 1, 2, 5 of every decade inside [low, high], or powers of ten only if these are more than seven."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [m * 10.0**e for e in exponents for m in (1, 2, 5) if low * 0.999 <= m * 10.0**e <= high * 1.001]
    if len(ticks) > 7:
        ticks = [t for t in ticks if math.isclose(math.log10(t), round(math.log10(t)))]
    return ticks


def tick_label(value: float) -> str:
    """Returns the short label of a tick: 0.5, 20, 4K."""
    if abs(value) >= 1e6:
        return f"{value / 1e6:g}M"
    return f"{value / 1e3:g}K" if abs(value) >= 1e4 or (abs(value) >= 1e3 and value % 500 == 0) else f"{value:g}"


def _number(value: object) -> object:
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else value
