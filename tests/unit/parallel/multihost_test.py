import pytest

from diffusion_lm.core.errors import ConfigError
from diffusion_lm.parallel import multihost


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "DIFFUSION_LM_MULTIHOST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("TPU_WORKER_HOSTNAMES", raising=False)


def test_one_process_needs_nothing():
    assert multihost.initialize() is False
    assert multihost.is_primary()


def test_incomplete_variables_say_which_are_missing(monkeypatch):
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    with pytest.raises(ConfigError, match="JAX_COORDINATOR_ADDRESS and JAX_PROCESS_ID is not"):
        multihost.initialize()


def test_number_that_is_none(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "localhost:1234")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    monkeypatch.setenv("JAX_PROCESS_ID", "0")
    with pytest.raises(ConfigError, match="not an integer"):
        multihost.initialize()


def test_one_process_said_outright(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "localhost:1234")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "1")
    monkeypatch.setenv("JAX_PROCESS_ID", "0")
    assert multihost.initialize() is False


def test_a_time_limit_that_is_none_is_an_error(monkeypatch):
    for name, value in zip(multihost._EXPLICIT, ("localhost:1", "2", "0"), strict=True):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("DIFFUSION_LM_START_TIMEOUT", "soon")
    with pytest.raises(ConfigError, match="soon"):
        multihost.initialize()


def test_a_cluster_that_is_none_is_an_error(monkeypatch):
    for name in multihost._EXPLICIT:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DIFFUSION_LM_MULTIHOST", "1")
    with pytest.raises(ConfigError, match="no cluster"):
        multihost.initialize()


def test_slurm_says_who_and_where(monkeypatch):
    """JAX finds the cluster by a private function, which may change with its version."""
    variables = {"JOB_ID": "17", "STEP_NODELIST": "gpu[03-04]", "NTASKS": "16", "PROCID": "9", "LOCALID": "1"}
    for name, value in variables.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    address, count, number, devices = multihost._ask_cluster()
    assert address.startswith("gpu03:")
    assert (count, number, devices) == (16, 9, [1]), "task 1 of its machine drives GPU 1"
