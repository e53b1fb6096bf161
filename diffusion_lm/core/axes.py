"""Logical axis names of arrays. `parallel/rules.py` maps them to mesh axes."""

from collections.abc import Mapping
from typing import Any

Axes = tuple[str | None, ...]
"""The logical name of each dimension of an array; None for a dimension that is never split."""

AxesTree = Mapping[str, Any]
"""A nested dict like `core.types.Params`, with `Axes` in place of the arrays."""
