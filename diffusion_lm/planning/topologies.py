"""Returns JAX devices to compile for: TPU slices (libtpu), GPUs (XLA's CUDA plugin) or CPU devices of this machine.

TPUs and GPUs need not be present, and nothing is allocated on them (`jax.experimental.topologies`).
"""

import contextlib
import importlib.util
import os
from collections.abc import Sequence
from typing import Any

import jax

from diffusion_lm.core.errors import ConfigError, require
from diffusion_lm.planning import accelerators, gpus
from diffusion_lm.planning.accelerators import Accelerator

# Without these, libtpu queries the metadata server of a TPU for minutes, prints errors, and allows only one process per
# machine to load it. These protect a real TPU; there is none here.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def parse(name: str, slices: int = 1) -> Accelerator:
    """Parses the name of a TPU slice (`accelerators.parse`), GPUs (`h100-8`) or CPU devices (`cpu-8`).

    Raises:
      ConfigError: the name is unknown.
    """
    return gpus.parse(name, slices) if gpus.is_other(name) else accelerators.parse(name, slices, others=gpus.NAMES)


def devices(accelerator: Accelerator) -> Sequence[jax.Device]:
    """Returns devices of an accelerator for which programs can be compiled.

    Raises:
      ConfigError: the compiler is not installed or does not support the topology, or JAX has already started with too
        few CPU devices.
    """
    jax.config.update("jax_platforms", "cpu")  # otherwise the plugins spend a long time looking for real devices
    return {"tpu": _tpus, "gpu": _gpus, "cpu": _cpus}[accelerator.generation.platform](accelerator)


def _tpus(accelerator: Accelerator) -> Sequence[jax.Device]:
    _require_module("libtpu", "TPU", "plan")
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    options: dict[str, Any] = {}
    host = accelerator.generation.host
    if len(accelerator.shape) == len(host) and any(a < b for a, b in zip(accelerator.shape, host, strict=True)):
        options["chips_per_host_bounds"] = (*accelerator.shape, *(1,) * (3 - len(accelerator.shape)))
    if accelerator.slices > 1:
        options["num_slices"] = accelerator.slices
    return _described(accelerator, "tpu", accelerator.topology, options)


def _gpus(accelerator: Accelerator) -> Sequence[jax.Device]:
    _require_module("jax_plugins.xla_cuda13", "GPU", "plan-gpu")
    shape = f"1 x {accelerator.slices} x {accelerator.chips // accelerator.slices}"  # partitions, hosts, GPUs of each
    options = {"target_config": gpus.target_config(accelerator), "topology": shape}
    return _described(accelerator, "cuda", shape.replace(" ", ""), options)


def _cpus(accelerator: Accelerator) -> Sequence[jax.Device]:
    with contextlib.suppress(RuntimeError):  # JAX has already started; its devices may still suffice
        jax.config.update("jax_num_cpu_devices", accelerator.devices)
    found = jax.devices("cpu")
    require(
        len(found) >= accelerator.devices,
        f"JAX has already started with {len(found)} CPU devices, {accelerator.devices} are needed",
        where="--topology",
        fix=f"Set XLA_FLAGS=--xla_force_host_platform_device_count={accelerator.devices} before starting JAX.",
    )
    return found[: accelerator.devices]


def _require_module(module: str, kind: str, extra: str) -> None:
    try:
        found = importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the parent package is missing
        found = False
    require(
        found,
        f"the {kind} compiler is not installed",
        where="--topology",
        fix=f"Install the {extra} extra: pip install 'diffusion-lm[{extra}]'.",
    )


def _described(accelerator: Accelerator, platform: str, name: str, options: dict[str, Any]) -> Sequence[jax.Device]:
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(platform=platform, topology_name=name, **options).devices
    except Exception as error:
        text = str(error).strip() or type(error).__name__
        raise ConfigError(
            f"the compiler cannot create the topology {accelerator.topology}: {text.splitlines()[0]}",
            where="--topology",
            fix="Use another size or shape.",
        ) from error
