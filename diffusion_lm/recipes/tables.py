"""The quality table (arms by tasks, with intervals, best arm in bold), as Markdown and for the terminal."""

import contextlib
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple, TextIO

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from diffusion_lm.core.files import as_path, read_text, write_text
from diffusion_lm.recipes import likelihood_table, summary
from diffusion_lm.recipes.formatting import MISSING
from diffusion_lm.recipes.records import ArmCard, LogRow, Results, Speed, TaskCard

MAX_COLUMNS = 100


class QualityCell(NamedTuple):
    """One printed score: `value` and `interval` as text; `interval` is empty if there is none."""

    value: str
    interval: str
    best: bool

    @property
    def text(self) -> str:
        """Value and interval on one line."""
        return f"{self.value} {self.interval}".strip()


def quality_rows(results: Results) -> list[tuple[ArmCard, list[QualityCell]]]:
    """Returns each arm with its printed cells, one per task, in the order of `results`."""
    best = {task["name"]: summary.best_arms(results, task) for task in results["tasks"]}
    rows = []
    for arm in results["arms"]:
        cells = []
        for task in results["tasks"]:
            measured = summary.cell(results, arm["name"], task["name"])
            if measured is None:
                cells.append(QualityCell(MISSING, "", False))
                continue
            places, bounds = summary.digits(results, task["name"]), summary.bounds_of(measured)
            interval = f"[{bounds[0]:.{places}f}, {bounds[1]:.{places}f}]" if bounds else ""
            cells.append(QualityCell(f"{measured['value']:.{places}f}", interval, arm["name"] in best[task["name"]]))
        rows.append((arm, cells))
    return rows


def task_heading(task: TaskCard) -> str:
    """Returns a column heading, e.g. `Translation (BLEU)`; a down arrow marks metrics where lower is better."""
    metric = task.get("metric_label") or task.get("metric") or ""
    arrow = "" if task.get("higher_is_better", True) else " ↓"
    return f"{task['label']} ({metric}){arrow}" if metric else f"{task['label']}{arrow}"


def quality_markdown(results: Results) -> str:
    """Returns the quality table as GitHub Markdown, at most 100 characters wide; further tasks go to further tables."""
    rows = quality_rows(results)
    first = ["Arm", *(_escaped(_short(arm["label"])) for arm, _ in rows)]
    columns = [
        [_escaped(task_heading(task)), *(f"**{c.value}** {c.interval}".strip() if c.best else c.text for c in column)]
        for task, column in zip(results["tasks"], _transposed(rows), strict=True)
    ]
    groups: list[list[list[str]]] = [[]]
    for column in columns:
        if groups[-1] and _width([first, *groups[-1], column]) > MAX_COLUMNS:
            groups.append([])
        groups[-1].append(column)
    return "\n\n".join(_markdown_table([first, *group]) for group in groups)


def markdown(results: Results, speed: Speed | None = None) -> str:
    """Returns the content of `results.md`: findings, quality table, selected checkpoints, likelihood table, notes."""
    found = summary.summarise(results, speed)
    parts = [f"# {_escaped(results.get('title') or results['name'])}", _escaped(found.headline)]
    if found.findings:
        parts.append("\n".join(f"- {_escaped(finding)}" for finding in found.findings))
    parts += [quality_markdown(results), intervals(results)]
    if chosen := selections(results):
        parts.append("\n".join(f"- {_escaped(sentence)}" for sentence in chosen))
    if likelihood_table.has_bounds(results):
        parts.append(likelihood_table.markdown(results))
    notes = list(results.get("notes") or ())
    if notes:
        parts.append("\n".join(f"- {_escaped(note)}" for note in notes))
    if results.get("fingerprint"):
        parts.append(f"Configuration fingerprint: `{results['fingerprint']}`.")
    return "\n\n".join(parts) + "\n"


