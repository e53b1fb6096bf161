"""Times of several things that are measured in turns, and how sure their ratio is.

On a machine that does other work too, one thing measured after the other is compared under different conditions. Here
every round measures all of them once (A, B, A, B), so that what slows the machine down slows both sides of a pair.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence

from diffusion_lm.core.errors import require


@dataclasses.dataclass(frozen=True)
class Spread:
    """A set of measurements.

    Attributes:
      median: the middle one.
      low, high: the quartiles, interpolated between neighbours; half of the measurements lie between them.
      least, most: the smallest and the largest.
      count: number of measurements.
    """

    median: float
    low: float
    high: float
    least: float
    most: float
    count: int


def spread(values: Sequence[float]) -> Spread:
    """Returns the median and the spread of at least one measurement.

    Raises:
      ConfigError: there is none.
    """
    require(len(values) > 0, "nothing was measured", where="--rounds", fix="Use 1 or more.")
    low, high = values[0], values[0]
    if len(values) > 1:
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(statistics.median(values), low, high, min(values), max(values), len(values))


def speed_ratio(ours: Sequence[float], theirs: Sequence[float]) -> Spread:
    """Returns how many times as fast ours is, from seconds that were measured in the same rounds.

    Each round gives one ratio `theirs / ours`: of two medians the rounds would be lost, and with them what the machine
    did to both sides at the time.
    """
    return spread([other / one for one, other in zip(ours, theirs, strict=True)])


def timed(call: Callable[[], object]) -> float:
    """Returns the seconds that `call` takes; it must wait for what it starts."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def alternate(calls: Sequence[Callable[[int], float]], rounds: int) -> list[list[float]]:
    """Returns the seconds that each call reports of each round; a round makes every call once, in the given order.

    Args:
      calls: functions from the number of the round to the seconds that it took.
      rounds: how often all are called.
    """
    seconds: list[list[float]] = [[] for _ in calls]
    for number in range(rounds):
        for times, call in zip(seconds, calls, strict=True):
            times.append(call(number))
    return seconds
