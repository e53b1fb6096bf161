"""Named sets of compiler options: what a platform gets, and that the compiler knows every name."""

import jax
import jax.numpy as jnp
import pytest

from diffusion_lm.core.errors import ConfigError
from diffusion_lm.parallel.xla_options import SETS, xla_options


def test_a_platform_gets_its_part_of_the_sets():
    found = xla_options(("large_vmem", "overlap_collectives"), "tpu")
    assert found["xla_tpu_scoped_vmem_limit_kib"] == 98304
    assert found["xla_enable_async_all_gather"] is True
    assert not any(name.startswith("xla_gpu") for name in found)
    assert all(name.startswith("xla_gpu") for name in xla_options(tuple(SETS), "gpu"))
    assert xla_options(tuple(SETS), "cpu") == {} == xla_options((), "tpu")


def test_an_unknown_set_is_one_sentence():
    with pytest.raises(ConfigError, match=r"overlap_collective'.*overlap_collectives") as error:
        xla_options(("overlap_collective",), "tpu")
    assert "TrainRun.xla_options" in str(error.value)


def test_the_compiler_knows_every_option_for_gpus():
    """The options of GPUs are XLA's own, which every build of it reads; those of TPUs are libtpu's (`tests/aot`)."""
    with pytest.raises(Exception, match="No such compile option"):
        jax.jit(lambda x: x, compiler_options={"xla_gpu_no_such_option": True})(jnp.ones(1))
    for option, value in xla_options(tuple(SETS), "gpu").items():
        jax.jit(lambda x: x + 1, compiler_options={option: value})(jnp.ones(1))
