"""Draws the training stages of all arms as a forest; a stage shared by several arms is one node."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

from diffusion_lm.recipes import svg
from diffusion_lm.recipes.formatting import count
from diffusion_lm.recipes.records import ArmCard, StageCard
from diffusion_lm.recipes.svg import Style, el


@dataclass
class Node:
    """A stage of the forest.

    Attributes:
      name: name of the stage.
      budget: its steps and tokens, as text.
      kind: colour class: "k-ar" or "k-d0" by objective, "k-none" for a stage without training.
      objective: class name of the objective.
      source: the checkpoint from outside the comparison that it starts from, or "".
      arms: labels of the arms that contain the stage.
      ending: labels of the arms whose last stage this is.
      children: stages that start from it.
    """

    name: str
    budget: str
    kind: str
    objective: str
    source: str = ""
    arms: list[str] = field(default_factory=list)
    ending: list[str] = field(default_factory=list)
    children: list["Node"] = field(default_factory=list)


def stage_forest(arms: Sequence[ArmCard]) -> list[Node]:
    """Returns the root nodes. The parent of a stage is its `initial`, or the previous stage if `initial` is absent."""
    nodes: dict[str, Node] = {}
    roots: list[Node] = []
    for arm in arms:
        parents: set[str] = set()
        before = None
        for stage in arm.get("stages") or ():
            name = stage["name"]
            initial = stage.get("initial", before)
            if name not in nodes:
                nodes[name] = Node(name, _budget(stage), _kind(stage), _objective(stage))
                if initial in nodes:
                    nodes[initial].children.append(nodes[name])
                else:
                    nodes[name].source = str(initial or "")
                    roots.append(nodes[name])
            nodes[name].arms.append(arm["label"])
            parents.add(str(initial))
            before = name
        for stage in arm.get("stages") or ():
            if stage["name"] not in parents:
                nodes[stage["name"]].ending.append(arm["label"])
    return roots


def stage_chart(roots: Sequence[Node], labels: Mapping[str, tuple[str, Style]], *, width: int = 1040) -> Markup:
    """Draws the forest from left to right; `labels` maps an arm's label to its caption and style."""
    paths = [path for root in roots for path in _paths(root, [])]
    depth = max((len(path) for path in paths), default=1)
    pill, row, box = 210, 70, 56
    column = (width - pill) / depth
    box_width = min(250.0, column - 34)
    lines = [(path, label) for path in paths for label in (path[-1].ending or [""])]
    heights: dict[str, list[float]] = {}
    for index, (path, _) in enumerate(lines):
        for node in path:
            heights.setdefault(node.name, []).append((index + 0.5) * row)
    centre = {name: (min(ys) + max(ys)) / 2 for name, ys in heights.items()}
    left = {path[i].name: _column(i, len(path), depth) * column for path in paths for i in range(len(path))}
    edges, boxes = [], []
    drawn: set[str] = set()  # shared stages are on several paths
    for index, (path, label) in enumerate(lines):
        for parent, child in zip([None, *path], path, strict=False):
            if child.name in drawn:
                continue
            drawn.add(child.name)
            if parent:
                edges.append(
                    _edge(left[parent.name] + box_width, centre[parent.name], left[child.name], centre[child.name])
                )
            boxes.append(_box(child, left[child.name], centre[child.name], box_width, box))
        if label:
            y, start = (index + 0.5) * row, width - pill
            edges.append(_edge(left[path[-1].name] + box_width, centre[path[-1].name], start, y))
            caption, style = labels[label]
            boxes.append(svg.marker(style, start + 10, y, 5.5))
            boxes.append(svg.text(start + 26, y - 2, svg.clip(label, pill - 26, 13.5), "pill strong"))
            boxes.append(svg.text(start + 26, y + 14, svg.clip(caption, pill - 26, 11), "tick"))
    label = "Stages of every arm. " + "; ".join(
        f"{ending or path[-1].name}: {' then '.join(node.name for node in path)}" for path, ending in lines
    )
    return svg.figure(width, row * len(lines), label, *edges, *boxes, class_="chart stage-chart")


def _paths(node: Node, before: list[Node]) -> list[list[Node]]:
    here = [*before, node]
    own = [here] if node.ending or not node.children else []
    return [*own, *(path for child in node.children for path in _paths(child, here))]


def _column(index: int, length: int, depth: int) -> int:
    """Returns the column of a stage: its index, except that the last stage of a chain is in the last column."""
    return depth - 1 if index == length - 1 and length > 1 else index


def _box(node: Node, x: float, y: float, width: float, height: float) -> Markup:
    shared = f"shared by {len(node.arms)} arms" if len(node.arms) > 1 else ""
    lines = [node.budget, shared or node.objective]
    hint = " · ".join(part for part in (node.name, node.objective, node.budget, node.source, shared) if part)
    return el(
        "g",
        el("title", hint),
        el("rect", x=x, y=y - height / 2, width=width, height=height, rx=7, class_=f"stage {node.kind}"),
        el("rect", x=x, y=y - height / 2, width=5, height=height, rx=2, class_=f"stripe {node.kind}"),
        svg.text(x + 14, y - 10, svg.clip(node.name, width - 22, 12.5), "label strong"),
        svg.text(x + 14, y + 5, svg.clip(lines[0], width - 22, 11), "tick"),
        svg.text(x + 14, y + 19, svg.clip(lines[1], width - 22, 11), "tick em" if shared else "tick"),
    )


def _edge(x1: float, y1: float, x2: float, y2: float) -> Markup:
    middle = (x1 + x2) / 2
    d = f"M{x1:.1f} {y1:.1f}C{middle:.1f} {y1:.1f} {middle:.1f} {y2:.1f} {x2:.1f} {y2:.1f}"
    return el("path", d=d, class_="edge")


def _budget(stage: StageCard) -> str:
    if not stage.get("steps"):
        return "no training"
    return f"{stage['steps']:,} steps · {count(stage.get('tokens') or 0)} tokens"


def _objective(stage: StageCard) -> str:
    return str(stage.get("objective") or "") if stage.get("steps") else "initial parameters"


def _kind(stage: StageCard) -> str:
    if not stage.get("steps"):
        return "k-none"
    return "k-ar" if "autoregressive" in str(stage.get("objective", "")).lower() else "k-d0"
