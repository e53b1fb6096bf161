"""Interleaved timing of several functions, and the spread of speed ratios.

On a shared machine, functions that are timed one after the other run under different load. Here every round times each
function once (A, B, A, B), so that changes of load affect all of them.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence

from diffusion_lm.core.errors import require


@dataclasses.dataclass(frozen=True)
class Spread:
    """Summary statistics of measurements.

    Attributes:
      median: the median.
      low, high: the first and third quartile, with linear interpolation.
      least, most: minimum and maximum.
      count: number of measurements.
    """

    median: float
    low: float
    high: float
    least: float
    most: float
    count: int


def spread(values: Sequence[float]) -> Spread:
    """Returns the summary statistics of measurements.

    Raises:
      ConfigError: `values` is empty.
    """
    require(len(values) > 0, "nothing was measured", where="--rounds", fix="Use at least 1.")
    low, high = values[0], values[0]
    if len(values) > 1:
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(statistics.median(values), low, high, min(values), max(values), len(values))


def speed_ratio(ours: Sequence[float], theirs: Sequence[float]) -> Spread:
    """Returns how many times faster `ours` is than `theirs`, from seconds measured in the same rounds.

    Each round gives one ratio `theirs / ours`, in which the machine's load of that round cancels. It would not cancel
    in a ratio of two medians.
    """
    return spread([other / one for one, other in zip(ours, theirs, strict=True)])


def timed(call: Callable[[], object]) -> float:
    """Returns the seconds that `call` takes; `call` must wait for asynchronous work that it starts."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def alternate(calls: Sequence[Callable[[int], float]], rounds: int) -> list[list[float]]:
    """Returns, for each call, its seconds per round; a round makes every call once, in the given order.

    Args:
      calls: functions that take the number of the round and return seconds.
      rounds: number of rounds.
    """
    seconds: list[list[float]] = [[] for _ in calls]
    for number in range(rounds):
        for times, call in zip(seconds, calls, strict=True):
            times.append(call(number))
    return seconds
