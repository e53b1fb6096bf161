"""How fast the input pipeline of a run makes batches: read, packed, laid out; nothing is trained."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from diffusion_lm.bench.sides import memory_facts
from diffusion_lm.training.run import TrainRun


class PipelineSide:
    """The batches of a run, taken as fast as they come; a round takes `batches` of them.

    They come from the run's own iterator with its thread, so what is timed is what a trainer that never waits for its
    devices would wait for.
    """

    label = "pipeline"

    def __init__(self, run: TrainRun, batches: int):
        """Takes the run and the batches of a round; does nothing yet."""
        self.run, self.batches = run, batches
        self._counts = {"batches": 0, "examples": 0, "tokens": 0, "slots": 0}

    @property
    def labels(self) -> Sequence[str]:
        """The one thing that is timed."""
        return (self.label,)

    def prepare(self, export: str | None = None) -> Mapping[str, Any]:
        """Opens the data and takes a first batch."""
        del export
        started = time.perf_counter()
        self._iterator = self.run.data.iterator(self.run.batch_size)
        next(self._iterator)
        return {
            "first_batch_seconds": time.perf_counter() - started,
            "batch_size": self.run.batch_size,
            "row_length": self.run.data.row_length,
            "encoder_length": self.run.data.encoder_length,
        }

    def measure(self, label: str, number: int) -> float:
        """Returns the seconds of one batch, the mean of a round; counting what is in it is not timed."""
        del label, number
        started = time.perf_counter()
        taken = [next(self._iterator) for _ in range(self.batches)]
        seconds = time.perf_counter() - started
        for batch in taken:
            segments = np.asarray(batch.segment_ids)
            self._counts["batches"] += 1
            self._counts["examples"] += int(segments.max(axis=1).sum())
            self._counts["tokens"] += int((segments > 0).sum())
            self._counts["slots"] += segments.size
        return seconds / self.batches

    def finish(self) -> dict[str, Any]:
        """Returns examples and tokens of a batch, means over all that were taken, and closes the iterator."""
        self._iterator.close()
        batches = max(self._counts["batches"], 1)
        return {
            **memory_facts(),
            "examples_per_batch": self._counts["examples"] / batches,
            "tokens_per_batch": self._counts["tokens"] / batches,
            "filled": self._counts["tokens"] / max(self._counts["slots"], 1),
        }
