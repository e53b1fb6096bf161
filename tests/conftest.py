"""Keeps compiled programs from piling up: each holds memory maps, and a process that runs out of them crashes."""

import gc
import pathlib

import jax
import pytest

MOST_MAPS = 25_000
"""Linux allows 65,530 a process, no file adds more than 15,000; programs that files share stay compiled below this."""


@pytest.fixture(scope="module", autouse=True)
def programs_do_not_pile_up():
    """Frees what this process has compiled once it holds many maps, between one test file and the next."""
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MOST_MAPS:
        jax.clear_caches()
        gc.collect()
