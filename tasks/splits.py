"""Examples of the embedded tasks and how they are dealt to splits: by a hash of what must not leak."""

import dataclasses
import hashlib
import json
import random
from collections.abc import Callable, Mapping
from typing import Any

SPLITS = ("train", "validation", "test")


@dataclasses.dataclass(frozen=True)
class Example:
    """One example.

    Attributes:
      inputs: the prompt.
      targets: what is to be generated.
      key: what decides the split; two examples with equal keys are always in the same split.
      reference: what metrics compare with, as JSON; empty where it is `targets` itself.
    """

    inputs: str
    targets: str
    key: str
    reference: str = ""

    @property
    def reference_value(self) -> Any:
        """The parsed reference."""
        return json.loads(self.reference) if self.reference else self.targets


def split_of(key: str, held_out: float = 0.08) -> str:
    """Returns the split of `key`: `held_out` of all keys are for validation and as many for test."""
    point = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2.0**64
    if point < held_out:
        return "test"
    return "validation" if point < 2 * held_out else "train"


def deal(
    make: Callable[[random.Random], Example], sizes: Mapping[str, int], seed: str, attempts: int = 400_000
) -> dict[str, tuple[Example, ...]]:
    """Draws distinct examples until every split is full.

    Args:
      make: draws one example.
      sizes: number of examples by split.
      seed: root of the draws; example number i depends on (seed, i) only.
      attempts: draws after which too small a space of examples is an error.

    Returns:
      The examples by split. No two of them share their inputs, and no two splits share a key.
    """
    found: dict[str, list[Example]] = {split: [] for split in sizes}
    seen: set[str] = set()
    for number in range(attempts):
        example = make(random.Random(f"{seed}/{number}"))
        split = split_of(example.key)
        if example.inputs in seen or len(found[split]) >= sizes[split]:
            continue
        seen.add(example.inputs)
        found[split].append(example)
        if all(len(found[name]) == size for name, size in sizes.items()):
            return {name: tuple(examples) for name, examples in found.items()}
    counts = {name: len(examples) for name, examples in found.items()}
    raise AssertionError(f"'{seed}' has too few distinct examples: {counts}")
