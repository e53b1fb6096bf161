"""Formats numbers for tables and charts."""

import math
from typing import TypeGuard

MISSING = "\N{EN DASH}"


def is_number(value: object) -> TypeGuard[int | float]:
    """Returns whether `value` is a finite int or float; results hold None or NaN where nothing was measured."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def count(number: object) -> str:
    """Returns the short form of a count: 950, 12.3K, 4.1M, 1.68B."""
    if not is_number(number):
        return MISSING
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if abs(number) >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}" if number != int(number) else str(int(number))
