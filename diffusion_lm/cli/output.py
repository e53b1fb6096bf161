"""Prints results to stdout and progress to stderr. Tables use rich on a terminal and plain text in a pipe."""

import dataclasses
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from diffusion_lm.core.files import json_text, write_text

if TYPE_CHECKING:
    from rich.console import Console

MAX_WIDTH = 100
_GAP = 3
_LEAST_FOLDED = 16
"""Minimum width of a column that wraps, in characters; the table exceeds `MAX_WIDTH` rather than go below it."""


def progress(text: str) -> None:
    """Prints a progress line or a warning to stderr."""
    print(text, file=sys.stderr, flush=True)


def say(text: str = "") -> None:
    """Prints a line of the result to stdout."""
    print(text, flush=True)


def heading(text: str) -> None:
    """Prints a heading of the result."""
    console = _console()
    if console.is_terminal:
        console.print(f"\n[bold]{text}[/bold]")
    else:
        say(f"\n{text}")


def table(
    columns: Sequence[str],
    rows: Sequence[Sequence[object]],
    *,
    right: Sequence[int] = (),
    fold: Sequence[int] | None = None,
) -> None:
    """Prints a table, at most `MAX_WIDTH` characters wide if wrapping cells allows it. Cells are never truncated.

    Args:
      columns: headings.
      rows: cells, printed with `str`.
      right: indices of right-aligned columns.
      fold: indices of columns whose cells may wrap; None = all but the first.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    grid = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 2, 0, 0))
    cells = [[str(cell) for cell in row] for row in rows]
    needed = 0
    for number, name in enumerate(columns):
        justify: Literal["left", "right"] = "right" if number in right else "left"
        folds = number in fold if fold is not None else number > 0
        widest = max(len(text) for text in (name, *(row[number] for row in cells)))
        # rich would truncate columns below their minimum width, so the console must be at least this wide.
        needed += (min(widest, _LEAST_FOLDED) if folds else widest) + _GAP
        grid.add_column(Text(name), justify=justify, overflow="fold", no_wrap=not folds)
    for row in cells:
        grid.add_row(*map(Text, row))
    console = _console(at_least=needed)
    if console.is_terminal:
        console.print(grid)
        return
    # In a pipe, print without the trailing spaces with which rich fills the width.
    with console.capture() as captured:
        console.print(grid)
    say("\n".join(line.rstrip() for line in captured.get().splitlines()))


def facts(pairs: Sequence[tuple[str, object]]) -> None:
    """Prints (name, value) pairs in two columns."""
    width = max((len(name) for name, _ in pairs), default=0)
    for name, value in pairs:
        say(f"  {name:<{width}}  {value}")


def write_result(path: str | None, result: object) -> None:
    """Writes the result of a verb as JSON to `path` ("-" for stdout); does nothing if `path` is None."""
    if path is None:
        return
    text = json_text(plain(result), indent=1) + "\n"
    if path == "-":
        sys.stdout.write(text)
    else:
        write_text(path, text)


def plain(value: object) -> Any:
    """Converts a value to JSON types: dataclasses become objects with a field `class`; unknown types become `str`."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value) if field.repr}
        return {"class": type(value).__name__, **fields}
    if isinstance(value, dict) or hasattr(value, "items"):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    return str(value)


def count(number: float) -> str:
    """Formats a count as `281.6M (281,562,240)`; numbers below 1,000 have no short form."""
    exact = f"{number:,.0f}"
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            digits = f"{number / size:.2f}" if letter == "B" else f"{number / size:.1f}"
            return f"{digits}{letter} ({exact})"
    return exact


def size(number: float) -> str:
    """Formats a number of bytes, e.g. `1.05 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024 or unit == "GiB":
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.2f} {unit}"
        number /= 1024
    raise AssertionError


def flops(number: float, unit: str = "FLOP") -> str:
    """Formats a number of floating-point operations, e.g. `1.7 GFLOP`, or `1.7 G` with an empty `unit`."""
    for limit, letter in ((1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if number >= limit:
            return f"{number / limit:.2f} {letter}{unit}"
    return f"{number:.0f} {unit}".strip()


def _console(at_least: int = 0) -> "Console":
    from rich.console import Console

    console = Console(file=sys.stdout)
    width = min(MAX_WIDTH, console.width) if console.is_terminal else MAX_WIDTH
    return Console(file=sys.stdout, highlight=False, width=max(width, at_least))
