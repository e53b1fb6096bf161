"""Frees compiled programs before their memory maps run out.

Each program that XLA compiles for a CPU holds memory maps, and Linux allows 65,530 per process. A process that exceeds
them ends in a segmentation fault without a message, for example a comparison of dozens of arms.
"""

import gc
import pathlib

import jax

MOST_MAPS = 25_000
"""Number of maps above which programs are freed. A stage or a test file adds up to 15,000."""


def free_programs(most_maps: int = MOST_MAPS) -> bool:
    """Frees all compiled programs of this process if it has more than `most_maps` memory maps.

    Functions compile again when they are called next. Does nothing on systems without /proc, which have no such limit.

    Returns:
      Whether programs were freed.
    """
    maps = pathlib.Path("/proc/self/maps")
    if not maps.exists() or maps.read_bytes().count(b"\n") <= most_maps:
        return False
    jax.clear_caches()
    gc.collect()
    return True
