"""Roofline model: a lower bound on the time of a program from its arithmetic, memory traffic and communication.

The bound is the largest of these times (Williams et al. 2009, with one roof per network), reached if all of them
overlap perfectly. XLA's kernels reach 50 to 80 % of the arithmetic roof on large matrices.
"""

import dataclasses
from collections.abc import Sequence

from diffusion_lm.planning.accelerators import Accelerator
from diffusion_lm.planning.collectives import Collective


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Minimum seconds of one run of a program, by resource.

    Attributes:
      compute: matrix products at the peak rate.
      hbm: main memory traffic.
      ici: links between the chips of a slice; NVLink within a machine of GPUs.
      dcn: network between slices or machines.
    """

    compute: float
    hbm: float
    ici: float
    dcn: float

    @property
    def seconds(self) -> float:
        """Lower bound on the time of one run: the maximum over the resources."""
        return max(self.compute, self.hbm, self.ici, self.dcn)

    @property
    def bound(self) -> str:
        """The limiting resource: `compute`, `hbm`, `ici` or `dcn`."""
        return max(("compute", "hbm", "ici", "dcn"), key=lambda name: getattr(self, name))


def roofline(accelerator: Accelerator, flops: float, hbm_bytes: float, collectives: Sequence[Collective]) -> Roofline:
    """Returns the roofline of a program.

    Args:
      accelerator: the accelerator that it runs on.
      flops: FLOPs of one run over all devices, including recomputation.
      hbm_bytes: main-memory traffic of one device in one run.
      collectives: communication of one device in one run.
    """
    generation, per_chip = accelerator.generation, accelerator.generation.devices_per_chip
    return Roofline(
        compute=flops / accelerator.chips / generation.flops,
        hbm=hbm_bytes * per_chip / generation.hbm_bandwidth,
        ici=sum(one.bytes * per_chip / _ici_bandwidth(accelerator, one.local) for one in collectives if one.local > 1),
        dcn=sum(one.bytes_across for one in collectives) * per_chip / generation.dcn_bandwidth,
    )


def _ici_bandwidth(accelerator: Accelerator, group: int) -> float:
    """Returns the bytes/s that a chip can send to a group of `group` devices.

    A group uses the links along as many dimensions of the torus as it must span.
    """
    # Assume that groups are placed along the largest dimensions first, so that they span as few as possible.
    dimensions, reached = 0, accelerator.generation.devices_per_chip
    for size in sorted(accelerator.shape, reverse=True):
        if reached >= group and dimensions:
            break
        reached *= size
        dimensions += 1
    return accelerator.generation.ici_bandwidth * dimensions / accelerator.generation.dimensions
