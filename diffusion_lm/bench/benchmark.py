"""The interface of a benchmark: prepare once, then time one round at a time; and facts about memory and devices.

A benchmark runs in this process or in a child process (`children.py`), with the same interface.
"""

import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import jax

from diffusion_lm.training.metrics import peak_device_memory

Facts = Mapping[str, Any]
"""Facts about a benchmark for the report: plain data that JSON can hold."""


class Benchmark(Protocol):
    """Something that is prepared once and timed in rounds."""

    @property
    def labels(self) -> Sequence[str]:
        """Names of what `measure` can time."""

    def prepare(self, export: str | None = None) -> Facts:
        """Compiles and runs everything once; returns facts for the report as plain data.

        Args:
          export: directory to which to write the initial network as a Hugging Face checkpoint; None = do not.
        """

    def measure(self, label: str, number: int) -> float:
        """Times one round of `label` and returns seconds; `number` is the index of the round."""

    def finish(self) -> Facts:
        """Returns facts that are only known after the rounds."""


def memory_facts() -> dict[str, Any]:
    """Returns the peak memory of the device if it reports one, else of this process, in bytes."""
    peak = peak_device_memory()
    if peak is not None:
        return {"peak_memory": peak, "peak_memory_of": "device"}
    # ru_maxrss is in KiB on Linux and in bytes on macOS.
    factor = 1 if sys.platform == "darwin" else 1024
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * factor
    return {"peak_memory": used, "peak_memory_of": "process"}


def device_facts() -> dict[str, Any]:
    """Returns kind, platform and number of the devices, and the JAX version."""
    device = jax.devices()[0]
    return {
        "kind": device.device_kind,
        "platform": device.platform,
        "count": jax.device_count(),
        "jax": jax.__version__,
    }


class FirstCall:
    """Duration of a first call, and how many of its programs were read from the compilation cache.

    Attributes:
      seconds: wall time.
      from_cache: number of programs read from the cache instead of compiled.
    """

    seconds = 0.0
    from_cache = 0


@contextmanager
def first_call() -> Iterator[FirstCall]:
    """Times the body of the `with` statement and counts hits of JAX's compilation cache."""
    found = FirstCall()
    active = [True]

    def count_hit(event: str, **_: object) -> None:
        if active and event == "/jax/compilation_cache/cache_hits":
            found.from_cache += 1

    # JAX has no public function to unregister a listener, so it is disabled afterwards.
    jax.monitoring.register_event_listener(count_hit)
    started = time.perf_counter()
    try:
        yield found
    finally:
        found.seconds = time.perf_counter() - started
        active.clear()
