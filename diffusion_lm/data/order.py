"""Maps a global position to a source and a row by arithmetic, so that any position is found in constant time.

The mapping has no state and does not depend on hosts or batch sizes.
"""

import dataclasses
import functools

import numpy as np

from diffusion_lm.data import counted

PERIOD = 10_000
"""Number of positions after which a weighted mixture repeats its pattern of sources; weights are exact to 1/PERIOD."""


@dataclasses.dataclass(frozen=True)
class Order:
    """The order of a mixture.

    Attributes:
      sizes: number of rows of each source.
      weights: weight of each source in the mixture. None = the sources are concatenated, and every row occurs once per
        epoch.
      seed: seed of the shuffles.
      shuffle: False = stored order.
    """

    sizes: tuple[int, ...]
    weights: tuple[float, ...] | None
    seed: int
    shuffle: bool

    def places(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns (source, row, epoch), i64[n] each, for global positions i64[n]."""
        positions = np.asarray(positions, np.int64)
        if self.weights is None:
            total = sum(self.sizes)
            epochs = positions // total
            rows = self._shuffled(positions % total, total, 0, epochs)
            starts = np.cumsum((0, *self.sizes))
            sources = np.searchsorted(starts, rows, side="right") - 1
            return sources, rows - starts[sources], epochs
        pattern, ranks, counts = _pattern(self.weights)
        slots = positions % PERIOD
        sources = pattern[slots]
        # How many rows of its source precede each position.
        taken = positions // PERIOD * counts[sources] + ranks[slots]
        sizes = np.asarray(self.sizes, np.int64)[sources]
        epochs, rows = taken // sizes, taken % sizes
        for source in np.unique(sources):
            here = sources == source
            rows[here] = self._shuffled(rows[here], self.sizes[source], int(source), epochs[here])
        return sources, rows, epochs

    def _shuffled(self, rows: np.ndarray, size: int, source: int, epochs: np.ndarray) -> np.ndarray:
        if not self.shuffle:
            return rows
        unique, inverse = np.unique(epochs, return_inverse=True)
        keys = np.concatenate([counted.key("data_order", self.seed, source, int(epoch)) for epoch in unique])
        return counted.permute(rows, size, keys[inverse])


@functools.lru_cache(maxsize=16)
def _pattern(weights: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the source of each slot of a period, its rank among the slots of that source, and slots per source.

    Smooth weighted round robin: after any number of slots, each source is within about one slot of its share.
    """
    shares = np.asarray(weights, np.float64) / sum(weights)
    credit = np.zeros_like(shares)
    pattern = np.empty(PERIOD, np.int64)
    for slot in range(PERIOD):
        credit += shares
        pattern[slot] = chosen = int(credit.argmax())
        credit[chosen] -= 1.0
    ranks = np.empty(PERIOD, np.int64)
    counts = np.bincount(pattern, minlength=len(weights))
    for source in range(len(weights)):
        ranks[pattern == source] = np.arange(counts[source])
    return pattern, ranks, counts
