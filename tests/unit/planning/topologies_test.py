"""Names of GPUs and CPU devices, and their descriptions for XLA."""

import jax
import pytest

from diffusion_lm.core.errors import ConfigError
from diffusion_lm.planning import accelerators, gpus, topologies


@pytest.mark.parametrize(
    ("name", "kind", "machines", "devices"),
    [("h100-8", "h100", 1, 8), ("H100-1", "h100", 1, 1), ("h200-16", "h200", 2, 16), ("2xa100-4", "a100", 2, 8)],
)
def test_names_of_gpus(name, kind, machines, devices):
    found = topologies.parse(name)
    assert (found.generation.name, found.slices, found.devices) == (kind, machines, devices)
    assert found.generation.platform == "gpu"


def test_names_of_tpus_are_those_of_accelerators():
    assert topologies.parse("v5e-16") == accelerators.parse("v5e-16")


def test_jax_uses_three_quarters_of_gpu_memory_by_default(monkeypatch):
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    whole = gpus.GPUS["h100"].hbm
    assert topologies.parse("h100-8").usable_hbm == int(whole * 0.75)
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", ".9")
    assert topologies.parse("h100-8").usable_hbm == int(whole * 0.9)
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "most")
    with pytest.raises(ConfigError, match="'most' is not a number"):
        topologies.parse("h100-8")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("h100-12", "a machine has 8"),
        ("h100-0", "a machine has 8"),
        ("2xcpu-4", "not a valid number of CPU devices"),
        ("h10-8", "did you mean h100"),
        ("v5e-17", "power of two"),
    ],
)
def test_invalid_names(name, message):
    with pytest.raises(ConfigError, match=message) as raised:
        topologies.parse(name)
    assert "--topology" in str(raised.value)


def test_launchers_only_accept_tpus():
    with pytest.raises(ConfigError, match="unknown TPU slice"):
        accelerators.parse("h100-8")


def test_xla_gets_the_same_gpu_figures_as_the_plan():
    """Memory and bandwidth are defined once; the other properties follow from the compute capability."""
    text = gpus.target_config(topologies.parse("h100-8"))
    assert f"device_memory_size: {gpus.GPUS['h100'].hbm}" in text
    assert f"memory_bandwidth: {int(gpus.GPUS['h100'].hbm_bandwidth)}" in text
    assert "major: 9 minor: 0" in text
    assert "core_count: 132" in text


def test_too_few_cpu_devices_is_an_error_that_names_the_flag():
    assert jax.devices("cpu"), "JAX runs: it can make no more of them"
    with pytest.raises(ConfigError, match="xla_force_host_platform_device_count=4096"):
        topologies.devices(topologies.parse("cpu-4096"))
