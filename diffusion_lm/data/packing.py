"""Assigns examples to rows (packing)."""

import dataclasses

import numpy as np

OPEN_ROWS = 64
"""Number of rows that are filled at the same time: enough to waste few slots, few enough to keep planning cheap."""


@dataclasses.dataclass(frozen=True, eq=False)
class PackingPlan:
    """An assignment of every example to exactly one row.

    Attributes:
      members: i64[examples], example numbers, grouped by row.
      starts: i64[rows + 1]; row r contains `members[starts[r]:starts[r + 1]]`.
    """

    members: np.ndarray
    starts: np.ndarray

    @classmethod
    def single(cls, count: int) -> "PackingPlan":
        """Returns the plan without packing: one example per row."""
        return cls(np.arange(count), np.arange(count + 1))

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.starts) - 1

    def row(self, index: int) -> np.ndarray:
        """Returns the examples of one row."""
        return self.members[self.starts[index] : self.starts[index + 1]]


def pack(costs: np.ndarray, capacity: np.ndarray, order: np.ndarray) -> PackingPlan:
    """Returns a plan made by greedy first fit over `OPEN_ROWS` open rows.

    Args:
      costs: i64[examples, streams], slots per example in each stream (main stream; encoder if there is one).
      capacity: i64[streams], slots per row; no cost may exceed it.
      order: i64[examples], the order in which examples are placed. A shuffled order mixes the rows.

    The plan is the same in every epoch, so that a position determines its row without replaying earlier epochs. Epochs
    shuffle the rows. Examples packed together do not attend to each other.
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
            # No open row has enough room: replace the fullest one with a new row.
            slot = int(free.min(axis=1).argmin())
            free[slot] = capacity
            row_of_slot[slot] = rows
            rows += 1
        free[slot] -= cost
        row_of_example[example] = row_of_slot[slot]
    members = np.argsort(row_of_example, kind="stable")
    starts = np.searchsorted(row_of_example[members], np.arange(rows + 1))
    return PackingPlan(members, starts)
