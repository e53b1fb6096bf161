"""The sums of a log window, speed, and model FLOPs utilisation (MFU)."""

import dataclasses
import functools
import math
import time

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_lm.architectures.base import Architecture
from diffusion_lm.core.errors import ConfigError
from diffusion_lm.objectives.objective import Objective
from diffusion_lm.training.step import StepStats
from diffusion_lm.training.writers import Row

# Dense bf16 peak of one device in FLOP/s, from the vendors' data sheets, by prefix of `jax.Device.device_kind`. A TPU
# device as JAX counts them is a core on v2 and v3, and a chip from v4 on.
PEAK_FLOPS = {
    "TPU v2": 22.5e12,
    "TPU v3": 61.5e12,
    "TPU v4 lite": 138e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 1153.5e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA L4": 121e12,
}

OTHER_PART = "loss, part "
"""In a window, the prefix of the number of a loss part with its own weight (`LossTerms.others`)."""


@dataclasses.dataclass
class MetricWindow:
    """The steps since the last row of the log, as sums on the host.

    Checkpoints store it, so the rows after a resume equal those of an uninterrupted run.

    Attributes:
      sums: name -> [total, weight] in float64.
      tokens: number of tokens since step 0 of the run, without padding.
    """

    sums: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    tokens: int = 0

    def add(self, step: int, stats: StepStats) -> None:
        """Adds one step's statistics, which must be on the host.

        Raises:
          ConfigError: the loss or the gradient norm is not finite.
        """
        terms = stats.terms
        values: dict[str, tuple[jax.Array, jax.Array | float]] = {"loss": (terms.loss_sum, terms.weight)}
        values |= {f"{OTHER_PART}{i}": (part.total, part.weight) for i, part in enumerate(terms.others)}
        values |= {"grad_norm": (stats.grad_norm, 1.0)}
        # Only what is differentiated must be finite; a logged metric may be NaN.
        checked = tuple(values)
        values |= {name: (mean.total, mean.weight) for name, mean in terms.metrics.items()}
        for name, (total, weight) in values.items():
            if name in checked and not math.isfinite(float(total)):
                raise ConfigError(
                    f"the {'gradient' if name == 'grad_norm' else 'loss'} of step {step} is {float(total)}",
                    where="TrainRun.optimizer",
                    fix="Lower the learning rate or lengthen its warmup; earlier checkpoints of the run are intact.",
                )
            entry = self.sums.setdefault(name, [0.0, 0.0])
            entry[0] += float(total)
            entry[1] += float(weight)
        self.tokens += int(stats.tokens)

    def means(self) -> dict[str, float]:
        """Returns total / weight of every name (0 if the weight is 0) and empties the window.

        A loss of several parts is the sum of their means.
        """
        means = {name: total / weight if weight > 0 else 0.0 for name, (total, weight) in self.sums.items()}
        # Each part is divided by its own weight before they are added.
        for name in [name for name in means if name.startswith(OTHER_PART)]:
            means["loss"] += means.pop(name)
        self.sums = {}
        return means


class Clock:
    """The speed of the steps since the last reading."""

    def __init__(self, step: int, tokens: int):
        self._restart(step, tokens)

    def _restart(self, step: int, tokens: int) -> None:
        self._start, self._waited, self._paused, self._saved = time.perf_counter(), 0.0, 0.0, 0.0
        self._step, self._tokens = step, tokens

    def waited(self, seconds: float) -> None:
        """Adds time that a step waited for its batch."""
        self._waited += seconds

    def paused(self, seconds: float, *, saving: bool = False) -> None:
        """Excludes time of evaluations and saving from the speed; the time of saving is reported."""
        self._paused += seconds
        self._saved += seconds if saving else 0.0

    def read(self, step: int, tokens: int, flops_per_token: float, peak_flops: float | None) -> dict[str, float]:
        """Returns the speed of the window that ends now, and starts the next one.

        Args:
          step: number of updates whose results are on the host.
          tokens: number of tokens in these updates, without padding (which is not useful work).
          flops_per_token: training FLOPs per token.
          peak_flops: of all devices together, or None if unknown; `mfu` is then omitted.
        """
        seconds = max(time.perf_counter() - self._start - self._paused, 1e-9)
        per_second = (tokens - self._tokens) / seconds
        timing = {
            "seconds": seconds,
            "tokens_per_second": per_second,
            "steps_per_second": (step - self._step) / seconds,
            "data_wait_s": self._waited,
            "checkpoint_s": self._saved,
        }
        peak_memory = peak_device_memory()
        if peak_memory is not None:
            timing["peak_memory_bytes"] = peak_memory
        if peak_flops:
            timing["mfu"] = per_second * flops_per_token / peak_flops
        self._restart(step, tokens)
        return timing


