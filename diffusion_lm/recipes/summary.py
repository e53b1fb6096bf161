"""Summarises the numbers of a comparison in sentences.

Reads the plain data of `results.json` (see `report.write` for its fields). A difference between two arms is called
significant only if the 95% interval of a paired bootstrap excludes zero. Where no paired bootstrap is available, the
two separate intervals must not overlap.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from diffusion_lm.recipes import statistics
from diffusion_lm.recipes.crossover import speed_sentences
from diffusion_lm.recipes.formatting import count, is_number
from diffusion_lm.recipes.records import ArmCard, Cell, Results, Speed, TaskCard


class Verdict(NamedTuple):
    """The comparison of two arms on one task.

    Attributes:
      outcome: "better" or "worse" (the first arm, significantly), or "inconclusive".
      difference: score of the first arm minus score of the second, in the metric's unit.
      low, high: 95% interval of the difference; None if only the two separate intervals were compared.
    """

    outcome: str
    difference: float
    low: float | None = None
    high: float | None = None


class Summary(NamedTuple):
    """The head of the report: the headline and further findings, in sentences."""

    headline: str
    findings: tuple[str, ...]


def cell(results: Results, arm: str, task: str) -> Cell | None:
    """Returns the cell of an arm on a task, or None if it has no finite score."""
    found = results.get("cells", {}).get(arm, {}).get(task)
    return found if found and is_number(found.get("value")) else None


def bounds_of(measured: Cell) -> tuple[float, float] | None:
    """Returns the confidence interval of a cell, or None if it has none."""
    low, high = measured.get("low"), measured.get("high")
    return (float(low), float(high)) if is_number(low) and is_number(high) else None


def digits(results: Results, task: str) -> int:
    """Returns the number of decimals to print: 3 for metrics in [0, 1], otherwise 1."""
    values = [abs(c["value"]) for arm in results["arms"] if (c := cell(results, arm["name"], task))]
    highs = [abs(b[1]) for arm in results["arms"] if (c := cell(results, arm["name"], task)) and (b := bounds_of(c))]
    return 3 if values and 0 < max(values + highs) <= 1.0 else 1


def best_arms(results: Results, task: TaskCard) -> set[str]:
    """Returns the names of the arms with the best score on a task, rounded as printed; ties give several names."""
    places = digits(results, task["name"])
    measured = {arm["name"]: cell(results, arm["name"], task["name"]) for arm in results["arms"]}
    scores = {name: round(found["value"], places) for name, found in measured.items() if found}
    if len(scores) < 2 or len(set(scores.values())) == 1:
        return set()
    best = (max if task.get("higher_is_better", True) else min)(scores.values())
    return {name for name, score in scores.items() if score == best}


def compare(results: Results, task: TaskCard, first: str, second: str) -> Verdict | None:
    """Compares two arms on a task by the strongest evidence available; returns None if one of them has no score."""
    name = task["name"]
    one, two = cell(results, first, name), cell(results, second, name)
    if one is None or two is None:
        return None
    difference = one["value"] - two["value"]
    sign = 1.0 if task.get("higher_is_better", True) else -1.0
    interval = _recorded_difference(results, name, first, second) or _paired_bootstrap(one, two)
    if interval:
        low, high = interval
        significant = low > 0 or high < 0
        return Verdict(_outcome(significant, sign * difference), difference, low, high)
    bounds_one, bounds_two = bounds_of(one), bounds_of(two)
    significant = bool(bounds_one and bounds_two and (bounds_one[0] > bounds_two[1] or bounds_two[0] > bounds_one[1]))
    return Verdict(_outcome(significant, sign * difference), difference)


def _outcome(significant: bool, gain: float) -> str:
    if not significant or gain == 0:
        return "inconclusive"
    return "better" if gain > 0 else "worse"


def _recorded_difference(results: Results, task: str, first: str, second: str) -> tuple[float, float] | None:
    for row in results.get("differences", {}).get(task, ()):
        if (row["arm"], row["against"]) == (first, second):
            return row["low"], row["high"]
        if (row["arm"], row["against"]) == (second, first):
            return -row["high"], -row["low"]
    return None


def _paired_bootstrap(one: Cell, two: Cell) -> tuple[float, float] | None:
    """Returns the paired interval from per-example scores; None if the score is not their mean (e.g. corpus BLEU)."""
    tables = []
    for measured in (one, two):
        values = measured.get("per_example")
        if not values or not all(is_number(v) for v in values):
            return None
        mean = float(np.mean(values))
        if not math.isclose(mean, measured["value"], rel_tol=1e-6, abs_tol=1e-9):
            return None
        tables.append(statistics.mean_rows(np.asarray(values, np.float64)))
    if tables[0].shape != tables[1].shape:
        return None
    difference = statistics.paired_difference(tables[0], tables[1], statistics.ratio)
    return difference.low, difference.high


def transferred_arms(results: Results) -> list[ArmCard]:
    """Returns the diffusion arms that share a trained stage with an AR arm (AR2Diff), sorted by training tokens."""
    ar_stages = {s["name"] for a in _family(results, "ar") for s in a.get("stages", ()) if s.get("steps")}
    found = [a for a in _family(results, "diffusion") if any(s["name"] in ar_stages for s in a.get("stages", ()))]
    return sorted(found, key=lambda arm: arm.get("train_tokens") or 0)


def summarise(results: Results, speed: Speed | None = None) -> Summary:
    """Returns the headline and the findings, computed from the numbers."""
    findings = [
        *_transfer(results),
        *_more_transfer_steps(results),
        *_above_untrained(results),
        *speed_sentences(speed),
        *_forward_passes(results),
        *_caveats(results),
    ]
    return Summary(_headline(results), tuple(findings))


def _family(results: Results, family: str) -> list[ArmCard]:
    return [arm for arm in results["arms"] if arm.get("family") == family]


def _best_of(results: Results, task: TaskCard, arms: Iterable[ArmCard]) -> ArmCard | None:
    scored = [arm for arm in arms if cell(results, arm["name"], task["name"])]
    sign = 1 if task.get("higher_is_better", True) else -1
    return max(scored, key=lambda arm: sign * results["cells"][arm["name"]][task["name"]]["value"], default=None)


def _scores(results: Results, task: TaskCard, first: str, second: str) -> str:
    places, name = digits(results, task["name"]), task["name"]
    values = [cell(results, arm, name)["value"] for arm in (first, second)]  # type: ignore[index]
    return f"{values[0]:.{places}f} vs. {values[1]:.{places}f} {task.get('metric_label', task.get('metric', ''))}"


def _joined(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def _family_name(results: Results, family: str, name: str) -> str:
    """Returns `name`, or "the best of N `name` arms" if the family has several arms."""
    number = len(_family(results, family))
    return name if number == 1 else f"the best of {number} {name} arms"


def _headline(results: Results) -> str:
    clauses: dict[str, list[str]] = {"better": [], "worse": [], "inconclusive": []}
    for task in results["tasks"]:
        ar, diffusion = (_best_of(results, task, _family(results, f)) for f in ("ar", "diffusion"))
        if ar is None or diffusion is None:
            continue
        verdict = compare(results, task, diffusion["name"], ar["name"])
        scores = _scores(results, task, diffusion["name"], ar["name"])
        if verdict and verdict.outcome == "worse":
            scores = _scores(results, task, ar["name"], diffusion["name"])
        if verdict:
            label = "" if verdict.outcome == "worse" else f"{diffusion['label']}, "
            clauses[verdict.outcome].append(f"{task['label']} ({label}{scores})")
    diffusion_arm = _family_name(results, "diffusion", "diffusion")
    ar_arm = _family_name(results, "ar", "AR")
    sentences = []
    if clauses["better"]:
        sentences.append(f"{diffusion_arm} is significantly better than {ar_arm} on {_joined(clauses['better'])}.")
    if clauses["worse"]:
        sentences.append(f"{ar_arm} is significantly better than {diffusion_arm} on {_joined(clauses['worse'])}.")
    if clauses["inconclusive"]:
        sentences.append(
            f"The difference between {diffusion_arm} and {ar_arm} is not significant on "
            f"{_joined(clauses['inconclusive'])}."
        )
    if sentences:
        return " ".join(sentence[0].upper() + sentence[1:] for sentence in sentences)
    best = []
    for task in results["tasks"]:
        if arm := _best_of(results, task, results["arms"]):
            value = results["cells"][arm["name"]][task["name"]]["value"]
            score = f"{value:.{digits(results, task['name'])}f} {task.get('metric_label', '')}".strip()
            best.append(f"{task['label']} ({arm['label']}, {score})")
    return f"Best scores: {_joined(best)}." if best else "No arm has been scored yet."


def _groups(pairs: Iterable[tuple[str, Verdict | None]]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {"better": [], "worse": [], "inconclusive": []}
    for label, verdict in pairs:
        if verdict:
            groups[verdict.outcome].append(label)
    return groups


def _transfer(results: Results) -> list[str]:
    transferred = transferred_arms(results)
    names = {arm["name"] for arm in transferred}
    scratch = [arm for arm in _family(results, "diffusion") if arm["name"] not in names]
    pairs, chosen = [], []
    for task in results["tasks"]:
        best, base = _best_of(results, task, transferred), _best_of(results, task, scratch)
        if best and base:
            pairs.append((task["label"], compare(results, task, best["name"], base["name"])))
            chosen.append(best["label"])
    if not pairs:
        return []
    if len(set(chosen)) == 1:
        best_of = f"The best of {len(transferred)} arms that start from an AR stage ({chosen[0]})"
        start = best_of if len(transferred) > 1 else chosen[0]
    else:
        start = f"The best of {len(transferred)} arms that start from an AR stage"
        pairs = [(f"{label} ({arm})", verdict) for (label, verdict), arm in zip(pairs, chosen, strict=True)]
    groups = _groups(pairs)
    parts: list[str] = []
    for outcome, words in (
        ("better", "significantly better than"),
        ("worse", "significantly worse than"),
        ("inconclusive", "not significantly different from"),
    ):
        if groups[outcome]:
            parts.append(f"{words} {'it' if parts else 'diffusion from scratch'} on {_joined(groups[outcome])}")
    return [f"{start} is {'; '.join(parts)}."]


def _more_transfer_steps(results: Results) -> list[str]:
    arms = transferred_arms(results)
    if len(arms) < 2:
        return []
    first, last = arms[0], arms[-1]
    parts = []
    for task in results["tasks"]:
        if verdict := compare(results, task, last["name"], first["name"]):
            note = " (not significant)" if verdict.outcome == "inconclusive" else ""
            parts.append(f"{task['label']} {verdict.difference:+.{digits(results, task['name'])}f}{note}")
    extra = (last.get("train_tokens") or 0) - (first.get("train_tokens") or 0)
    budget = f" ({count(extra)} more training tokens)" if extra > 0 else ""
    return [f"From {first['label']} to {last['label']}{budget}: {', '.join(parts)}."] if parts else []


def _above_untrained(results: Results) -> list[str]:
    trained = [arm for arm in results["arms"] if arm.get("family") != "none"]
    checked, failures = 0, []
    for untrained in _family(results, "none"):
        for task in results["tasks"]:
            for arm in trained:
                if verdict := compare(results, task, arm["name"], untrained["name"]):
                    checked += 1
                    if verdict.outcome != "better":
                        failures.append(f"{arm['label']} on {task['label']}")
    if not checked:
        return []
    if failures:
        shown = _joined(failures[:4]) + (f" ({len(failures) - 4} more)" if len(failures) > 4 else "")
        return [f"Not significantly better than the untrained network: {shown}."]
    return ["Every trained arm is significantly better than the untrained network on every task."]


def _forward_passes(results: Results) -> list[str]:
    parts = []
    for family, label in (("ar", "autoregressive"), ("diffusion", "diffusion")):
        passes = [
            c["conditions"]["forward_passes_per_sample"]
            for arm in _family(results, family)
            for task in results["tasks"]
            if (c := cell(results, arm["name"], task["name"]))
            and is_number((c.get("conditions") or {}).get("forward_passes_per_sample"))
        ]
        if passes:
            low, high = min(passes), max(passes)
            spread = f"{low:.0f}" if round(low) == round(high) else f"{low:.0f} to {high:.0f}"
            parts.append(f"{spread} for the {label} arms")
    return [f"Forward passes per completion: {', '.join(parts)}."] if parts else []


def cut_sentences(results: Results) -> list[str]:
    """Returns one sentence per data set and part that was truncated, with the stages or tasks that use it."""
    users: dict[str, list[str]] = {}
    for cut in results.get("cuts", ()):
        users.setdefault(cut["text"], []).append(cut["used_by"])
    return [f"{text}: {', '.join(names)}" for text, names in users.items()]


def _caveats(results: Results) -> list[str]:
    found = [f"{sentence}." for sentence in cut_sentences(results)]
    tokens = [arm["train_tokens"] for arm in results["arms"] if arm.get("family") != "none" and arm.get("train_tokens")]
    if tokens and max(tokens) > 1.01 * min(tokens):
        found.append(f"Training budgets differ between arms: {count(min(tokens))} to {count(max(tokens))} tokens.")
    small = [task["label"] for task in results["tasks"] if is_number(task.get("examples")) and task["examples"] < 100]
    if small:
        found.append(f"Fewer than 100 held-out examples on {_joined(small)}: the confidence intervals are wide.")
    return found
