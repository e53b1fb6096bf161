"""Parses the text of a compiled program (HLO): its instructions, how often each runs, and the bytes that each moves.

XLA's own cost analysis counts the body of a loop once. Networks here scan over their layers, so this module multiplies
each instruction by the trip counts of the enclosing loops, which it reads from their conditions. A loop whose trip
count depends on run-time values (decoding) counts once, or N times if it is in a named scope `at_most_N`
(`nn/chunks.py`).
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

from diffusion_lm.nn.chunks import MAX_TRIPS_SCOPE

_ITEM_BYTES = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "s16": 2, "u16": 2, "bf16": 2,
    "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8,
}  # fmt: skip
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\](\{[^}]*\})?")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\) -> .* \{$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.-]+) = (.*)$")
_OPERAND = re.compile(r"%([\w.-]+)")
_TRIPS = re.compile(r'"?known_trip_count"?:\s*\{"?n"?:\s*"?(\d+)"?\}')
_MAX_TRIPS = re.compile(rf'op_name="[^"]*{re.escape(MAX_TRIPS_SCOPE)}(\d+)/while"')
_CONDITION = re.compile(r"condition=%?([\w.-]+)")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|called_computations|branch_computations|true_computation|false_computation)"
    r"=(?:\{([^}]*)\}|(%?[\w.-]+))"
)
# Instructions that move no data of their own.
_FREE = {
    "parameter", "tuple", "get-tuple-element", "bitcast", "constant", "while", "call", "conditional", "after-all",
    "partition-id", "replica-id", "iota", "opt-barrier", "async-start", "async-update",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of an instruction's type.

    Attributes:
      dtype: element type in HLO notation, e.g. `bf16`.
      shape: dimensions.
      in_hbm: whether it is in main memory (HBM) and not in on-chip memory.
    """

    dtype: str
    shape: tuple[int, ...]
    in_hbm: bool

    @property
    def bytes(self) -> float:
        """Size in bytes without tile padding."""
        return _ITEM_BYTES.get(self.dtype, 0) * math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a program.

    Attributes:
      name: its name, without the percent sign.
      opcode: e.g. `fusion`, `all-gather-start`.
      arrays: the arrays of its type, tuples flattened.
      operands: names of its operands.
      text: the rest of the line: attributes, called computations, metadata; for a parameter its number, for a constant
        its value.
      is_root: whether it is the result of its computation.
    """

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    text: str
    is_root: bool

    @property
    def called(self) -> tuple[str, ...]:
        """Names of the computations that it calls, except the condition of a loop."""
        found = ((several or one) for several, one in _CALLED.findall(self.text))
        return tuple(name.strip().lstrip("%") for names in found for name in names.split(","))

    @property
    def results(self) -> tuple[Array, ...]:
        """The arrays that it produces.

        The type of an asynchronous start also lists its operands and semaphores. For `copy-start` the destination comes
        first. Other starts list the operands first and then the results; `all-reduce-start` lists the results only.
        """
        count = len(self.operands)
        if self.opcode == "copy-start":
            return self.arrays[:1]
        repeats = self.opcode.endswith("-start") and len(self.arrays) >= 2 * count
        return self.arrays[count : 2 * count] if repeats else self.arrays

    @property
    def scope(self) -> str:
        """The JAX named scope (`op_name`), e.g. `jit(step)/transpose(jvp(layers))/attention/dot_general`."""
        found = re.search(r'op_name="([^"]*)"', self.text)
        return found[1] if found else ""

    @property
    def size(self) -> float:
        """Bytes of the arrays that it produces, in any memory."""
        return sum(array.bytes for array in self.results)


Computation = Mapping[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Module:
    """A compiled program.

    Attributes:
      computations: for each computation its instructions by name, in program order.
      entry: name of the entry computation.
    """

    computations: Mapping[str, Computation]
    entry: str

    def executed(self) -> Iterator[tuple[Instruction, Computation, int]]:
        """Yields each executed instruction outside fusions, with its computation and the number of executions."""
        yield from self._executed(self.entry, 1)

    def _executed(self, name: str, times: int) -> Iterator[tuple[Instruction, Computation, int]]:
        computation = self.computations.get(name, {})
        for instruction in computation.values():
            yield instruction, computation, times
            if instruction.opcode in ("while", "call", "conditional", "async-start"):
                called = instruction.called
                if instruction.opcode == "conditional":  # only one branch runs; assume the most expensive one
                    called = (max(called, key=self._bytes),)
                for one in called:
                    yield from self._executed(one, times * self.trips(instruction))

    def trips(self, instruction: Instruction) -> int:
        """Returns the trip count of a loop; 1 for other instructions and for loops with an unknown trip count.

        The count is known if XLA states it, if the named scope gives a maximum, or if the condition compares a counter
        with a constant.
        """
        if instruction.opcode != "while":
            return 1
        if stated := _TRIPS.search(instruction.text) or _MAX_TRIPS.search(instruction.text):
            return int(stated[1])
        named = _CONDITION.search(instruction.text)
        condition = self.computations.get(named[1], {}) if named else {}
        root = next((one for one in condition.values() if one.is_root), None)
        if root is None or root.opcode != "compare" or "direction=LT" not in root.text:
            return 1
        limit = condition.get(root.operands[1])
        return int(limit.text) if limit is not None and limit.opcode == "constant" and limit.text.isdigit() else 1

    def inside(self, instruction: Instruction) -> Iterator[tuple[Instruction, Computation]]:
        """Yields the instructions inside a fusion, including nested fusions, with their computations."""
        for name in instruction.called:
            computation = self.computations.get(name, {})
            for inner in computation.values():
                yield inner, computation
                if inner.opcode == "fusion":
                    yield from self.inside(inner)

    def hbm_bytes(self) -> float:
        """Returns the bytes that one run of the program reads from and writes to main memory, on one device.

        Each instruction reads its operands and writes its results once. For an array that is only sliced or updated in
        place, only the slice counts. Arrays that the compiler keeps in on-chip memory do not count. This is an
        estimate, because it is not known what stays in registers between two instructions.
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
    """Parses the `as_text()` of a compiled executable."""
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
    """Splits `TYPE OPCODE(...)...` into the type, which may be a tuple in parentheses, and the rest."""
    if text.startswith("("):
        end = _closing(text[1:]) + 2
        return text[:end], text[end:].lstrip()
    kind, _, rest = text.partition(" ")
    return kind, rest


