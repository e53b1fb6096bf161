"""Prints the tables of `bench` and returns their figures as plain data for `--json`, with the seconds of each round."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from diffusion_lm.cli import output

Measurement = Mapping[str, Any]
"""The result of `bench.against`: facts of our side (`facts`), of PyTorch (`torch`), and seconds of each round."""


def train(found: Measurement) -> dict[str, Any]:
    """Prints the training step of one or both sides; returns the figures."""
    facts, other = found["facts"], found.get("torch")
    rows = []
    for label, seconds in found["seconds"].items():
        one = other if other is not None and label in other["labels"] else facts
        row: dict[str, Any] = {"label": label, "peak_memory": one["peak_memory"]}
        row["first_call_seconds"] = one["compile_seconds"] if one is facts else one["first_call_seconds"]
        rows.append(row | _speed(seconds, facts["tokens_per_step"]))
        if one is facts and facts["peak_flops"] and seconds:
            achieved = facts["flops_per_step"] / rows[-1]["seconds"]["median"]
            rows[-1]["mfu"] = achieved / facts["peak_flops"]
    output.heading(f"training step of {facts['objective']}: {facts['batch_size']} rows x {facts['row_length']}")
    output.table(
        ["framework", "ms/step", "quartiles", "tokens/s", "MFU", "memory", "first call"],
        [
            [
                row["label"],
                *_shown(row),
                f"{row['mfu']:.0%}" if "mfu" in row else "",
                output.size(row["peak_memory"]),
                f"{row['first_call_seconds']:.2f} s",
            ]
            for row in rows
        ],
        right=range(1, 7),
        fold=[],
    )
    peak = facts["peak_flops"]
    tokens = f"{facts['tokens_per_step']:,} per step; {facts['scored_per_row']} of {facts['row_length']} per row scored"
    pairs = [
        ("parameters", output.count(facts["parameters"])),
        ("tokens", tokens),
        ("FLOPs per step", f"{output.flops(facts['flops_per_step'])}, forward passes: {facts['passes']}"),
        *([("peak", f"{output.flops(peak)}/s of all devices (denominator of MFU)")] if peak else []),
        ("memory", f"peak of the {facts['peak_memory_of']}"),
        ("first call", _first_call(facts["compiled_from_cache"])),
    ]
    result = {"rows": rows, "facts": facts}
    if other is not None:
        more_pairs, figures = _against(found, [label for label in found["seconds"] if label not in other["labels"]])
        pairs, result = pairs + more_pairs, result | figures
    output.facts(pairs)
    return result


def decode(found: Measurement, batch_size: int, prompt_length: int, length: int) -> dict[str, Any]:
    """Prints the samplers at one target length; returns the figures."""
    facts, other = found["facts"], found.get("torch")
    seconds = found["seconds"]
    baseline = next(iter(seconds))
    rows = []
    for label, times in seconds.items():
        arm = facts["arms"].get(label, {"forward_passes": length, "compile_seconds": None})
        row = {"label": label, "forward_passes": arm["forward_passes"], "first_call_seconds": arm["compile_seconds"]}
        row |= _speed(times, batch_size * length)
        row["seconds_per_completion"] = row["seconds"]["median"] / batch_size
        row["ratio"] = _ratio(times, seconds[baseline])
        rows.append(row)
    output.heading(f"{length} tokens after a prompt of {prompt_length}, {batch_size} at a time")
    output.table(
        ["sampler", "passes", "ms/completion", "quartiles", "tokens/s", "speed", "quartiles"],
        [
            [
                row["label"],
                row["forward_passes"],
                *_shown(row, 1e3 / batch_size),
                f"{row['ratio']['median']:.2f}x",
                _range(row["ratio"], 1.0, 2),
            ]
            for row in rows
        ],
        right=range(1, 7),
        fold=[],
    )
    pairs = [
        ("parameters", output.count(next(iter(facts["arms"].values()))["parameters"])),
        ("speed", f"relative to {baseline}, as the median of per-round ratios"),
        (
            "memory",
            f"{output.size(facts['peak_memory'])}, peak of the {facts['peak_memory_of']} over all samplers",
        ),
    ]
    facts["arms"] = {
        label: {name: value for name, value in arm.items() if name != "window"} for label, arm in facts["arms"].items()
    }
    result = {"length": length, "prompt_length": prompt_length, "batch_size": batch_size, "rows": rows, "facts": facts}
    if other is not None:
        more_pairs, figures = _against(found, [])
        pairs, result = pairs + more_pairs, result | figures
    output.facts(pairs)
    return result


def data(found: Measurement) -> dict[str, Any]:
    """Prints the speed of an input pipeline; returns the figures."""
    facts, (times,) = found["facts"], found["seconds"].values()
    row = {"label": "pipeline", **_speed(times, facts["tokens_per_batch"])}
    row["examples_per_second"] = facts["examples_per_batch"] / row["seconds"]["median"]
    output.heading(f"input pipeline: {facts['batch_size']} rows x {facts['row_length']}")
    output.table(
        ["ms/batch", "quartiles", "tokens/s", "examples/s", "filled", "first batch"],
        [
            [
                *_shown(row),
                _number(row["examples_per_second"]),
                f"{facts['filled']:.0%}",
                f"{facts['first_batch_seconds']:.2f} s",
            ]
        ],
        right=range(6),
        fold=[],
    )
    output.facts([("tokens", "those that are not padding; filled: their share of the slots")])
    return {"rows": [row], "facts": facts}


def startup(seconds: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Prints how long processes took and returns the figures."""
    rows: list[dict[str, Any]] = [
        {"label": label, "seconds": _spread(times), "rounds": list(times)} for label, times in seconds.items()
    ]
    output.heading("startup: seconds from process start to exit")
    cells = []
    for row in rows:
        one = row["seconds"]
        cells.append([row["label"], *(f"{one[name]:.2f}" for name in ("median", "least", "most"))])
    output.table(["process", "median", "least", "most"], cells, right=range(1, 4), fold=[])
    return {"rows": rows}


