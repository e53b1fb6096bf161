"""How fast a step can be at most: the time of its arithmetic, of its memory traffic and of its communication.

The largest of the three governs (Williams et al. 2009, with a roof for each network). A step that overlaps them
perfectly takes that long; none is faster. XLA's kernels reach 50 to 80 % of the arithmetic roof on large matrices.
"""

import dataclasses
from collections.abc import Sequence

from diffusion_lm.planning.accelerators import Accelerator
from diffusion_lm.planning.collectives import Collective


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds of one run of a program, by resource.

    Attributes:
      compute: matrix products at the peak rate.
      hbm: main memory.
      ici: the links between the chips of a slice; NVLink within a machine of GPUs.
      dcn: the network between slices or machines.
    """

    compute: float
    hbm: float
    ici: float
    dcn: float

    @property
    def seconds(self) -> float:
        """The largest: no run is faster."""
        return max(self.compute, self.hbm, self.ici, self.dcn)

    @property
    def bound(self) -> str:
        """The resource that governs: `compute`, `hbm`, `ici` or `dcn`."""
        return max(("compute", "hbm", "ici", "dcn"), key=lambda name: getattr(self, name))


def roofline(accelerator: Accelerator, flops: float, hbm_bytes: float, collectives: Sequence[Collective]) -> Roofline:
    """Returns the roofline of a program.

    Args:
      accelerator: where it runs.
      flops: FLOPs of one run over all devices, recomputation included.
      hbm_bytes: main-memory traffic of one device.
      collectives: of one device.
    """
    generation, per_chip = accelerator.generation, accelerator.generation.devices_per_chip
    return Roofline(
        compute=flops / accelerator.chips / generation.flops,
        hbm=hbm_bytes * per_chip / generation.hbm_bandwidth,
        ici=sum(one.bytes * per_chip / _ici_bandwidth(accelerator, one.local) for one in collectives if one.local > 1),
        dcn=sum(one.bytes_across for one in collectives) * per_chip / generation.dcn_bandwidth,
    )


def _ici_bandwidth(accelerator: Accelerator, group: int) -> float:
    """Bytes/s that a chip sends to a group: its links along as many dimensions of the torus as the group must span."""
    dimensions, reached = 0, accelerator.generation.devices_per_chip
    for size in sorted(accelerator.shape, reverse=True):
        if reached >= group and dimensions:
            break
        reached *= size
        dimensions += 1
    return accelerator.generation.ici_bandwidth * dimensions / accelerator.generation.dimensions
