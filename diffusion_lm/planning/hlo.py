"""Reads the text of a compiled program: its instructions, how often each runs, and the bytes that each one moves.

XLA's own cost analysis counts the body of a loop once. A network scans over its layers, so here every instruction is
multiplied by the trip counts of the loops around it, read from their conditions. A loop that ends when its values say
so (decoding) has no such count: its body counts once, but in a scope `at_most_N` N times.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

_ITEM_BYTES = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "s16": 2, "u16": 2, "bf16": 2,
    "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8,
}  # fmt: skip
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\](\{[^}]*\})?")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\) -> .* \{$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.-]+) = (.*)$")
_OPERAND = re.compile(r"%([\w.-]+)")
_TRIPS = re.compile(r'"?known_trip_count"?:\s*\{"?n"?:\s*"?(\d+)"?\}')
_AT_MOST = re.compile(r'op_name="[^"]*at_most_(\d+)/while"')
_CONDITION = re.compile(r"condition=%?([\w.-]+)")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|called_computations|branch_computations|true_computation|false_computation)"
    r"=(?:\{([^}]*)\}|(%?[\w.-]+))"
)
_FREE = {
    "parameter", "tuple", "get-tuple-element", "bitcast", "constant", "while", "call", "conditional", "after-all",
    "partition-id", "replica-id", "iota", "opt-barrier", "async-start", "async-update",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Array:
    """One array in a type: element type, dimensions, and whether it lies in the chip's main memory (HBM)."""

    dtype: str
    shape: tuple[int, ...]
    in_hbm: bool

    @property
    def bytes(self) -> float:
        """Its size, tile padding not counted."""
        return _ITEM_BYTES.get(self.dtype, 0) * math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a program.

    Attributes:
      name: without the percent sign.
      opcode: e.g. `fusion`, `all-gather-start`.
      arrays: what it returns, tuples flattened.
      operands: names of what it reads.
      text: the line after the operands: attributes, called computations, metadata. Of a parameter its number, of a
        constant its value.
      is_root: it is its computation's result.
    """

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    text: str
    is_root: bool

    @property
    def called(self) -> tuple[str, ...]:
        """Names of the computations that it runs; a loop's condition is left out."""
        found = ((several or one) for several, one in _CALLED.findall(self.text))
        return tuple(name.strip().lstrip("%") for names in found for name in names.split(","))

    @property
    def results(self) -> tuple[Array, ...]:
        """What it returns anew: the type of an asynchronous start names operands and semaphores too.

        A copy's destination comes first; of other starts the operands do. Those of an all-reduce are not named.
        """
        count = len(self.operands)
        if self.opcode == "copy-start":
            return self.arrays[:1]
        repeats = self.opcode.endswith("-start") and len(self.arrays) >= 2 * count
        return self.arrays[count : 2 * count] if repeats else self.arrays

    @property
    def scope(self) -> str:
        """The named scope in the source, e.g. `jit(step)/transpose(jvp(layers))/attention/dot_general`."""
        found = re.search(r'op_name="([^"]*)"', self.text)
        return found[1] if found else ""

    @property
    def size(self) -> float:
        """Bytes of what it returns anew, wherever they lie."""
        return sum(array.bytes for array in self.results)


