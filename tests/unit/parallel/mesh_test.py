import jax
import pytest
from jax.sharding import AxisType

from diffusion_lm.core.errors import ConfigError
from diffusion_lm.parallel.mesh import MESH_AXES, MeshSpec


def test_free_axis_takes_what_the_others_leave():
    assert MeshSpec(data=2, fsdp=-1, tensor=2).sizes(16) == {"data": 2, "fsdp": 4, "sequence": 1, "tensor": 2}
    assert MeshSpec().sizes(1) == dict.fromkeys(MESH_AXES, 1)


@pytest.mark.parametrize(
    ("spec", "devices"), [(MeshSpec(data=3, fsdp=-1), 8), (MeshSpec(data=2, fsdp=2), 8), (MeshSpec(fsdp=16), 8)]
)
def test_mesh_that_does_not_fit_names_the_devices(spec, devices):
    with pytest.raises(ConfigError, match=f"does not fit {devices} devices"):
        spec.sizes(devices)


@pytest.mark.parametrize("sizes", [{"data": 0}, {"tensor": -2}, {"fsdp": 1.5}, {"data": -1, "fsdp": -1}])
def test_impossible_sizes_are_refused_when_built(sizes):
    with pytest.raises(ConfigError):
        MeshSpec(**sizes)


def test_axes_are_auto():
    mesh = MeshSpec().build(jax.devices()[:1])
    assert mesh.axis_names == MESH_AXES
    assert set(mesh.axis_types) == {AxisType.Auto}


def test_equal_specs_are_equal_values():
    assert MeshSpec(tensor=2) == MeshSpec(tensor=2)
    assert hash(MeshSpec(tensor=2)) == hash(MeshSpec(tensor=2))
