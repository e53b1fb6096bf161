"""The likelihood matrix: bits per real token of arms that have a likelihood or a bound, and their forward passes."""

from collections.abc import Mapping
from typing import Any

from diffusion_lm.recipes.formatting import MISSING

SIGNS = {"exact": "", "nelbo": "<= "}
"""What stands before a value: a bound is not the likelihood."""

READING = (
    "Bits per real token of the held-out targets, EOS included; scored padding is charged to the real tokens. `<=` "
    "marks an upper bound (NELBO), an unbiased estimate with the standard error of its Monte-Carlo draws after `±`; "
    "objectives without a likelihood have no entry. Passes: network calls per completion."
)


def rows(results: Mapping[str, Any]) -> list[tuple[str, list[str], str]]:
    """Returns (label, one cell a task, forward passes) of each arm that has a likelihood or bound on any task."""
    found = []
    for arm in results["arms"]:
        bounds = results.get("bounds", {}).get(arm["name"], {})
        cells = []
        for task in results["tasks"]:
            bound = bounds.get(task["name"], {})
            cells.append(_value(bound))
        if any(text != MISSING for text in cells):
            found.append((arm["label"], cells, _passes(results, arm["name"])))
    return found


def columns(results: Mapping[str, Any]) -> list[str]:
    """Returns the headings that belong to `rows`."""
    return ["Arm", *(f"{task['label']} (bits/token)" for task in results["tasks"]), "Passes"]


def has_bounds(results: Mapping[str, Any]) -> bool:
    """Says whether any arm's bound is a NELBO: a table of exact values alone compares nothing."""
    measured = results.get("bounds", {}).values()
    return any(bound.get("kind") == "nelbo" for arm in measured for bound in arm.values())


def markdown(results: Mapping[str, Any]) -> str:
    """Returns the matrix as GitHub Markdown with how to read it."""
    head = columns(results)
    lines = [f"| {' | '.join(head)} |", f"|{'|'.join([' --- '] + [' ---: '] * (len(head) - 1))}|"]
    lines += [f"| {' | '.join([label, *cells, passes])} |" for label, cells, passes in rows(results)]
    return "\n".join(lines) + "\n\n" + READING


def _value(bound: Mapping[str, Any]) -> str:
    bits, error = bound.get("bits_per_real_token"), bound.get("bits_per_real_token_error")
    if bits is None:
        return MISSING
    return f"{SIGNS[bound['kind']]}{bits:.3f}" + ("" if error is None else f" ± {error:.3f}")


def _passes(results: Mapping[str, Any], arm: str) -> str:
    seen = [
        cell["conditions"]["forward_passes_per_sample"]
        for cell in results.get("cells", {}).get(arm, {}).values()
        if "forward_passes_per_sample" in cell.get("conditions", {})
    ]
    if not seen:
        return MISSING
    low, high = (f"{value:.0f}" for value in (min(seen), max(seen)))
    return low if low == high else f"{low}-{high}"
