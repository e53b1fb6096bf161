"""The TPU and the GPU compiler know every option of the named sets. `make test-aot` runs it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from diffusion_lm.parallel.xla_options import SETS, xla_options
from diffusion_lm.planning import topologies

pytestmark = pytest.mark.aot

SOMEWHERE = {"tpu": "v5e-16", "gpu": "h100-16"}


@pytest.mark.parametrize(
    ("name", "platform"), [(name, platform) for name, options in SETS.items() for platform in options]
)
def test_the_compiler_takes_the_options(name, platform):
    devices = topologies.devices(topologies.parse(SOMEWHERE[platform]))
    rows = NamedSharding(Mesh(np.array(devices), ("data",)), PartitionSpec("data"))
    x = jax.ShapeDtypeStruct((512, 512), jnp.bfloat16, sharding=rows)
    gradient = jax.jit(
        jax.grad(lambda w, x: (x @ w).astype(jnp.float32).sum()), compiler_options=xla_options((name,), platform)
    )
    assert gradient.lower(x, x).compile() is not None
