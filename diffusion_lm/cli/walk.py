"""Finds objects of one class anywhere in a tree of configured dataclasses."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import TypeVar

T = TypeVar("T")


def find_all(root: object, kind: type[T]) -> list[T]:
    """Returns every distinct object of class `kind` in the tree under `root`, in order of appearance."""
    found: list[T] = []
    for node in _walk(root):
        if isinstance(node, kind) and node not in found:
            found.append(node)
    return found


def _walk(value: object) -> Iterator[object]:
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
