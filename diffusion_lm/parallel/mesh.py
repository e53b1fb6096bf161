"""The device mesh: four named axes, built in one place.

`jax.make_mesh` gives Explicit axes by default. Training uses Auto axes with logical rules, so the axis type is set here
and nowhere else.
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
    """Number of devices per mesh axis. At most one axis may be -1: it gets the remaining devices.

    Attributes:
      data: data parallelism: replicated parameters, sharded batch; the only axis that may cross slices.
      fsdp: data parallelism with sharded parameters and optimizer state.
      sequence: shards of the length axis.
      tensor: shards of heads, feed-forward width and vocabulary.
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
                f"{axis}={size!r}: must be an integer >= 1, or -1",
                where=f"MeshSpec.{axis}",
                fix="Use a number of devices, or -1 for all remaining ones.",
            )
        free = [axis for axis in MESH_AXES if getattr(self, axis) == -1]
        require(
            len(free) <= 1,
            f"the mesh axes {' and '.join(free)} are all -1",
            where="MeshSpec",
            fix="Set at most one axis to -1.",
        )

    def sizes(self, num_devices: int) -> dict[str, int]:
        """Returns the size of each axis for `num_devices`.

        Raises:
          ConfigError: the product of the axes is not the number of devices.
        """
        sizes = {axis: getattr(self, axis) for axis in MESH_AXES}
        fixed = math.prod(size for size in sizes.values() if size != -1)
        # The axis of -1 gets the devices that the fixed axes leave.
        free = next((axis for axis, size in sizes.items() if size == -1), None)
        if num_devices % fixed or (free is None and fixed != num_devices):
            asked = " x ".join(f"{axis} {size}" for axis, size in sizes.items())
            raise ConfigError(
                f"a mesh of {asked} does not fit {num_devices} device{'s' if num_devices != 1 else ''}",
                where="MeshSpec",
                fix="Use axes whose product is the number of devices, or set one of them to -1.",
            )
        if free is not None:
            sizes[free] = num_devices // fixed
        return sizes

    def build(self, devices: Sequence[jax.Device] | None = None) -> Mesh:
        """Returns the mesh over `devices` (default: all devices of all processes), with Auto axes.

        Raises:
          ConfigError: the product of the axes is not the number of devices.
        """
        devices = list(jax.devices() if devices is None else devices)
        sizes = self.sizes(len(devices))
        slices = len({getattr(device, "slice_index", 0) for device in devices if device.platform == "tpu"}) or 1
        require(
            sizes["data"] % slices == 0,
            f"data={sizes['data']}: must be a multiple of the number of slices, {slices}",
            where="MeshSpec.data",
            fix="Use a multiple: only the data axis may cross slices.",
        )
        # Orders TPU devices so that adjacent devices of the mesh are adjacent on the interconnect; elsewhere a reshape.
        if slices > 1:
            within = (sizes["data"] // slices, *list(sizes.values())[1:])
            grid = mesh_utils.create_hybrid_device_mesh(
                within, (slices, 1, 1, 1), devices, allow_split_physical_axes=True
            )
        else:
            grid = mesh_utils.create_device_mesh(tuple(sizes.values()), devices, allow_split_physical_axes=True)
        return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))
