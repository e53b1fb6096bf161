"""One process or many: joining the others, and who writes.

Three ways to say that there are several processes, all by the environment, so that no gin file depends on the machine:

* `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`: said outright (local processes, GPU hosts).
* `DIFFUSION_LM_MULTIHOST=1`: JAX asks the cluster (Cloud TPU metadata, Slurm, Open MPI, GKE) who and where it is.
* `TPU_WORKER_HOSTNAMES` with several names (set on GKE and in TPU pod containers): the same as above.

All must be there within `DIFFUSION_LM_START_TIMEOUT` seconds (300); the error says who is not (`roll_call.py`).
"""

import os
from typing import Any

import jax

from diffusion_lm.core.errors import ConfigError
from diffusion_lm.parallel.roll_call import MissingProcesses, roll_call

_EXPLICIT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def initialize() -> bool:
    """Joins the other processes if the environment says that there are any; call it before anything touches a device.

    Every process must call it. On one process, or when called again, it does nothing.

    Returns:
      True if this run has several processes.

    Raises:
      ConfigError: the explicit variables are incomplete or no numbers, or there is no cluster to ask.
      MissingProcesses: some processes did not start in time; it names them.
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
                fix="Set all three, or none of them to run one process.",
            )
        try:
            count, number = int(os.environ["JAX_NUM_PROCESSES"]), int(os.environ["JAX_PROCESS_ID"])
        except ValueError as error:
            raise ConfigError(
                "JAX_NUM_PROCESSES or JAX_PROCESS_ID is no number", where="environment", fix="Give whole numbers."
            ) from error
        if count == 1:
            return False
        _join(os.environ["JAX_COORDINATOR_ADDRESS"], count, number)
    elif os.environ.get("DIFFUSION_LM_MULTIHOST", "") not in ("", "0") or len(hosts) > 1:
        _join(*_ask_cluster())
    else:
        return False
    return jax.process_count() > 1


def _join(address: str, count: int, number: int, local_devices: Any = None) -> None:
    timeout = _timeout()
    if count > 1:
        hosts = tuple(name.strip() for name in os.environ.get("TPU_WORKER_HOSTNAMES", "").split(","))
        roll_call(address, count, number, timeout, hosts)
    jax.distributed.initialize(
        address, count, number, local_device_ids=local_devices, initialization_timeout=max(60, round(timeout))
    )


def _ask_cluster() -> tuple[str, int, int, Any]:
    """What JAX finds out about the cluster by itself; it has no public function that says it before joining."""
    from jax._src.clusters import ClusterEnv

    try:
        found = ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, round(_timeout()))
    except RuntimeError as error:  # the coordinator's name is unknown: its host is not there
        fix = "Start process 0, or wait longer (DIFFUSION_LM_START_TIMEOUT)."
        raise MissingProcesses(str(error), where="environment", fix=fix) from error
    address, count, number, local_devices = found
    if address is None or count is None or number is None:
        raise ConfigError(
            "several processes are wanted, but JAX knows of no cluster here (Cloud TPU, GKE, Slurm, Open MPI)",
            where="DIFFUSION_LM_MULTIHOST",
            fix=f"Set {', '.join(_EXPLICIT)} instead, or unset it to run one process.",
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
            f"{given!r} is no time to wait for", where="DIFFUSION_LM_START_TIMEOUT", fix="Give seconds above 0."
        )
    return seconds


def is_primary() -> bool:
    """True on the one process that writes logs, tables and reports."""
    return jax.process_index() == 0
