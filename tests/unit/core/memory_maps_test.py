"""Compiled programs are freed before their memory maps run out, and functions stay usable."""

import jax
import jax.numpy as jnp
import pytest

from diffusion_lm.core import memory_maps


@pytest.mark.skipif(not memory_maps.pathlib.Path("/proc/self/maps").exists(), reason="no /proc")
def test_programs_are_dropped_above_the_limit_only_and_compile_again():
    double = jax.jit(lambda x: 2 * x)
    assert double(jnp.ones(())) == 2
    assert not memory_maps.free_programs(10**9)
    assert double._cache_size() == 1
    assert memory_maps.free_programs(0)
    assert double._cache_size() == 0
    assert double(jnp.ones(())) == 2
