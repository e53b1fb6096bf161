"""One side of a measurement: something that is prepared once and then told, round after round, what to time.

A side runs in this process or in a child of its own (`children.py`); who drives it cannot tell the difference.
"""

import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import jax

from diffusion_lm.training.metrics import peak_device_memory


class Side(Protocol):
    """What is prepared and timed."""

    @property
    def labels(self) -> Sequence[str]:
        """What `measure` can be asked for."""

    def prepare(self, export: str | None = None) -> Mapping[str, Any]:
        """Compiles and runs everything once; returns plain facts about it.

        Args:
          export: folder to write the network to, as a Hugging Face checkpoint, before anything is trained.
        """

    def measure(self, label: str, number: int) -> float:
        """Returns the seconds of one round of `label`; `number` counts rounds."""

    def finish(self) -> Mapping[str, Any]:
        """Returns facts that are known only after the rounds."""


def memory_facts() -> dict[str, Any]:
    """Returns the most memory that was in use: of the device where it counts it, else of this process."""
    peak = peak_device_memory()
    if peak is not None:
        return {"peak_memory": peak, "peak_memory_of": "device"}
    # The kernel counts kilobytes, macOS bytes.
    factor = 1 if sys.platform == "darwin" else 1024
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * factor
    return {"peak_memory": used, "peak_memory_of": "process"}


def device_facts() -> dict[str, Any]:
    """Returns what the programs of this process run on."""
    device = jax.devices()[0]
    return {
        "kind": device.device_kind,
        "platform": device.platform,
        "count": jax.device_count(),
        "jax": jax.__version__,
    }


class FirstCall:
    """How long a first call took, and how many of its programs came out of the compile cache.

    Attributes:
      seconds: wall time.
      from_cache: programs that were read and not compiled.
    """

    seconds = 0.0
    from_cache = 0


@contextmanager
def first_call() -> Iterator[FirstCall]:
    """Times its body and listens to JAX's compile cache."""
    found = FirstCall()
    listening = [True]

    def hear(event: str, **_: Any) -> None:
        if listening and event == "/jax/compilation_cache/cache_hits":
            found.from_cache += 1

    # A listener cannot be taken back by public means, so this one goes deaf.
    jax.monitoring.register_event_listener(hear)
    started = time.perf_counter()
    try:
        yield found
    finally:
        found.seconds = time.perf_counter() - started
        listening.clear()
