"""The device mesh: four named axes, built in one place.

`jax.make_mesh` gives Explicit axes by default; training here uses Auto axes with logical rules, so the axis type is
spelt out below and nowhere else.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from diffusion_lm.core.errors import ConfigError, require

MESH_AXES = ("data", "fsdp", "sequence", "tensor")


@dataclasses.dataclass(frozen=True)
class MeshSpec:
    """How many devices each mesh axis gets. At most one axis may be -1: it takes what the others leave.

    Attributes:
      data: copies of the parameters, each with its share of the batch; the axis that may cross slices.
      fsdp: shares of the batch whose parameters and optimizer state are sharded too.
      sequence: shares of the length axis.
      tensor: shares of heads, feed-forward width and vocabulary.
    """

    data: int = 1
    fsdp: int = -1
    sequence: int = 1
    tensor: int = 1

    def __post_init__(self):
        for axis in MESH_AXES:
            size = getattr(self, axis)
            require(
                isinstance(size, int) and not isinstance(size, bool) and (size >= 1 or size == -1),
                f"{axis} = {size!r} is no size of a mesh axis",
                where=f"MeshSpec.{axis}",
                fix="Give a number of devices, or -1 for all that are left.",
            )
        free = [axis for axis in MESH_AXES if getattr(self, axis) == -1]
        require(
            len(free) <= 1,
            f"the mesh axes {' and '.join(free)} are all -1",
            where="MeshSpec",
            fix="Leave at most one axis to be worked out.",
        )

    def sizes(self, num_devices: int) -> dict[str, int]:
        """Returns the size of each axis for `num_devices`.

        Raises:
          ConfigError: the axes do not multiply to the number of devices.
        """
        sizes = {axis: getattr(self, axis) for axis in MESH_AXES}
        fixed = math.prod(size for size in sizes.values() if size != -1)
        free = next((axis for axis, size in sizes.items() if size == -1), None)
        if num_devices % fixed or (free is None and fixed != num_devices):
            asked = " x ".join(f"{axis} {size}" for axis, size in sizes.items())
            raise ConfigError(
                f"a mesh of {asked} does not fit {num_devices} device{'s' if num_devices != 1 else ''}",
                where="MeshSpec",
                fix="Make the axes multiply to the number of devices, or set one of them to -1.",
            )
        if free is not None:
            sizes[free] = num_devices // fixed
        return sizes

    def build(self, devices: Sequence[jax.Device] | None = None) -> Mesh:
        """Returns the mesh over `devices` (default: all devices of all processes), with Auto axes.

        Raises:
          ConfigError: the axes do not multiply to the number of devices.
        """
        devices = list(jax.devices() if devices is None else devices)
        sizes = self.sizes(len(devices))
        slices = len({getattr(device, "slice_index", 0) for device in devices if device.platform == "tpu"}) or 1
        require(
            sizes["data"] % slices == 0,
            f"data = {sizes['data']} does not divide by the {slices} slices that the devices are of",
            where="MeshSpec.data",
            fix="Only the data axis crosses slices: make it a multiple of their number.",
        )
        # Orders TPU devices so that neighbours on the mesh are neighbours on the interconnect; elsewhere a reshape.
        if slices > 1:
            within = (sizes["data"] // slices, *list(sizes.values())[1:])
            grid = mesh_utils.create_hybrid_device_mesh(
                within, (slices, 1, 1, 1), devices, allow_split_physical_axes=True
            )
        else:
            grid = mesh_utils.create_device_mesh(tuple(sizes.values()), devices, allow_split_physical_axes=True)
        return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))
