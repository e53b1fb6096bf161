"""Finding parts of configured objects, wherever in the tree of dataclasses they hang."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

T = TypeVar("T")


def parts(root: Any, kind: type[T]) -> list[T]:
    """Returns every distinct part of class `kind` below `root`, in order of appearance."""
    found: list[T] = []
    for part in _walk(root):
        if isinstance(part, kind) and part not in found:
            found.append(part)
    return found


def _walk(value: Any) -> Iterator[Any]:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield value
        for field in dataclasses.fields(value):
            yield from _walk(getattr(value, field.name))
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _walk(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _walk(item)
