"""Parses the names of TPU slices, and lists memory, peak FLOP/s and bandwidths of each TPU generation.

A name is a generation and a size (`v5e-256`), or a generation and a shape in chips (`v5e:16x16`). Cloud counts
chips for v5e and v6e, and TensorCores (two per chip) for v3, v4, v5p and TPU7x: a v4-32 has 16 chips, a v5p-128 has 64.
JAX sees one device per chip on v4 and v5p (both cores act as one) and on v5e and v6e (one core), and two devices per
chip on v3 and TPU7x.

Figures: Google Cloud's system-architecture page of each version; ICI of v3 and v4 from arXiv 2304.01433, table 4.
"""

import dataclasses
import math
import re
from collections.abc import Sequence

from diffusion_lm.core.errors import ConfigError, near_names

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class ChipGeneration:
    """One kind of chip.

    Attributes:
      name: short name, e.g. `v5e`; also libtpu's name.
      hbm: memory per chip, bytes.
      flops: dense bfloat16 peak per chip, FLOP/s.
      hbm_bandwidth: memory bandwidth per chip, bytes/s.
      ici_bandwidth: bytes/s that a chip can send over all of its ICI links together; it can receive as much.
      dcn_bandwidth: bytes/s per chip to other slices.
      dimensions: dimensions of the torus, 2 or 3.
      counts_cores: whether sizes in names count TensorCores, two per chip.
      devices_per_chip: JAX devices per chip.
      host: chips of one host, per dimension of the torus.
      pod: chips of the largest slice.
      single_host: chips of the largest slice that Cloud's TPU API provides as one machine.
      cloud: name in Cloud's accelerator types if it differs from `name`, e.g. `v5litepod`.
      platform: JAX's platform name: `tpu`, `gpu` or `cpu`.
      links: names of the network within a slice and of the network between slices.
      usable: fraction of the device memory that programs may use. The TPU runtime reserves 1/64 (a v5e has 15.75 of 16
        GiB).
    """

    name: str
    hbm: int
    flops: float
    hbm_bandwidth: float
    ici_bandwidth: float
    dcn_bandwidth: float
    dimensions: int
    counts_cores: bool
    devices_per_chip: int
    host: tuple[int, ...]
    pod: int
    single_host: int = 4
    cloud: str = ""
    platform: str = "tpu"
    links: tuple[str, str] = ("ICI", "DCN")
    usable: float = 63 / 64


# Where the vendor gives no DCN bandwidth per chip, it is the network of a host divided by its chips: 3.1e9 bytes/s is
# 100 Gbit/s for four chips.
GENERATIONS = {
    generation.name: generation
    for generation in (
        ChipGeneration("v3", 32 * GIB, 123e12, 900e9, 280e9, 3.1e9, 2, True, 2, (2, 2), 1024),
        ChipGeneration("v4", 32 * GIB, 275e12, 1228e9, 300e9, 6.25e9, 3, True, 1, (2, 2, 1), 4096),
        ChipGeneration("v5e", 16 * GIB, 197e12, 819e9, 200e9, 3.1e9, 2, False, 1, (2, 2), 256, 8, "v5litepod"),
        ChipGeneration("v5p", 95 * GIB, 459e12, 2765e9, 600e9, 6.25e9, 3, True, 1, (2, 2, 1), 8960),
        ChipGeneration("v6e", 32 * GIB, 918e12, 1638e9, 400e9, 12.5e9, 2, False, 1, (2, 2), 256, 8),
        ChipGeneration("tpu7x", 192 * GIB, 2307e12, 7380e9, 600e9, 12.5e9, 3, True, 2, (2, 2, 1), 9216),
    )
}
_OTHER_NAMES = {"v5litepod": "v5e", "v5lite": "v5e", "v7x": "tpu7x", "trillium": "v6e", "ironwood": "tpu7x"}
_NAME = re.compile(r"(?:(?P<slices>\d+)x)?(?P<generation>[a-z]+\d*[a-z]*|v\d+[a-z]*)[-:](?P<size>\d+(?:x\d+)*)$")


