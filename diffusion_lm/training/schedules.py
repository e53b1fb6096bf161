"""Learning-rate schedules: functions of the step, computed on the host and passed to the compiled step.

So two runs that differ only in the schedule or the number of steps share one compiled program. All schedules count from
0: `value(0, total)` is the learning rate of the first update.
"""

import dataclasses
import math
from typing import ClassVar, Protocol

from diffusion_lm.core.checks import check_choice, check_count
from diffusion_lm.core.errors import require


class Schedule(Protocol):
    """A learning rate for every step of a run."""

    needs_total: ClassVar[bool]

    def value(self, step: int, total: int) -> float:
        """Returns the learning rate of update number `step` (from 0) in a run of `total` updates."""


def linear_warmup(step: int, warmup_steps: int) -> float:
    """Returns min(1, (step + 1) / warmup_steps): the first update has a learning rate above 0."""
    return min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0


def _check(schedule: Schedule, rate: str, *counts: str) -> None:
    name = type(schedule).__name__
    value = getattr(schedule, rate)
    require(
        isinstance(value, int | float) and not isinstance(value, bool) and value > 0,
        f"{rate}={value!r}: must be a positive number",
        where=f"{name}.{rate}",
        fix="Use a learning rate such as 1e-3.",
    )
    for count in counts:
        check_count(getattr(schedule, count), f"{name}.{count}", "Use a number of steps, 0 or more.", minimum=0)


def _check_fraction(schedule: Schedule, field: str) -> None:
    value = getattr(schedule, field)
    require(
        isinstance(value, int | float) and 0 <= value <= 1,
        f"{field}={value!r}: must be a number in [0, 1]",
        where=f"{type(schedule).__name__}.{field}",
        fix="Use a fraction from 0 to 1.",
    )


@dataclasses.dataclass(frozen=True)
class Constant:
    """`peak` after a linear warmup; T5's fine-tuning uses 1e-3 with Adafactor.

    Attributes:
      peak: the learning rate.
      warmup_steps: length of the linear warmup.
    """

    peak: float
    warmup_steps: int = 0

    needs_total: ClassVar[bool] = False

    def __post_init__(self):
        _check(self, "peak", "warmup_steps")

    def value(self, step: int, total: int) -> float:
        """Returns the learning rate of update `step`."""
        del total
        return self.peak * linear_warmup(step, self.warmup_steps)


@dataclasses.dataclass(frozen=True)
class InverseSqrt:
    """T5's pretraining schedule, `scale / sqrt(max(step, warmup_steps))`: flat during the warmup, then decaying.

    Source: arXiv 1910.10683, section 3.1.2, with scale 1 and 10,000 steps. With `ramp` the flat part is a linear warmup
    instead, as in arXiv 1706.03762.

    Attributes:
      scale: the numerator; the highest learning rate is `scale / sqrt(warmup_steps)`.
      warmup_steps: first step of the decay.
      ramp: increase linearly to the highest learning rate instead of starting there.
      steps_before: number of updates that an earlier run made with this schedule, which this run continues; 0 restarts
        the schedule.
    """

    scale: float = 1.0
    warmup_steps: int = 10_000
    ramp: bool = False
    steps_before: int = 0

    needs_total: ClassVar[bool] = False

    def __post_init__(self):
        _check(self, "scale", "warmup_steps", "steps_before")

    def value(self, step: int, total: int) -> float:
        """Returns the learning rate of update `step`."""
        del total
        # The square root depends on the total number of updates, those of an earlier run included.
        step += self.steps_before
        rate = self.scale / math.sqrt(max(step, self.warmup_steps, 1))
        return rate * linear_warmup(step, self.warmup_steps) if self.ramp else rate


@dataclasses.dataclass(frozen=True)
class PeakInverseSqrt:
    """Linear warmup to `peak` over a part of the run, then `peak * sqrt(warmup / step)`: fairseq's inverse square root.

    Attributes:
      peak: the highest learning rate.
      warmup_ratio: fraction of the run's steps for the warmup, at least one step (arXiv 2308.12219: 0.01).
    """

    peak: float
    warmup_ratio: float = 0.01

    needs_total: ClassVar[bool] = True

    def __post_init__(self):
        _check(self, "peak")
        _check_fraction(self, "warmup_ratio")

    def value(self, step: int, total: int) -> float:
        """Returns the learning rate of update `step`."""
        warmup_steps = max(1, round(self.warmup_ratio * total))
        # step + 1, because the last step of the warmup, warmup_steps - 1, is the first with the peak.
        return self.peak * linear_warmup(step, warmup_steps) * math.sqrt(warmup_steps / max(step + 1, warmup_steps))


@dataclasses.dataclass(frozen=True)
class Cosine:
    """Linear warmup to `peak`, then half a cosine down to `final_fraction * peak` at the end of the run.

    Attributes:
      peak: the highest learning rate.
      warmup_steps: length of the linear warmup.
      final_fraction: final learning rate, as a fraction of `peak`.
    """

    peak: float
    warmup_steps: int = 0
    final_fraction: float = 0.0

    needs_total: ClassVar[bool] = True

    def __post_init__(self):
        _check(self, "peak", "warmup_steps")
        _check_fraction(self, "final_fraction")

    def value(self, step: int, total: int) -> float:
        """Returns the learning rate of update `step`."""
        if step < self.warmup_steps:
            return self.peak * linear_warmup(step, self.warmup_steps)
        # At least 1, so that a run that is all warmup does not divide by 0.
        done = min(1.0, (step - self.warmup_steps) / max(1, total - self.warmup_steps))
        cosine = 0.5 * (1.0 + math.cos(math.pi * done))
        return self.peak * (self.final_fraction + (1.0 - self.final_fraction) * cosine)


@dataclasses.dataclass(frozen=True)
class WSD:
    """Warmup, stable, decay: `peak` until the last part of the run, then decay to `final_fraction * peak`.

    Attributes:
      peak: the stable learning rate.
      warmup_steps: length of the linear warmup.
      decay_fraction: fraction of the run, at its end, in which the learning rate decays.
      final_fraction: final learning rate, as a fraction of `peak`.
      shape: "linear", or "sqrt" for `1 - sqrt(progress)` (arXiv 2405.18392).
    """

    peak: float
    warmup_steps: int = 0
    decay_fraction: float = 0.2
    final_fraction: float = 0.0
    shape: str = "linear"

    needs_total: ClassVar[bool] = True

    def __post_init__(self):
        _check(self, "peak", "warmup_steps")
        _check_fraction(self, "decay_fraction")
        _check_fraction(self, "final_fraction")
        check_choice(self.shape, ("linear", "sqrt"), "WSD.shape")

    def value(self, step: int, total: int) -> float:
        """Returns the learning rate of update `step`."""
        rate = self.peak * linear_warmup(step, self.warmup_steps)
        decay_steps = round(self.decay_fraction * total)
        into_decay = step - (total - decay_steps)
        if into_decay <= 0:  # always with decay_fraction = 0, which must not be divided by
            return rate
        done = min(1.0, into_decay / decay_steps)
        falling = 1.0 - (math.sqrt(done) if self.shape == "sqrt" else done)
        return rate * (self.final_fraction + (1.0 - self.final_fraction) * falling)
