"""Finds the collectives of a compiled program: kind, group size, how often each runs, and bytes sent per device."""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterator

from diffusion_lm.planning.hlo import Computation, Instruction, Module

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_EXPLICIT = re.compile(r"replica_groups=\{(\{[\d,{}\s]*\})\}")
_IOTA = re.compile(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}")
_CHANNEL = re.compile(r"channel_id=(\d+)")
_PAIRS = re.compile(r"source_target_pairs=\{(\{[\d,{}\s]*\})\}")


@dataclasses.dataclass(frozen=True)
class Collective:
    """All collectives of a program with the same kind and group size.

    Attributes:
      kind: one of `KINDS`.
      group: number of devices in each group.
      local: maximum number of devices of a group on one slice; the others are on other slices.
      count: number of executions per device in one run of the program.
      bytes: bytes that one device sends in one run, summed over all executions.
    """

    kind: str
    group: int
    local: int
    count: int
    bytes: float

    @property
    def crosses_slices(self) -> bool:
        """Whether a group spans several slices."""
        return self.local < self.group

    @property
    def bytes_across(self) -> float:
        """Bytes that one device sends to other slices.

        Except for an all-to-all, the devices of a slice divide this traffic among themselves (hierarchical algorithm).
        """
        if not self.crosses_slices:
            return 0.0
        if self.kind == "all-to-all":
            return self.bytes * (self.group - self.local) / (self.group - 1)
        return self.bytes / self.local


def collectives(module: Module, devices_per_slice: int) -> tuple[Collective, ...]:
    """Returns the collectives of a program, sorted by bytes sent, largest first.

    Bytes assume ring algorithms. For N bytes over n devices, an all-gather or reduce-scatter sends N (n - 1) / n per
    device, an all-reduce twice as much, an all-to-all N (n - 1) / n, and a permutation N.
    """
    found: dict[tuple[str, int, int], list[float]] = {}
    for instruction, kind, size, times in _all(module):
        groups = _groups(instruction)
        # A group of one device communicates nothing.
        group = max(len(one) for one in groups)
        if group < 2:
            continue
        local = min(max(Counter(device // devices_per_slice for device in one).values()) for one in groups)
        entry = found.setdefault((kind, group, local), [0, 0.0])
        entry[0] += times
        entry[1] += times * _sent(kind, size, group)
    rows = [Collective(*key, count=int(count), bytes=size) for key, (count, size) in found.items()]
    return tuple(sorted(rows, key=lambda row: -row.bytes))


def _all(module: Module) -> Iterator[tuple[Instruction, str, float, int]]:
    """Yields each collective once: the instruction, its kind, the bytes of its result, and how often it runs.

    To overlap a collective with arithmetic, the TPU compiler splits it over several fusions. Each of them contains the
    collective with the same channel id, so only the first occurrence of a channel is counted.
    """
    channels = set()
    for instruction, kind, size, times in _occurrences(module):
        channel = _CHANNEL.search(instruction.text)
        if channel is None or channel[1] not in channels:
            yield instruction, kind, size, times
        if channel is not None:
            channels.add(channel[1])


def _occurrences(module: Module) -> Iterator[tuple[Instruction, str, float, int]]:
    for instruction, _, times in module.executed():
        kind = instruction.opcode.removesuffix("-start")
        if kind in KINDS:
            yield instruction, kind, instruction.size, times
        elif instruction.opcode == "fusion":
            for inner, computation in module.inside(instruction):
                kind, size = inner.opcode.removesuffix("-start"), inner.size
                if kind == "all-reduce" and (part := _scattered_part(inner, computation)) is not None:
                    kind, size = "reduce-scatter", part
                if kind in KINDS:
                    yield inner, kind, size, times


def _scattered_part(reduction: Instruction, computation: Computation) -> float | None:
    """Returns the bytes of an all-reduce result that its fusion slices out, or None if the whole result is used.

    The TPU compiler expresses a reduce-scatter as an all-reduce followed by a dynamic slice in one fusion.
    """
    users = [one for one in computation.values() if reduction.name in one.operands]
    if not users or any(user.opcode != "dynamic-slice" for user in users):
        return None
    return sum(array.bytes for user in users for array in user.arrays)


def _groups(instruction: Instruction) -> list[list[int]]:
    """Returns the device ids of each group, from any of HLO's notations: iota, mesh axes, explicit lists or pairs."""
    iota = _IOTA.search(instruction.text)
    if iota:
        rows, columns = int(iota[1]), int(iota[2])
        shape = [int(n) for n in iota[3].split(",")]
        order = [int(n) for n in iota[4].split(",")] if iota[4] else list(range(len(shape)))
        flat = _transposed(shape, order)
        return [flat[row * columns : (row + 1) * columns] for row in range(rows)]
    named = _MESH.search(instruction.text)
    if named:
        axes = [part.split("=") for part in named[1].split(",")]
        shape, over = [int(size) for _, size in axes], [name.strip() for name in named[2].split(",")]
        inner = [index for index, (name, _) in enumerate(axes) if name.strip() in over]
        outer = [index for index in range(len(axes)) if index not in inner]
        flat, columns = _transposed(shape, outer + inner), math.prod(shape[index] for index in inner)
        return [flat[start : start + columns] for start in range(0, len(flat), columns)]
    explicit = _EXPLICIT.search(instruction.text) or _PAIRS.search(instruction.text)
    if not explicit:
        return [[0]]
    return [[int(n) for n in part.split(",") if n.strip()] for part in re.findall(r"\{([\d,\s]*)\}", explicit[1])]


def _transposed(shape: list[int], order: list[int]) -> list[int]:
    """`arange(prod(shape)).reshape(shape).transpose(order)`, flat."""
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    flat = [0]
    for axis in order:
        flat = [base + index * strides[axis] for base in flat for index in range(shape[axis])]
    return flat


def _sent(kind: str, size: float, group: int) -> float:
    """Returns the bytes that one device sends in a collective whose result has `size` bytes."""
    others = group - 1
    if kind == "collective-permute":
        return size
    if kind == "reduce-scatter":
        return size * others  # the result is one of `group` parts
    return size * others / group * (2 if kind == "all-reduce" else 1)
