"""Runs with several processes: how they connect, and which of them writes.

There are three ways to configure several processes, all by environment variables, so that no gin file depends on the
machine:

* `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`: explicit (local processes, GPU hosts).
* `DIFFUSION_LM_MULTIHOST=1`: JAX detects the cluster (Cloud TPU metadata, Slurm, Open MPI, GKE).
* `TPU_WORKER_HOSTNAMES` with several names (set on GKE and in TPU pod containers): as above.

All processes must start within `DIFFUSION_LM_START_TIMEOUT` seconds (300); the error names those that did not
(`roll_call.py`).
"""

import os
from collections.abc import Sequence

import jax

from diffusion_lm.core.errors import ConfigError
from diffusion_lm.parallel.roll_call import MissingProcesses, roll_call

_EXPLICIT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def initialize() -> bool:
    """Connects to the other processes if the environment has any; must be called before any device is used.

    Every process must call it. With a single process, or when called again, it does nothing.

    Returns:
      True if this run has several processes.

    Raises:
      ConfigError: the explicit variables are incomplete or not numbers, or no cluster was detected.
      MissingProcesses: some processes did not start in time; the message names them.
    """
    if jax.distributed.is_initialized():
        return jax.process_count() > 1
    given = [name for name in _EXPLICIT if os.environ.get(name)]
    hosts = [name for name in os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",") if name.strip()]
    if "JAX_NUM_PROCESSES" in given or "JAX_PROCESS_ID" in given:
        missing = [name for name in _EXPLICIT if name not in given]
        if missing:
            raise ConfigError(
                f"{' and '.join(given)} is set but {' and '.join(missing)} is not",
                where="environment",
                fix="Set all three, or none of them to run a single process.",
            )
        try:
            count, number = int(os.environ["JAX_NUM_PROCESSES"]), int(os.environ["JAX_PROCESS_ID"])
        except ValueError as error:
            raise ConfigError(
                "JAX_NUM_PROCESSES or JAX_PROCESS_ID is not an integer", where="environment", fix="Use integers."
            ) from error
        if count == 1:
            return False
        _join(os.environ["JAX_COORDINATOR_ADDRESS"], count, number)
    elif os.environ.get("DIFFUSION_LM_MULTIHOST", "") not in ("", "0") or len(hosts) > 1:
        _join(*_ask_cluster())
    else:
        return False
    return jax.process_count() > 1


def _join(address: str, count: int, number: int, local_devices: Sequence[int] | None = None) -> None:
    timeout = _timeout()
    if count > 1:
        # Before JAX connects: its own timeout aborts without naming the missing process.
        hosts = tuple(name.strip() for name in os.environ.get("TPU_WORKER_HOSTNAMES", "").split(","))
        roll_call(address, count, number, timeout, hosts)
    jax.distributed.initialize(
        address, count, number, local_device_ids=local_devices, initialization_timeout=max(60, round(timeout))
    )


def _ask_cluster() -> tuple[str, int, int, Sequence[int] | None]:
    """Returns what JAX detects about the cluster; JAX has no public function for this before connecting."""
    from jax._src.clusters import ClusterEnv

    try:
        found = ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, round(_timeout()))
    except RuntimeError as error:  # the coordinator's host name cannot be resolved: its host is missing
        fix = "Start process 0, or wait longer (DIFFUSION_LM_START_TIMEOUT)."
        raise MissingProcesses(str(error), where="environment", fix=fix) from error
    address, count, number, local_devices = found
    if address is None or count is None or number is None:
        raise ConfigError(
            "DIFFUSION_LM_MULTIHOST is set, and JAX detects no cluster (Cloud TPU, GKE, Slurm, Open MPI)",
            where="DIFFUSION_LM_MULTIHOST",
            fix=f"Set {', '.join(_EXPLICIT)} instead, or unset it to run a single process.",
        )
    return address, count, number, local_devices


def _timeout() -> float:
    given = os.environ.get("DIFFUSION_LM_START_TIMEOUT", "300")
    try:
        seconds = float(given)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise ConfigError(
            f"DIFFUSION_LM_START_TIMEOUT={given!r}: must be a number of seconds > 0",
            where="environment",
            fix="Use e.g. 300.",
        )
    return seconds


def is_primary() -> bool:
    """Returns True on the process that writes logs, tables and reports."""
    return jax.process_index() == 0
