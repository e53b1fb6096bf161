"""The TPU compiler knows every option of the named sets. Needs the `plan` extra: `make test-aot` runs it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from diffusion_lm.parallel.xla_options import SETS, xla_options
from diffusion_lm.planning import topologies
from diffusion_lm.planning.accelerators import parse

pytestmark = pytest.mark.aot


@pytest.mark.parametrize("name", [name for name, options in SETS.items() if "tpu" in options])
def test_the_compiler_takes_the_options(name):
    devices = topologies.devices(parse("v5e-16"))
    rows = NamedSharding(Mesh(np.array(devices), ("data",)), PartitionSpec("data"))
    x = jax.ShapeDtypeStruct((512, 512), jnp.bfloat16, sharding=rows)
    gradient = jax.jit(
        jax.grad(lambda w, x: (x @ w).astype(jnp.float32).sum()), compiler_options=xla_options((name,), "tpu")
    )
    assert gradient.lower(x, x).compile() is not None
