"""Times the training step of a run on synthetic batches, without data and without a run directory."""

import dataclasses
import functools
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from diffusion_lm.bench.batches import conditioning_length, synthetic_batch
from diffusion_lm.bench.benchmark import Facts, device_facts, first_call, memory_facts
from diffusion_lm.core.rng import StreamKeys
from diffusion_lm.core.types import Batch
from diffusion_lm.interop.save import save
from diffusion_lm.parallel.shardings import place_batch
from diffusion_lm.training.metrics import peak_flops, train_flops_per_token
from diffusion_lm.training.run import TrainRun
from diffusion_lm.training.step import TrainStep

BATCHES = 4
"""Number of different batches that the steps cycle through."""


class TrainBenchmark:
    """The training step of a run: the program that `train` runs, with batches that are already on the devices.

    A round dispatches `steps` steps without waiting, as the training loop does, and then waits for all of them.
    """

    def __init__(self, run: TrainRun, steps: int, *, label: str = "diffusion_lm"):
        """Stores the run, the number of steps per round and the label of the table row."""
        self.run, self.steps, self.label = run, steps, label
        self._taken = self._rounds = 0

    @property
    def labels(self) -> Sequence[str]:
        """The only label."""
        return (self.label,)

    @functools.cached_property
    def train_step(self) -> TrainStep:
        """The run's training step."""
        return self.run.train_step()

    def prepare(self, export: str | None = None) -> Facts:
        """Initialises the parameters, takes the first step, and returns facts about the step."""
        self.run.check_mesh()
        run, train_step = self.run, self.train_step
        self._root = jax.random.key(run.seed)
        self._state = jax.block_until_ready(train_step.init(StreamKeys.create(run.seed).key("init")))
        if export is not None:
            save(export, run.model, self._state.params)
        self._batches = [place_batch(self._local(n), run.rules, train_step.mesh) for n in range(BATCHES)]
        with first_call() as first:
            loss = self._advance(1)
        return {
            **self.facts(),
            "platform": jax.default_backend(),
            "first_loss": float(loss),
            "compile_seconds": first.seconds,
            "compiled_from_cache": first.from_cache,
        }

    def facts(self) -> dict[str, Any]:
        """Returns shapes, parameter count and FLOPs of a step, which are known without running it."""
        run = self.run
        length, source = run.data.row_length, run.data.encoder_length
        flops = train_flops_per_token(run.model, run.objective, length, source)
        return {
            "objective": type(run.objective).__name__,
            "passes": run.objective.needs().passes,
            "parameters": run.model.count_parameters()["total"],
            "batch_size": run.batch_size,
            "row_length": length,
            "encoder_length": source,
            "scored_per_row": length - conditioning_length(run),
            "tokens_per_step": run.batch_size * length,
            "flops_per_step": flops * run.batch_size * length,
            "dtype": run.model.spec.dtype,
        }

    def measure(self, label: str, number: int) -> float:
        """Returns the mean seconds per step of one round."""
        del label, number
        self._rounds += 1
        started = time.perf_counter()
        self._advance(self.steps)
        return (time.perf_counter() - started) / self.steps

    def finish(self) -> Facts:
        """Returns peak memory, peak FLOP/s and the device."""
        # On a CPU the peak FLOP/s is measured. Skip that with zero rounds, where only startup is timed.
        peak = peak_flops() if self._rounds else None
        return {**memory_facts(), "peak_flops": peak, "device": device_facts()}

    def _local(self, number: int) -> Batch:
        """Returns the rows of a synthetic batch that belong to this process."""
        share = self.run.batch_size // jax.process_count()
        first = jax.process_index() * share
        return jax.tree.map(lambda leaf: leaf[first : first + share], synthetic_batch(self.run, number))

    def _advance(self, steps: int) -> jax.Array:
        """Takes `steps` steps, waits for them and returns the loss of the last one."""
        stats = None
        for _ in range(steps):
            batch = self._batches[self._taken % BATCHES]
            step = min(self._taken, self.run.steps)  # schedules are only defined up to the last step
            rate = np.float32(self.run.optimizer.schedule.value(step, max(self.run.steps, 1)))
            self._state, stats = self.train_step(self._state, batch, self._root, rate)
            self._taken += 1
        assert stats is not None
        jax.block_until_ready(self._state)
        return stats.terms.loss


def resized(run: TrainRun, batch_size: int | None) -> TrainRun:
    """Returns the run with another batch size; None keeps it."""
    return run if batch_size is None else dataclasses.replace(run, batch_size=batch_size)