def load_average() -> list[float]:
    """Returns the load averages over 1, 5 and 15 minutes, or an empty list if the system does not report them."""
    return [round(value, 2) for value in os.getloadavg()] if hasattr(os, "getloadavg") else []


def show_conditions(result: Measurement) -> None:
    """Prints the load average, and a warning if other processes were running."""
    before, after = (result["load_average"][name] for name in ("before", "after"))
    if not before:
        return
    cores = os.cpu_count() or 1
    output.facts([("load average", f"{before[0]:.2f} before, {after[0]:.2f} after, {cores} cores")])
    if before[0] > cores / 4:
        output.say("  Other processes were running: compare ratios only, not times with those of other runs.")


def _against(found: Measurement, ours: Sequence[str]) -> tuple[list[tuple[str, Any]], dict[str, Any]]:
    """Returns lines about PyTorch, the speed ratios of the labels `ours` and the checks; and the same as figures."""
    other, checks = found["torch"], found["checks"]
    theirs = other["labels"][0]
    ratios = {label: _ratio(found["seconds"][label], found["seconds"][theirs]) for label in ours}
    pairs: list[tuple[str, Any]] = []
    for label, one in ratios.items():
        pairs.append((label, f"{one['median']:.2f}x as fast as {theirs} (median of per-round ratios)"))
        pairs.append(("", f"quartiles {_range(one, 1.0, 2)}, range {one['least']:.2f}..{one['most']:.2f}"))
    pairs += [
        (theirs, f"{other['model']}, transformers {other['transformers']}, torch {other['torch']}"),
        ("", f"{other['attention']} attention, {other['threads']} threads"),
        ("same network", f"{checks['parameters']:,} parameters on both sides, identical weights"),
    ]
    if "first_loss_difference" in checks:
        pairs.append(("same loss", f"first losses differ by {checks['first_loss_difference']:.1e}"))
    for label, share in checks.get("same_tokens", {}).items():
        if share is not None:
            pairs.append(("same tokens", f"{share:.0%} of the tokens of {label}"))
    torch_facts = {name: value for name, value in other.items() if name != "window"}
    return pairs, {"torch": torch_facts, "ratios": ratios, "checks": checks}


def _speed(seconds: Sequence[float], tokens: float) -> dict[str, Any]:
    if not seconds:
        return {"seconds": None, "tokens_per_second": None, "rounds": []}
    found = _spread(seconds)
    return {"seconds": found, "tokens_per_second": tokens / found["median"], "rounds": list(seconds)}


def _spread(seconds: Sequence[float]) -> dict[str, Any]:
    import dataclasses

    from diffusion_lm.evaluation.timing import spread

    return dataclasses.asdict(spread(seconds))


def _ratio(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    import dataclasses

    from diffusion_lm.evaluation.timing import speed_ratio

    return dataclasses.asdict(speed_ratio(ours, theirs))


def _shown(row: Mapping[str, Any], factor: float = 1e3) -> list[str]:
    """Returns the table cells for the median (seconds times `factor`), its quartiles and tokens per second."""
    found = row["seconds"]
    if found is None:
        return ["", "", ""]
    digits = 1 if found["median"] * factor >= 1 else 3
    return [f"{found['median'] * factor:.{digits}f}", _range(found, factor, digits), _number(row["tokens_per_second"])]


def _range(found: Mapping[str, float], factor: float, digits: int) -> str:
    return f"{found['low'] * factor:.{digits}f}..{found['high'] * factor:.{digits}f}"


def _number(value: float) -> str:
    return f"{value:,.0f}"


def _first_call(from_cache: int) -> str:
    if from_cache:
        return f"compilation and one step; {from_cache} program(s) read from the compilation cache"
    return "compilation and one step; no program read from the compilation cache"
