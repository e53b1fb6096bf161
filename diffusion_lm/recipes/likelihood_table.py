"""The likelihood table: bits per real token for arms with a likelihood or bound, and forward passes per completion."""

from diffusion_lm.recipes.formatting import MISSING
from diffusion_lm.recipes.records import Bound, Results

SIGNS = {"exact": "", "nelbo": "<= "}
"""Prefix of a value by kind; `<=` marks an upper bound of the negative log-likelihood."""

CAPTION = (
    "Bits per real token of the held-out targets. EOS counts as a real token. Scored padding adds to the loss but not "
    "to the token count. `<=` marks an upper bound (NELBO), estimated without bias; `±` is the standard error of its "
    "Monte Carlo draws. Objectives without a likelihood or bound have no entry. Passes: forward passes per completion."
)


def rows(results: Results) -> list[tuple[str, list[str], str]]:
    """Returns (label, one cell per task, forward passes) for each arm with a likelihood or bound on any task."""
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


def columns(results: Results) -> list[str]:
    """Returns the column headings of `rows`."""
    return ["Arm", *(f"{task['label']} (bits/token)" for task in results["tasks"]), "Passes"]


def has_bounds(results: Results) -> bool:
    """Returns whether any arm has a NELBO; with exact values only, the table would compare nothing."""
    measured = results.get("bounds", {}).values()
    return any(bound.get("kind") == "nelbo" for arm in measured for bound in arm.values())


def markdown(results: Results) -> str:
    """Returns the table as GitHub Markdown, with its caption."""
    head = columns(results)
    lines = [f"| {' | '.join(head)} |", f"|{'|'.join([' --- '] + [' ---: '] * (len(head) - 1))}|"]
    lines += [f"| {' | '.join([label, *cells, passes])} |" for label, cells, passes in rows(results)]
    return "\n".join(lines) + "\n\n" + CAPTION


def _value(bound: Bound) -> str:
    bits, error = bound.get("bits_per_real_token"), bound.get("bits_per_real_token_error")
    if bits is None:
        return MISSING
    return f"{SIGNS[bound['kind']]}{bits:.3f}" + ("" if error is None else f" ± {error:.3f}")


def _passes(results: Results, arm: str) -> str:
    passes = [
        cell["conditions"]["forward_passes_per_sample"]
        for cell in results.get("cells", {}).get(arm, {}).values()
        if "forward_passes_per_sample" in cell.get("conditions", {})
    ]
    if not passes:
        return MISSING
    low, high = (f"{value:.0f}" for value in (min(passes), max(passes)))
    return low if low == high else f"{low}-{high}"