Computation = Mapping[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Module:
    """A compiled program.

    Attributes:
      computations: name -> its instructions by name, in order.
      entry: name of the computation that runs.
    """

    computations: Mapping[str, Computation]
    entry: str

    def executed(self) -> Iterator[tuple[Instruction, Computation, int]]:
        """Yields what runs as an instruction of its own, with its computation and how many times it runs."""
        yield from self._executed(self.entry, 1)

    def _executed(self, name: str, times: int) -> Iterator[tuple[Instruction, Computation, int]]:
        computation = self.computations.get(name, {})
        for instruction in computation.values():
            yield instruction, computation, times
            if instruction.opcode in ("while", "call", "conditional", "async-start"):
                called = instruction.called
                if instruction.opcode == "conditional":  # one of them runs: the dearest
                    called = (max(called, key=self._bytes),)
                for one in called:
                    yield from self._executed(one, times * self.trips(instruction))

    def trips(self, instruction: Instruction) -> int:
        """How often a loop's body runs if its condition compares a counter with a constant or its scope says so; else
        1."""
        if instruction.opcode != "while":
            return 1
        if stated := _TRIPS.search(instruction.text) or _AT_MOST.search(instruction.text):
            return int(stated[1])
        named = _CONDITION.search(instruction.text)
        condition = self.computations.get(named[1], {}) if named else {}
        root = next((one for one in condition.values() if one.is_root), None)
        if root is None or root.opcode != "compare" or "direction=LT" not in root.text:
            return 1
        limit = condition.get(root.operands[1])
        return int(limit.text) if limit is not None and limit.opcode == "constant" and limit.text.isdigit() else 1

    def inside(self, instruction: Instruction) -> Iterator[tuple[Instruction, Computation]]:
        """Yields the instructions that a fusion holds, nested ones too."""
        for name in instruction.called:
            computation = self.computations.get(name, {})
            for inner in computation.values():
                yield inner, computation
                if inner.opcode == "fusion":
                    yield from self.inside(inner)

    def hbm_bytes(self) -> float:
        """Bytes that one run reads from and writes to main memory, on one device.

        What an instruction reads and writes, once each; of an array that is only sliced or updated in place, the slice.
        Arrays that the compiler keeps on the chip are free. An estimate: what stays in registers between two
        instructions is not known.
        """
        return self._bytes(self.entry)

    def _bytes(self, name: str) -> float:
        return sum(
            times * self._moved(instruction, computation) for instruction, computation, times in self._executed(name, 1)
        )

    def _moved(self, instruction: Instruction, computation: Computation) -> float:
        if (
            instruction.opcode in _FREE
            or instruction.opcode.endswith("-done")
            or 'custom_call_target="AllocateBuffer"' in instruction.text
        ):
            return 0.0
        operands = [computation.get(name) for name in instruction.operands]
        read = [_in_hbm(one) if one is not None else 0.0 for one in operands]
        opcode = instruction.opcode.removesuffix("-start")
        if opcode in ("slice", "dynamic-slice"):
            return (instruction.size if read[0] else 0.0) + _in_hbm(instruction)
        if opcode == "dynamic-update-slice":
            update = operands[1].size if operands[1] is not None else 0.0
            return read[1] + (update if _in_hbm(instruction) else 0.0)
        written = _in_hbm(instruction)
        if instruction.opcode == "fusion" and instruction.called:
            inner = self.computations.get(instruction.called[0], {})
            parameters = [one for one in inner.values() if one.opcode == "parameter"]
            for index, parameter in enumerate(sorted(parameters, key=_parameter_number)):
                part = _sliced_part(parameter, inner)
                if part is not None and index < len(read):
                    read[index] = min(read[index], part)
            written = min(written, _written(instruction, inner))
        return sum(read) + written


def parse(text: str) -> Module:
    """Returns the module of an executable's `as_text()`."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        head = _HEAD.match(line)
        if head:
            current = computations.setdefault(head[2], {})
            entry = head[2] if head[1] else entry
            continue
        found = _LINE.match(line) if current is not None else None
        if found:
            instruction = _instruction(found[2], found[3], bool(found[1]))
            assert current is not None
            current[instruction.name] = instruction
    return Module(computations, entry)


def _instruction(name: str, rest: str, is_root: bool) -> Instruction:
    kind, rest = _split_type(rest)
    opcode, _, rest = rest.partition("(")
    end = _closing(rest)
    operands = tuple(_OPERAND.findall(rest[:end]))
    text = rest[end + 1 :] if opcode not in ("parameter", "constant") else rest[:end]
    return Instruction(name, opcode.strip(), _arrays(kind), operands, text, is_root)


def _split_type(text: str) -> tuple[str, str]:
    if text.startswith("("):
        end = _closing(text[1:]) + 2
        return text[:end], text[end:].lstrip()
    kind, _, rest = text.partition(" ")
    return kind, rest


def _closing(text: str) -> int:
    """Index of the parenthesis that closes one opened before `text`."""
    depth = 1
    for index, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return index
    return len(text)


def _arrays(text: str) -> tuple[Array, ...]:
    return tuple(
        Array(dtype, tuple(int(n) for n in dims.split(",") if n), "S(" not in (layout or ""))
        for dtype, dims, layout in _ARRAY.findall(text)
        if dtype in _ITEM_BYTES
    )


def _in_hbm(instruction: Instruction) -> float:
    return sum(array.bytes for array in instruction.results if array.in_hbm)


def _parameter_number(parameter: Instruction) -> int:
    found = re.match(r"(\d+)", parameter.text)
    return int(found[1]) if found else 0


def _sliced_part(parameter: Instruction, computation: Computation) -> float | None:
    """Bytes of a fusion's parameter that are read if it is only sliced, updated in place or handed on; else None."""
    users = [one for one in computation.values() if parameter.name in one.operands]
    total = 0.0
    for user in users:
        if user.opcode == "bitcast":
            part = _sliced_part(user, computation)
            if part is None:
                return None
            total += part
        elif user.opcode in ("slice", "dynamic-slice", "gather") and user.operands[0] == parameter.name:
            total += user.size
        elif not (
            (user.opcode in ("dynamic-update-slice", "scatter") and user.operands[0] == parameter.name)
            or (user.opcode == "tuple" and user.is_root)
            or _continues_elsewhere(user)
        ):
            return None
    return total


def _written(fusion: Instruction, computation: Computation) -> float:
    """Bytes that a fusion writes: of an array that is updated in place only the update, of one handed on nothing."""
    root = next((one for one in computation.values() if one.is_root), None)
    if root is None:
        return math.inf
    parts = [computation.get(name) for name in root.operands] if root.opcode == "tuple" else [root]
    if len(parts) != len(fusion.results):
        return math.inf
    return sum(
        array.bytes if part is None else min(array.bytes, _updated_part(part, computation))
        for part, array in zip(parts, fusion.results, strict=True)
        if array.in_hbm
    )


def _updated_part(result: Instruction, computation: Computation) -> float:
    while result.opcode == "bitcast" and result.operands[0] in computation:
        result = computation[result.operands[0]]
    if result.opcode == "parameter" or _continues_elsewhere(result):
        return 0.0
    # The update of a slice is its second operand, that of a scatter its third.
    update = {"dynamic-update-slice": 1, "scatter": 2}.get(result.opcode, 0)
    if not update or result.operands[update] not in computation:
        return math.inf
    return computation[result.operands[update]].size


def _continues_elsewhere(instruction: Instruction) -> bool:
    """Whether this is one step of a collective that overlaps with arithmetic: its start counts what it moves."""
    return "async_collective_fusion_config" in instruction.text