def selections(results: Results) -> list[str]:
    """Returns one sentence per cell with a selected checkpoint: its step and the metric that selected it."""
    sentences = []
    for arm in results["arms"]:
        for task in results["tasks"]:
            found = results.get("cells", {}).get(arm["name"], {}).get(task["name"]) or {}
            if "selected_step" not in found:
                continue
            steps = found["selected_step"]
            shown = f"steps {', '.join(f'{one:,}' for one in steps)}" if isinstance(steps, list) else f"step {steps:,}"
            sentences.append(
                f"{arm['label']} on {task['label']}: checkpoint at {shown} of {found['selected_of']:,}, "
                f"selected by {found['selected_by']}."
            )
    return sentences


def intervals(results: Results) -> str:
    """Returns the caption of the quality table: what the intervals cover."""
    count = results.get("replicates", 1)
    over = "the held-out examples" if count == 1 else f"the held-out examples and {count} replicates (seeds)"
    scores = "" if count == 1 else "Scores are means over the replicates. "
    return f"{scores}Brackets: 95% confidence interval over {over}. Bold: best score in the column."


def write_markdown(results: Results, workdir: Path, speed: Speed | None = None) -> Path:
    """Writes `workdir/results.md` atomically and returns its path."""
    path = as_path(workdir) / "results.md"
    write_text(path, markdown(results, speed))
    return path


def read_jsonl(path: Path) -> list[LogRow]:
    """Returns the rows of a JSON-lines log; skips a last line that a killed run left incomplete."""
    lines = read_text(path).split("\n")
    complete, last = lines[:-1], lines[-1]
    rows = [json.loads(line) for line in complete if line.strip()]
    with contextlib.suppress(json.JSONDecodeError):
        rows += [json.loads(last)] if last.strip() else []
    return rows


def quality_terminal(results: Results, file: TextIO | None = None) -> None:
    """Prints the quality table to `file` (default: standard output), at most 100 characters wide."""
    file = file or sys.stdout
    console = Console(file=file, highlight=False)
    width = console.width = min(MAX_COLUMNS, console.width) if console.is_terminal else MAX_COLUMNS
    rows = quality_rows(results)
    label_width = max((len(_short(arm["label"])) for arm, _ in rows), default=3)
    cell_width = max([len(c.text) for _, cells in rows for c in cells] + [14])
    per_table = max(1, (width - label_width - 4) // (cell_width + 2))
    for start in range(0, len(results["tasks"]), per_table):
        table = Table(box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
        table.add_column("Arm", no_wrap=True)
        for task in results["tasks"][start : start + per_table]:
            table.add_column(Text(task_heading(task)), justify="right", max_width=max(cell_width, 14))
        for arm, cells in rows:
            texts = [Text(c.text, style="bold" if c.best else "") for c in cells[start : start + per_table]]
            table.add_row(Text(_short(arm["label"])), *texts)
        console.print(table)
    console.print(Text(intervals(results), style="dim"))


def _transposed(rows: list[tuple[ArmCard, list[QualityCell]]]) -> list[list[QualityCell]]:
    return [list(column) for column in zip(*(cells for _, cells in rows), strict=True)]


def _short(label: str, limit: int = 32) -> str:
    return label if len(label) <= limit else label[: limit - 1] + "…"


def _escaped(text: str) -> str:
    """Escapes Markdown, so that labels and model output cannot break the table."""
    text = " ".join(str(text).split())
    for mark in ("\\", "|", "<", "`", "*", "_", "[", "]"):
        text = text.replace(mark, "\\" + mark)
    return text


def _width(columns: Iterable[list[str]]) -> int:
    return sum(max(map(len, column)) + 3 for column in columns) + 1


def _markdown_table(columns: list[list[str]]) -> str:
    widths = [max(3, *map(len, column)) for column in columns]
    lines = []
    for i, row in enumerate(zip(*columns, strict=True)):
        padded = [text.rjust(width) for text, width in zip(row[1:], widths[1:], strict=True)]
        lines.append(f"| {' | '.join([row[0].ljust(widths[0]), *padded])} |")
        if i == 0:
            rule = ["-" * w if k == 0 else "-" * (w - 1) + ":" for k, w in enumerate(widths)]
            lines.append(f"| {' | '.join(rule)} |")
    return "\n".join(lines)