def _closing(text: str) -> int:
    """Returns the index of the parenthesis that closes one opened before `text`."""
    depth = 1
    for index, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return index
    return len(text)


def _arrays(text: str) -> tuple[Array, ...]:
    # A layout with a memory space, S(n), is on-chip memory; main memory has none.
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
    """Returns the bytes read of a parameter that is only sliced, updated in place or passed through; else None."""
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
    """Returns the bytes that a fusion writes.

    An array that is updated in place counts with the size of the update, one that is passed through counts as zero.
    """
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
    """Returns the bytes written of one result of a fusion; infinity if the result is not an in-place update."""
    while result.opcode == "bitcast" and result.operands[0] in computation:
        result = computation[result.operands[0]]
    if result.opcode == "parameter" or _continues_elsewhere(result):
        return 0.0
    # The update is the second operand of a dynamic-update-slice and the third operand of a scatter.
    update = {"dynamic-update-slice": 1, "scatter": 2}.get(result.opcode, 0)
    if not update or result.operands[update] not in computation:
        return math.inf
    return computation[result.operands[update]].size


def _continues_elsewhere(instruction: Instruction) -> bool:
    """Returns whether this is one step of an overlapped collective, whose traffic is counted at its start."""
    return "async_collective_fusion_config" in instruction.text