@dataclasses.dataclass(frozen=True)
class Accelerator:
    """One or several equal slices of one generation, connected by the data-center network.

    Attributes:
      generation: the kind of chip.
      shape: chips along each dimension of one slice's torus.
      slices: number of slices.
    """

    generation: ChipGeneration
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def chips(self) -> int:
        """Number of chips in all slices."""
        return math.prod(self.shape) * self.slices

    @property
    def devices(self) -> int:
        """Number of JAX devices in all slices."""
        return self.chips * self.generation.devices_per_chip

    @property
    def hosts(self) -> int:
        """Number of machines per slice with `ChipGeneration.host` chips each, as in GKE's node pools."""
        return math.ceil(math.prod(self.shape) / math.prod(self.generation.host))

    @property
    def chips_per_host(self) -> int:
        """Chips per machine; the smallest slices use only part of a host."""
        return math.prod(self.shape) // self.hosts

    @property
    def vms(self) -> int:
        """Number of machines in all slices as Cloud's TPU API creates them; eight v5e or v6e chips are one machine."""
        return self.slices * (1 if math.prod(self.shape) <= self.generation.single_host else self.hosts)

    @property
    def cloud_name(self) -> str:
        """Cloud's name of one slice of this size, e.g. `v5litepod-16`. `parse` gives its shape."""
        size = math.prod(self.shape) * (2 if self.generation.counts_cores else 1)
        return f"{self.generation.cloud or self.generation.name}-{size}"

    @property
    def hbm_per_device(self) -> int:
        """Memory per device, bytes."""
        return self.generation.hbm // self.generation.devices_per_chip

    @property
    def usable_hbm(self) -> int:
        """Memory per device that programs may use, bytes."""
        return int(self.hbm_per_device * self.generation.usable)

    @property
    def topology(self) -> str:
        """libtpu's name of one slice, e.g. `v5e:4x4`."""
        return f"{self.generation.name}:{'x'.join(map(str, self.shape))}"

    def __str__(self) -> str:
        if self.generation.platform != "tpu":
            machines = f"{self.slices} machines of " if self.slices > 1 else ""
            return f"{machines}{math.prod(self.shape)} {self.generation.name.upper()} ({self.devices} devices)"
        slices = f"{self.slices} slices of " if self.slices > 1 else ""
        return f"{slices}{self.topology} ({self.chips} chips, {self.devices} devices)"


def parse(name: str, slices: int = 1, others: Sequence[str] = ()) -> Accelerator:
    """Parses a name such as `v5e-16`, `v5litepod-16`, `v4-32`, `v5p:4x4x4` or `2xv5e-256` (two slices).

    Args:
      name: the name, as Cloud users write it.
      slices: multiplies the number of slices.
      others: names of non-TPU devices that the caller also accepts, for the error message.

    Raises:
      ConfigError: the generation is unknown, or it has no slice of this size or shape.
    """
    match = _NAME.fullmatch(name.strip().lower().replace("_", "-"))
    known = match and _OTHER_NAMES.get(match["generation"], match["generation"])
    if match is None or known not in GENERATIONS:
        names = (*GENERATIONS, *others)
        guess = near_names(str(known), names) if known else ""
        raise ConfigError(
            f"unknown {'accelerator' if others else 'TPU slice'} {name!r}{guess}",
            where="--topology",
            fix=f"Write a kind and a size, e.g. v5e-16, v4-32, 2xv5p-128 or v6e:4x4; kinds are {', '.join(names)}.",
        )
    generation = GENERATIONS[known]
    number = int(match["slices"] or 1) * slices
    numbers = tuple(int(part) for part in match["size"].split("x"))
    if ":" in name or len(numbers) > 1:
        return Accelerator(generation, _checked_shape(generation, numbers, name), number)
    chips, odd = divmod(numbers[0], 2 if generation.counts_cores else 1)
    if odd or chips < 1:
        raise ConfigError(
            f"{name!r}: sizes of {generation.name} count TensorCores, two per chip, and must be even",
            where="--topology",
            fix=f"Write {generation.name}-{2 * max(1, round(numbers[0] / 2))}.",
        )
    return Accelerator(generation, _shape(generation, chips, name), number)


def _checked_shape(generation: ChipGeneration, shape: tuple[int, ...], name: str) -> tuple[int, ...]:
    if len(shape) != generation.dimensions or math.prod(shape) > generation.pod or min(shape) < 1:
        raise ConfigError(
            f"{name!r} is not a valid shape of a {generation.name} slice",
            where="--topology",
            fix=f"Write {generation.dimensions} dimensions whose product is at most {generation.pod} chips.",
        )
    return shape


def _shape(generation: ChipGeneration, chips: int, name: str) -> tuple[int, ...]:
    """Returns the most cubic power-of-two shape with `chips` chips, which is how Cloud arranges slices."""
    exponent = chips.bit_length() - 1
    if 2**exponent != chips or chips > generation.pod:
        raise ConfigError(
            f"{name!r}: {chips} chips do not determine the shape of a {generation.name} slice",
            where="--topology",
            fix=f"Use a power of two up to {generation.pod} chips, or write the shape, e.g. {generation.name}:"
            + "x".join(map(str, generation.host)),
        )
    parts = [exponent // generation.dimensions] * generation.dimensions
    # Double the last dimensions first: 8 chips in 2D are 2x4, 32 chips in 3D are 2x4x4.
    for index in range(exponent % generation.dimensions):
        parts[-1 - index] += 1
    if chips == math.prod(generation.host):
        return generation.host
    return tuple(2**part for part in parts)
