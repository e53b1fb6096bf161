"""Times the input pipeline of a run: reading, packing and layout of batches, without training."""

import time
from collections.abc import Sequence

import numpy as np

from diffusion_lm.bench.benchmark import Facts, memory_facts
from diffusion_lm.training.run import TrainRun


class PipelineBenchmark:
    """The input pipeline of a run; a round takes `batches` batches as fast as they arrive.

    It uses the run's own iterator and its background thread, so it measures the time per batch of a training loop whose
    devices take no time.
    """

    label = "pipeline"

    def __init__(self, run: TrainRun, batches: int):
        """Stores the run and the number of batches per round."""
        self.run, self.batches = run, batches
        self._counts = {"batches": 0, "examples": 0, "tokens": 0, "slots": 0}

    @property
    def labels(self) -> Sequence[str]:
        """The only label."""
        return (self.label,)

    def prepare(self, export: str | None = None) -> Facts:
        """Opens the data and takes the first batch."""
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
        """Returns the mean seconds per batch of one round; counting its examples and tokens is not timed."""
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

    def finish(self) -> Facts:
        """Closes the iterator and returns the mean numbers of examples and tokens per batch."""
        self._iterator.close()
        batches = max(self._counts["batches"], 1)
        return {
            **memory_facts(),
            "examples_per_batch": self._counts["examples"] / batches,
            "tokens_per_batch": self._counts["tokens"] / batches,
            "filled": self._counts["tokens"] / max(self._counts["slots"], 1),
        }
