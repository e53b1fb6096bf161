"""Analyses one compiled program: memory per device, communication, an upper bound on speed, and whether it fits."""

import dataclasses
import re
from typing import Any

from diffusion_lm.planning import collectives as communication
from diffusion_lm.planning import hlo, programs
from diffusion_lm.planning.accelerators import Accelerator
from diffusion_lm.planning.collectives import Collective
from diffusion_lm.planning.roofline import Roofline, roofline

_REQUIRED = re.compile(r"\(?([\d.]+)([GMK])\)? exceeds")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes per device, as assigned by the compiler.

    Attributes:
      arguments: parameters, optimizer state and batch.
      outputs: results that do not reuse the buffer of a donated argument.
      donated: results that reuse the buffer of a donated argument.
      temporaries: activations, gradients, buffers of collectives.
      code: the program itself.
      available: memory of the device that programs may use.
    """

    arguments: int
    outputs: int
    donated: int
    temporaries: int
    code: int
    available: int

    @property
    def peak(self) -> int:
        """Peak memory of the program, bytes."""
        return self.arguments + self.outputs + self.temporaries + self.code

    @property
    def spare(self) -> int:
        """Free memory at the peak, bytes; negative if the program does not fit."""
        return self.available - self.peak


@dataclasses.dataclass(frozen=True)
class ProgramPlan:
    """The analysis of one program on one accelerator.

    Attributes:
      name: `train`, `bound` or `decode`.
      fits: whether the program fits in the memory of the device.
      memory: memory by category; None if compilation failed.
      refusal: error message of the compiler, or empty.
      needed: bytes that the program needs per device; if compilation failed, its temporaries only.
      collectives: communication of one device in one run.
      largest: the largest arrays that are written to main memory, as `(scope, type, bytes)`.
      roof: lower bound on the time of one run; None if compilation failed, and on CPUs.
      model_flops: matmul FLOPs of the model in one run over all devices, without recomputation.
      tokens: tokens of the main stream in one run, padding included.
      compile_seconds: seconds to trace, lower and compile on this machine.
    """

    name: str
    fits: bool
    memory: Memory | None
    refusal: str
    needed: int
    collectives: tuple[Collective, ...]
    largest: tuple[tuple[str, str, int], ...]
    roof: Roofline | None
    model_flops: float
    tokens: int
    compile_seconds: float

    def mfu(self, accelerator: Accelerator) -> float | None:
        """Returns an upper bound on the model FLOPs utilisation, from the roofline; None without a roofline."""
        if self.roof is None or not self.model_flops:
            return None
        return self.model_flops / (self.roof.seconds * accelerator.chips * accelerator.generation.flops)


def examine(
    compiled: programs.Compiled,
    accelerator: Accelerator,
    *,
    model_flops: float,
    recomputed_flops: float = 0.0,
    tokens: int,
) -> ProgramPlan:
    """Analyses a compiled program.

    Args:
      compiled: the program.
      accelerator: the accelerator it was compiled for.
      model_flops: matmul FLOPs of the model in one run over all devices; 0 if unknown.
      recomputed_flops: FLOPs that rematerialisation adds in one run over all devices.
      tokens: tokens of the main stream in one run.
    """
    if compiled.executable is None:
        return ProgramPlan(
            name=compiled.name,
            fits=False,
            memory=None,
            refusal=compiled.refusal,
            needed=_refused_bytes(compiled.refusal),
            collectives=(),
            largest=(),
            roof=None,
            model_flops=model_flops,
            tokens=tokens,
            compile_seconds=compiled.seconds,
        )
    analysis: Any = compiled.executable.memory_analysis()  # None on backends that are not planned for
    memory = Memory(
        arguments=analysis.argument_size_in_bytes,
        # Donated buffers are counted as arguments and as outputs; count them once.
        outputs=analysis.output_size_in_bytes - analysis.alias_size_in_bytes,
        donated=analysis.alias_size_in_bytes,
        temporaries=analysis.temp_size_in_bytes,
        code=analysis.generated_code_size_in_bytes,
        available=accelerator.usable_hbm,
    )
    text = compiled.executable.as_text()
    assert text is not None, "the compiler returns the text of the program"
    module = hlo.parse(text)
    per_slice = accelerator.devices // accelerator.slices
    traffic = communication.collectives(module, per_slice)
    return ProgramPlan(
        name=compiled.name,
        fits=memory.spare >= 0,
        memory=memory,
        refusal="",
        needed=memory.peak,
        collectives=traffic,
        largest=largest_arrays(module),
        roof=roofline(accelerator, model_flops + recomputed_flops, module.hbm_bytes(), traffic)
        if accelerator.generation.flops
        else None,
        model_flops=model_flops,
        tokens=tokens,
        compile_seconds=compiled.seconds,
    )


def _refused_bytes(refusal: str) -> int:
    """Returns the bytes that an out-of-memory message of the compiler names, or 0."""
    found = _REQUIRED.search(refusal)
    return int(float(found[1]) * _UNITS[found[2]]) if found else 0


def largest_arrays(module: hlo.Module, count: int = 5) -> tuple[tuple[str, str, int], ...]:
    """Returns `(scope, type, bytes)` of the `count` largest array types that a program writes to main memory."""
    found: dict[str, tuple[str, str, int]] = {}
    for instruction, _, _ in module.executed():
        if instruction.opcode in ("parameter", "while", "tuple", "get-tuple-element", "bitcast", "call", "conditional"):
            continue
        for array in instruction.arrays:
            if array.in_hbm:
                # One entry per type, so that repeated arrays do not fill the list.
                kind = f"{array.dtype}[{','.join(map(str, array.shape))}]"
                found.setdefault(kind, (instruction.scope, kind, int(array.bytes)))
    return tuple(sorted(found.values(), key=lambda row: -row[2])[:count])
