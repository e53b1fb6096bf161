"""Names of GPUs and CPU devices, and what is told of them."""

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


def test_jax_takes_three_quarters_of_a_gpu_unless_told_otherwise(monkeypatch):
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
def test_names_that_mean_nothing(name, message):
    with pytest.raises(ConfigError, match=message) as raised:
        topologies.parse(name)
    assert "--topology" in str(raised.value)


def test_launching_knows_only_tpus():
    with pytest.raises(ConfigError, match="unknown TPU slice"):
        accelerators.parse("h100-8")


def test_what_is_told_of_a_gpu_is_what_the_plan_counts():
    """Memory and bandwidth are written once; the rest are the properties of its compute capability."""
    text = gpus.target_config(topologies.parse("h100-8"))
    assert f"device_memory_size: {gpus.GPUS['h100'].hbm}" in text
    assert f"memory_bandwidth: {int(gpus.GPUS['h100'].hbm_bandwidth)}" in text
    assert "major: 9 minor: 0" in text
    assert "core_count: 132" in text


def test_more_cpu_devices_than_there_are_is_refused_with_the_flag():
    assert jax.devices("cpu"), "JAX runs: it can make no more of them"
    with pytest.raises(ConfigError, match="xla_force_host_platform_device_count=4096"):
        topologies.devices(topologies.parse("cpu-4096"))
