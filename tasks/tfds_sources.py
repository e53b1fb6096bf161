"""Rows of TFDS data sets in Python, for few-shot prompts and subsets, which need several examples at a time."""

from collections.abc import Iterator
from typing import Any

import tensorflow_datasets as tfds


def rows(name: str, split: str) -> Iterator[dict[str, Any]]:
    """Yields the examples of a split in stored order, with strings as bytes; downloads the data set on first use."""
    yield from tfds.as_numpy(tfds.load(name, split=split, shuffle_files=False))
