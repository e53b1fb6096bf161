"""Names of TPU slices, compared with the Google Cloud documentation of each version."""

import pytest

from diffusion_lm.core.errors import ConfigError
from diffusion_lm.planning.accelerators import GENERATIONS, parse


@pytest.mark.parametrize(
    ("name", "topology", "chips", "devices"),
    [
        ("v5e-16", "v5e:4x4", 16, 16),
        ("v5litepod-16", "v5e:4x4", 16, 16),
        ("v5e-8", "v5e:2x4", 8, 8),
        ("v5e-1", "v5e:1x1", 1, 1),
        ("v5e-256", "v5e:16x16", 256, 256),
        ("v6e-32", "v6e:4x8", 32, 32),
        ("v4-8", "v4:2x2x1", 4, 4),
        ("v4-32", "v4:2x2x4", 16, 16),
        ("v4-128", "v4:4x4x4", 64, 64),
        ("v5p-128", "v5p:4x4x4", 64, 64),
        ("v5p-16", "v5p:2x2x2", 8, 8),
        ("v3-8", "v3:2x2", 4, 8),
        ("v3-32", "v3:4x4", 16, 32),
        ("tpu7x-8", "tpu7x:2x2x1", 4, 8),
        ("v4:2x4x4", "v4:2x4x4", 32, 32),
        ("2xv5e-256", "v5e:16x16", 512, 512),
    ],
)
def test_names(name, topology, chips, devices):
    accelerator = parse(name)
    assert (accelerator.topology, accelerator.chips, accelerator.devices) == (topology, chips, devices)


@pytest.mark.parametrize(
    ("name", "hosts", "chips_per_host", "vms", "cloud_name"),
    [
        ("v5e-1", 1, 1, 1, "v5litepod-1"),
        ("v5e-4", 1, 4, 1, "v5litepod-4"),
        ("v5e-8", 2, 4, 1, "v5litepod-8"),
        ("v5e-16", 4, 4, 4, "v5litepod-16"),
        ("2xv5e-256", 64, 4, 128, "v5litepod-256"),
        ("v6e-8", 2, 4, 1, "v6e-8"),
        ("v4-8", 1, 4, 1, "v4-8"),
        ("v4-16", 2, 4, 2, "v4-16"),
        ("v5p-128", 16, 4, 16, "v5p-128"),
        ("tpu7x-8", 1, 4, 1, "tpu7x-8"),
    ],
)
def test_machines(name, hosts, chips_per_host, vms, cloud_name):
    """Compared with Cloud's tables of TPU configurations and with GKE's machine types with four chips."""
    accelerator = parse(name)
    assert (accelerator.hosts, accelerator.chips_per_host, accelerator.vms) == (hosts, chips_per_host, vms)
    assert accelerator.cloud_name == cloud_name


def test_slices_multiply():
    assert parse("v5e-16", slices=4) == parse("4xv5e-16")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("v5f-16", "did you mean"),
        ("h100-8", "--topology"),
        ("v5e", "v5e-16"),
        ("v4-9", "TensorCores"),
        ("v5e-24", "power of two"),
        ("v5e-512", "256"),
        ("v5e:4x4x4", "2 dimensions"),
    ],
)
def test_errors_of_invalid_names_say_what_to_write(name, says):
    with pytest.raises(ConfigError) as error:
        parse(name)
    assert says in str(error.value)


def test_two_devices_per_chip_halve_the_memory_per_device():
    assert parse("v3-8").hbm_per_device * 2 == GENERATIONS["v3"].hbm
    assert parse("v5p-8").hbm_per_device == GENERATIONS["v5p"].hbm
