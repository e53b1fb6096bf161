"""One process or many: joining the others, and who writes.

Three ways to say that there are several processes, all by the environment, so that no gin file depends on the machine:

* `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`: said outright (local processes, GPU hosts).
* `DIFFUSION_LM_MULTIHOST=1`: JAX asks the cluster (Cloud TPU metadata, Slurm, Open MPI, GKE) who and where it is.
* `TPU_WORKER_HOSTNAMES` with several names (set on GKE and in TPU pod containers): the same as above.
"""

import os

import jax

from diffusion_lm.core.errors import ConfigError

_EXPLICIT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def initialize() -> bool:
    """Joins the other processes if the environment says that there are any; call it before anything touches a device.

    Every process must call it. On one process, or when called again, it does nothing.

    Returns:
      True if this run has several processes.

    Raises:
      ConfigError: the explicit variables are incomplete or no numbers.
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
        jax.distributed.initialize(os.environ["JAX_COORDINATOR_ADDRESS"], count, number)
    elif os.environ.get("DIFFUSION_LM_MULTIHOST", "") not in ("", "0") or len(hosts) > 1:
        jax.distributed.initialize()
    else:
        return False
    return jax.process_count() > 1


def is_primary() -> bool:
    """True on the one process that writes logs, tables and reports."""
    return jax.process_index() == 0
