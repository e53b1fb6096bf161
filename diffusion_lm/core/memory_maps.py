"""Frees compiled programs before their memory maps run out.

Each program that XLA compiles for a CPU holds memory maps, of which Linux allows a process 65,530. A process that needs
more ends in a segmentation fault without a message, as a comparison of dozens of arms does that never frees any.
"""

import gc
import pathlib

import jax

MOST_MAPS = 25_000
"""A stage or a test file adds up to 15,000 at a time."""


def free_programs(most_maps: int = MOST_MAPS) -> bool:
    """Drops everything that this process has compiled if it holds more than `most_maps` memory maps.

    Functions stay usable; they compile again when they are called. Systems without /proc have no such limit.

    Returns:
      Whether programs were dropped.
    """
    maps = pathlib.Path("/proc/self/maps")
    if not maps.exists() or maps.read_bytes().count(b"\n") <= most_maps:
        return False
    jax.clear_caches()
    gc.collect()
    return True
