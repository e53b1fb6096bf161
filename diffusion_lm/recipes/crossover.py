"""Time against output length: where a diffusion decoder overtakes an autoregressive one."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from diffusion_lm.recipes.formatting import is_number


class SpeedSeries(NamedTuple):
    """One decoder's time against output length, sorted by length.

    Attributes:
      label, kind: how it is called; "ar" or "diffusion".
      passes: forward passes at its shortest length.
      lengths, seconds: tokens generated and median seconds of the call.
      spreads: (max - min) / median over the repeats.
    """

    label: str
    kind: str
    passes: int
    lengths: tuple[float, ...]
    seconds: tuple[float, ...]
    spreads: tuple[float, ...]


class Crossover(NamedTuple):
    """Where a diffusion decoder overtakes the AR one.

    Attributes:
      label: the diffusion series.
      length, seconds: the crossing, interpolated on log axes between measured lengths; None where there is none.
      ratio: AR time over diffusion time at the longest length both were measured at.
      at: that length.
    """

    label: str
    length: float | None
    seconds: float | None
    ratio: float
    at: float


def speed_series(speed: Mapping[str, Any] | None) -> list[SpeedSeries]:
    """Groups the rows of a speed measurement by label: AR first, then diffusion by number of steps."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in (speed or {}).get("rows", ()):
        if is_number(row.get("seconds")) and row["seconds"] > 0 and row.get("length", 0) > 0:
            groups.setdefault(row["label"], []).append(row)
    series = []
    for label, rows in groups.items():
        rows = sorted(rows, key=lambda row: row["length"])
        spreads = tuple(float(row["spread"]) if is_number(row.get("spread")) else 0.0 for row in rows)
        lengths, seconds = (tuple(float(row[key]) for row in rows) for key in ("length", "seconds"))
        passes = int(rows[0].get("forward_passes") or 0)
        series.append(SpeedSeries(label, rows[0]["family"], passes, lengths, seconds, spreads))
    return sorted(series, key=lambda s: (s.kind != "ar", s.passes))


def crossovers(series: Sequence[SpeedSeries]) -> list[Crossover]:
    """Where each diffusion series crosses the first AR series; empty where either kind is missing."""
    ar = next((s for s in series if s.kind == "ar"), None)
    found = []
    for other in series:
        if ar is None or other.kind == "ar":
            continue
        ar_at, other_at = (dict(zip(s.lengths, s.seconds, strict=True)) for s in (ar, other))
        common = sorted(set(ar_at) & set(other_at))
        if not common:
            continue
        gaps = [math.log(ar_at[n] / other_at[n]) for n in common]  # positive where diffusion is faster
        crossing: tuple[float, float] | tuple[None, None] = (None, None)
        for left, right, gap, next_gap in zip(common, common[1:], gaps, gaps[1:], strict=False):
            if gap < 0 <= next_gap:
                share = gap / (gap - next_gap)
                crossing = (_between(left, right, share), _between(ar_at[left], ar_at[right], share))
        found.append(Crossover(other.label, crossing[0], crossing[1], math.exp(gaps[-1]), common[-1]))
    return found


def _between(left: float, right: float, share: float) -> float:
    return math.exp(math.log(left) * (1 - share) + math.log(right) * share)


def speed_sentences(speed: Mapping[str, Any] | None) -> list[str]:
    """One sentence: every diffusion decoder against AR at the longest length measured, and where it overtakes it."""
    series = speed_series(speed)
    found = crossovers(series)
    if not found or speed is None:
        return []
    longest = max(one.at for one in found)
    parts = []
    for one in found:
        ratio = f"{one.ratio:.1f}x faster" if one.ratio >= 1 else f"{1 / one.ratio:.1f}x slower"
        at = "" if one.at == longest else f" at {one.at:.0f} tokens"
        ahead = f" (faster from about {one.length:.0f} tokens on)" if one.length else ""
        parts.append(f"{one.label} is {ratio}{at}{ahead}")
    device = f" Measured on {speed['device']}." if speed.get("device") else ""
    return [f"At {longest:.0f} tokens, against {series[0].label}: {'; '.join(parts)}.{device}"]
