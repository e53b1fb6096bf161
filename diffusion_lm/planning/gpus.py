"""Parses names of NVIDIA GPUs and CPU devices, and describes GPUs to XLA so that it can compile without one.

A "slice" of GPUs is one machine with eight GPUs connected by NVLink, so `h100-16` is two machines. Figures: NVIDIA's
data sheets of the SXM modules (dense bfloat16, without sparsity); memory as the driver reports it; the network is one
400 Gbit/s adapter per GPU (200 for A100), as in DGX systems. The device properties that XLA needs are those that the
CUDA programming guide lists per compute capability.
"""

import dataclasses
import os
import re

from diffusion_lm.core.errors import ConfigError
from diffusion_lm.planning.accelerators import GIB, Accelerator, ChipGeneration

PER_MACHINE = 8
_LINKS = ("NVLink", "network")


def _gpu(name: str, memory: float, flops: float, bandwidth: float, nvlink: float, network: float) -> ChipGeneration:
    return ChipGeneration(
        name, int(memory * GIB), flops, bandwidth, nvlink, network, 1, False, 1, (PER_MACHINE,), PER_MACHINE,
        platform="gpu", links=_LINKS, usable=0.75,
    )  # fmt: skip


GPUS = {
    generation.name: generation
    for generation in (
        _gpu("a100", 79.2, 312e12, 2039e9, 300e9, 25e9),
        _gpu("h100", 79.1, 989e12, 3352e9, 450e9, 50e9),
        _gpu("h200", 139.8, 989e12, 4800e9, 450e9, 50e9),
        _gpu("b200", 178.3, 2250e12, 8000e9, 900e9, 50e9),
    )
}
"""`usable` is the fraction of GPU memory that JAX preallocates by default (XLA_PYTHON_CLIENT_MEM_FRACTION)."""

NAMES = (*GPUS, "cpu")


@dataclasses.dataclass(frozen=True)
class _Chip:
    """Device properties that XLA needs.

    Attributes:
      capability: CUDA compute capability.
      cores: number of multiprocessors.
      units: arithmetic units per multiprocessor.
      shared: shared memory per multiprocessor, bytes.
      cache: L2 cache, bytes.
      clock: clock rate, GHz.
    """

    capability: tuple[int, int]
    cores: int
    units: int
    shared: int
    cache: int
    clock: float


_CHIPS = {
    "a100": _Chip((8, 0), 108, 64, 167936, 40 * 2**20, 1.41),
    "h100": _Chip((9, 0), 132, 128, 233472, 50 * 2**20, 1.98),
    "h200": _Chip((9, 0), 132, 128, 233472, 50 * 2**20, 1.98),
    "b200": _Chip((10, 0), 148, 128, 233472, 126 * 2**20, 1.965),
}
_NAME = re.compile(r"(?:(?P<machines>\d+)x)?(?P<kind>[a-z]+\d*)-(?P<size>\d+)$")


def is_other(name: str) -> bool:
    """Returns whether a topology name is that of GPUs or CPU devices, e.g. `h100-8`, `2xh100-8`, `cpu-4`."""
    found = _NAME.fullmatch(name.strip().lower())
    return found is not None and found["kind"] in NAMES


def parse(name: str, machines: int = 1) -> Accelerator:
    """Parses a name for which `is_other` is true. More than eight GPUs must be whole machines.

    Raises:
      ConfigError: the number of devices is not possible.
    """
    found = _NAME.fullmatch(name.strip().lower())
    assert found is not None
    size, machines = int(found["size"]), int(found["machines"] or 1) * machines
    if found["kind"] == "cpu":
        if size < 1 or machines != 1:
            raise ConfigError(
                f"{name!r} is not a valid number of CPU devices of one machine",
                where="--topology",
                fix="Use e.g. cpu-8.",
            )
        return Accelerator(_cpu(size), (size,))
    whole, rest = divmod(size, PER_MACHINE)
    if size < 1 or (size > PER_MACHINE and rest):
        raise ConfigError(
            f"{name!r} is not a valid number of GPUs: a machine has {PER_MACHINE}",
            where="--topology",
            fix=f"Use at most {PER_MACHINE}, or a multiple of {PER_MACHINE}.",
        )
    kind, per_machine = GPUS[found["kind"]], min(size, PER_MACHINE)
    return Accelerator(dataclasses.replace(kind, usable=_fraction(kind)), (per_machine,), machines * max(whole, 1))


def target_config(accelerator: Accelerator) -> str:
    """Returns the `GpuTargetConfigProto` (text format) with which XLA compiles for a GPU that is not present."""
    generation = accelerator.generation
    chip = _CHIPS[generation.name]
    major, minor = chip.capability
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: 2048
  shared_memory_per_block: 49152  shared_memory_per_block_optin: {chip.shared - 1024}
  shared_memory_per_core: {chip.shared}
  core_count: {chip.cores}  fpus_per_core: {chip.units}  clock_rate_ghz: {chip.clock}
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  memory_bandwidth: {int(generation.hbm_bandwidth)}  l2_cache_size: {chip.cache}  device_memory_size: {generation.hbm}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 12 }}
runtime_version {{ major: 13 minor: 0 }}
device_description_str: "NVIDIA {generation.name.upper()}"
"""


def _fraction(kind: ChipGeneration) -> float:
    given = os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION")
    try:
        return float(given or kind.usable)
    except ValueError as error:
        fix = "Use a number between 0 and 1, or unset the variable."
        raise ConfigError(f"{given!r} is not a number", where="XLA_PYTHON_CLIENT_MEM_FRACTION", fix=fix) from error


def _cpu(devices: int) -> ChipGeneration:
    """Returns CPU devices that share the memory of this machine. Peak rates are unknown, so they are zero."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return ChipGeneration(
        "cpu", memory // devices, 0.0, 0.0, 0.0, 0.0, 1, False, 1, (devices,), devices,
        platform="cpu", links=("memory", "memory"), usable=1.0,
    )  # fmt: skip