def peak_device_memory() -> int | None:
    """Returns the peak memory in bytes of this process's first device, or None if the device does not report it."""
    stats = jax.local_devices()[0].memory_stats()
    return int(stats["peak_bytes_in_use"]) if stats and "peak_bytes_in_use" in stats else None


def train_flops_per_token(
    architecture: Architecture, objective: Objective, row_length: int, encoder_length: int | None
) -> float:
    """Returns the training FLOPs per token of the main stream: forward and backward (3 x forward) of every pass.

    Matrices that are frozen under adapters need no gradient and count 2 x forward.

    Logits are counted at every token, as usual. The step computes them at scored tokens only (`nn.cross_entropy`), so
    MFU is too high if rows are mostly conditioning.

    Args:
      architecture: the network.
      objective: determines the number of forward passes per step.
      row_length: T.
      encoder_length: S, or None without an encoder; an encoder's work is divided by the tokens of the main stream.
    """
    needs, source = objective.needs(), encoder_length or None
    flops = needs.cost_in_forward_passes * architecture.flops_per_token(row_length, source)
    # Passes without a backward pass save nothing.
    return flops - (needs.passes - needs.frozen_passes) * architecture.saved_flops_per_token(row_length, source)


def peak_flops() -> float | None:
    """Returns the peak FLOP/s of all devices together, or None if it is unknown.

    For accelerators it is the dense bf16 peak of the data sheet. For CPUs it is measured once per process, as the best
    of a few float32 matrix products, so MFU on a CPU is relative to those.
    """
    device = jax.devices()[0]
    if device.platform == "cpu":
        return _measured_cpu_peak()
    # The longest matching prefix: "TPU v5 lite" is not "TPU v5".
    kinds = sorted((kind for kind in PEAK_FLOPS if device.device_kind.startswith(kind)), key=len)
    return PEAK_FLOPS[kinds[-1]] * jax.device_count() if kinds else None


@functools.cache
def _measured_cpu_peak(size: int = 768, repeats: int = 5) -> float:
    product = jax.jit(jnp.matmul)
    a = jnp.asarray(np.random.default_rng(0).standard_normal((size, size), np.float32))
    product(a, a).block_until_ready()
    best = math.inf
    for _ in range(repeats):
        start = time.perf_counter()
        product(a, a).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best


def short_number(value: float) -> str:
    """Returns 12345.6 as "12.3k"."""
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.1f}{suffix}"
    return f"{value:.0f}"


def clock_time(seconds: float) -> str:
    """Returns 83 as "1:23" and 3723 as "1:02:03"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def row_summary(row: Row, total: int) -> str:
    """Returns the progress line of a log row: `step 400/2000  loss 3.214  12.3k tok/s  MFU 31%  ETA 1:23`."""
    timing = row["timing"]
    speed = short_number(timing["tokens_per_second"])
    parts = [f"step {row['step']}/{total}", f"loss {row['loss']:.3f}", f"{speed} tok/s"]
    if "mfu" in timing:
        parts.append(f"MFU {timing['mfu']:.0%}")
    if timing["steps_per_second"] > 0:
        parts.append(f"ETA {clock_time((total - row['step']) / timing['steps_per_second'])}")
    return "  ".join(parts)
