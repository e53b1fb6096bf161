"""Which examples share a row."""

import dataclasses

import numpy as np

OPEN_ROWS = 64
"""Rows that are filled at once; enough that hardly a slot is lost, few enough that planning stays cheap."""


@dataclasses.dataclass(frozen=True, eq=False)
class PackingPlan:
    """Rows of examples, every example in exactly one row.

    Attributes:
      members: i64[examples], example numbers, those of one row side by side.
      starts: i64[rows + 1], row r holds `members[starts[r]:starts[r + 1]]`.
    """

    members: np.ndarray
    starts: np.ndarray

    @classmethod
    def single(cls, count: int) -> "PackingPlan":
        """Returns the plan without packing: one example a row."""
        return cls(np.arange(count), np.arange(count + 1))

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.starts) - 1

    def row(self, index: int) -> np.ndarray:
        """Returns the examples of one row."""
        return self.members[self.starts[index] : self.starts[index + 1]]


def pack(costs: np.ndarray, capacity: np.ndarray, order: np.ndarray) -> PackingPlan:
    """Returns a greedy first-fit plan.

    Args:
      costs: i64[examples, streams], slots that each example takes in each stream (decoder; encoder where there is one).
      capacity: i64[streams], slots of a row; no cost may exceed it.
      order: i64[examples], the order in which examples are placed. A shuffled one keeps rows mixed.

    The plan does not change between epochs, so that a position finds its row without replaying earlier epochs: epochs
    reshuffle the rows. Packed neighbours do not see each other, they only share a place in the batch.
    """
    assert (costs <= capacity).all(), "an example is larger than a row"
    free = np.zeros((OPEN_ROWS, len(capacity)), np.int64)
    row_of_slot = np.full(OPEN_ROWS, -1)
    row_of_example = np.empty(len(order), np.int64)
    rows = 0
    for example in order:
        cost = costs[example]
        slot = int((free >= cost).all(axis=1).argmax())
        if row_of_slot[slot] < 0 or not (free[slot] >= cost).all():
            slot = int(free.min(axis=1).argmin())
            free[slot] = capacity
            row_of_slot[slot] = rows
            rows += 1
        free[slot] -= cost
        row_of_example[example] = row_of_slot[slot]
    members = np.argsort(row_of_example, kind="stable")
    starts = np.searchsorted(row_of_example[members], np.arange(rows + 1))
    return PackingPlan(members, starts)
