"""Finds the output length from which a diffusion decoder is faster than an autoregressive one."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from diffusion_lm.recipes.formatting import is_number
from diffusion_lm.recipes.records import Speed, SpeedRow


class SpeedSeries(NamedTuple):
    """Decoding time of one decoder at several output lengths, sorted by length.

    Attributes:
      label: name of the series in the report.
      kind: "ar" or "diffusion".
      passes: forward passes at the shortest length.
      lengths, seconds: tokens generated and median seconds per call.
      spreads: (max - min) / median over the repeats.
    """

    label: str
    kind: str
    passes: int
    lengths: tuple[float, ...]
    seconds: tuple[float, ...]
    spreads: tuple[float, ...]


class Crossover(NamedTuple):
    """The crossover of a diffusion decoder with the AR decoder.

    Attributes:
      label: label of the diffusion series.
      length, seconds: the crossing point, interpolated between measured lengths on log axes; None if the series do not
        cross.
      ratio: AR time divided by diffusion time at length `at`.
      at: the longest length that was measured for both.
    """

    label: str
    length: float | None
    seconds: float | None
    ratio: float
    at: float


def speed_series(speed: Speed | None) -> list[SpeedSeries]:
    """Groups the rows of a speed measurement by label: AR first, then diffusion by number of forward passes."""
    groups: dict[str, list[SpeedRow]] = {}
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
    """Returns the crossover of each diffusion series with the first AR series; empty if either kind is missing."""
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
                # Both curves are taken as straight lines on log-log axes, so the log ratio is linear in log length.
                fraction = gap / (gap - next_gap)
                crossing = (
                    _log_interpolate(left, right, fraction),
                    _log_interpolate(ar_at[left], ar_at[right], fraction),
                )
        found.append(Crossover(other.label, crossing[0], crossing[1], math.exp(gaps[-1]), common[-1]))
    return found


def _log_interpolate(left: float, right: float, fraction: float) -> float:
    return math.exp(math.log(left) * (1 - fraction) + math.log(right) * fraction)


def speed_sentences(speed: Speed | None) -> list[str]:
    """Returns a sentence that compares every diffusion decoder with AR at the longest length measured."""
    series = speed_series(speed)
    found = crossovers(series)
    if not found or speed is None:
        return []
    longest = max(one.at for one in found)
    parts = []
    for one in found:
        ratio = f"{one.ratio:.1f}x faster" if one.ratio >= 1 else f"{1 / one.ratio:.1f}x slower"
        at = "" if one.at == longest else f" at {one.at:.0f} tokens"
        crossing = f" (faster above about {one.length:.0f} tokens)" if one.length else ""
        parts.append(f"{one.label} is {ratio}{at}{crossing}")
    device = f" Measured on {speed['device']}." if speed.get("device") else ""
    return [f"At {longest:.0f} tokens, compared with {series[0].label}: {'; '.join(parts)}.{device}"]
