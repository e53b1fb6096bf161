"""Examples of generated tasks, and their assignment to splits by a hash of the content that must not leak."""

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
      targets: the text to generate.
      key: determines the split; examples with equal keys are in the same split.
      reference: reference for the metrics, as JSON; empty if it is `targets`.
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
    """Returns the split of `key`; validation and test each get the fraction `held_out` of all keys."""
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
      seed: seed of the draws; example number i depends only on (seed, i).
      attempts: maximum number of draws.

    Returns:
      The examples by split. All inputs are distinct, and no key occurs in two splits.
    """
    found: dict[str, list[Example]] = {split: [] for split in sizes}
    used: set[str] = set()
    for number in range(attempts):
        example = make(random.Random(f"{seed}/{number}"))
        split = split_of(example.key)
        if example.inputs in used or len(found[split]) >= sizes[split]:
            continue
        used.add(example.inputs)
        found[split].append(example)
        if all(len(found[name]) == size for name, size in sizes.items()):
            return {name: tuple(examples) for name, examples in found.items()}
    counts = {name: len(examples) for name, examples in found.items()}
    raise AssertionError(f"'{seed}' has too few distinct examples: {counts}")
