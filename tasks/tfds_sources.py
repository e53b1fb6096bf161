"""TFDS data sets as rows for readers in Python: few-shot prompts and subsets need more than one example at a time."""

from collections.abc import Iterator
from typing import Any

import tensorflow_datasets as tfds


def rows(name: str, split: str) -> Iterator[dict[str, Any]]:
    """Yields the examples of a split in stored order, texts as bytes; downloads the set when it is first used."""
    yield from tfds.as_numpy(tfds.load(name, split=split, shuffle_files=False))
