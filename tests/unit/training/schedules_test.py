"""Learning rates against their closed forms."""

import math

import optax
import pytest

from diffusion_lm.core.errors import ConfigError
from diffusion_lm.training.schedules import WSD, Constant, Cosine, InverseSqrt, PeakInverseSqrt


def test_constant_after_warmup():
    schedule = Constant(peak=0.4, warmup_steps=4)
    assert [schedule.value(step, 100) for step in range(6)] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.4])


@pytest.mark.parametrize("step", [0, 1, 9_999, 10_000, 10_001, 40_000, 1_000_000])
def test_inverse_sqrt_is_t5s(step):
    assert InverseSqrt().value(step, 0) == pytest.approx(1 / math.sqrt(max(step, 10_000)))


@pytest.mark.parametrize("step", [0, 9_999, 100_000])
def test_a_continued_inverse_sqrt_begins_where_the_earlier_run_ended(step):
    """After 1M steps of pretraining the rate is 1e-3 and falls on; a restarted schedule is 1e-2 for 10,000 steps."""
    continued = InverseSqrt(steps_before=1_000_000)
    assert continued.value(step, 0) == pytest.approx(InverseSqrt().value(1_000_000 + step, 0))
    ramp = InverseSqrt(warmup_steps=100, ramp=True, steps_before=50)
    assert ramp.value(0, 0) == pytest.approx(InverseSqrt(warmup_steps=100, ramp=True).value(50, 0))
    with pytest.raises(ConfigError, match="steps_before=-1"):
        InverseSqrt(steps_before=-1)


def test_inverse_sqrt_with_ramp_peaks_at_the_end_of_the_warmup():
    schedule = InverseSqrt(scale=2.0, warmup_steps=100, ramp=True)
    values = [schedule.value(step, 0) for step in range(300)]
    assert max(values) == pytest.approx(0.2)
    assert values.index(max(values)) == 99
    assert values[0] == pytest.approx(0.2 / 100)


def test_inverse_sqrt_without_warmup_is_finite_at_step_0():
    assert InverseSqrt(warmup_steps=0).value(0, 10) == 1.0


def test_peak_inverse_sqrt_warms_up_over_a_part_of_the_run():
    schedule = PeakInverseSqrt(peak=0.2, warmup_ratio=0.01)
    values = [schedule.value(step, 5000) for step in range(5000)]
    assert values.index(max(values)) == 49
    assert max(values) == pytest.approx(0.2)
    assert values[0] == pytest.approx(0.2 / 50)
    assert values[199] == pytest.approx(0.1), "four times the warmup is half the rate"
    assert values[4999] == pytest.approx(0.02)
    assert PeakInverseSqrt(peak=0.2).value(0, 10) == pytest.approx(0.2), "a warmup has one step at least"
    with pytest.raises(ConfigError, match="warmup_ratio=2: must be a number in"):
        PeakInverseSqrt(peak=0.2, warmup_ratio=2)


@pytest.mark.parametrize("final_fraction", [0.0, 0.1])
def test_cosine_equals_optax(final_fraction):
    schedule = Cosine(peak=3e-4, final_fraction=final_fraction)
    theirs = optax.cosine_decay_schedule(3e-4, 50, alpha=final_fraction)
    for step in range(51):
        assert schedule.value(step, 50) == pytest.approx(float(theirs(step)), abs=1e-10)


def test_cosine_joins_its_warmup_at_the_peak():
    schedule = Cosine(peak=1.0, warmup_steps=10)
    assert schedule.value(9, 100) == schedule.value(10, 100) == 1.0
    assert schedule.value(11, 100) < 1.0
    assert schedule.value(55, 100) == pytest.approx(0.5)


def test_cosine_survives_a_warmup_longer_than_the_run():
    assert Cosine(peak=1.0, warmup_steps=10).value(3, 4) == pytest.approx(0.4)


def test_wsd_is_stable_then_falls():
    schedule = WSD(peak=1.0, warmup_steps=10, decay_fraction=0.2, final_fraction=0.1)
    assert schedule.value(4, 100) == pytest.approx(0.5)
    assert {schedule.value(step, 100) for step in range(9, 81)} == {1.0}
    assert schedule.value(90, 100) == pytest.approx(0.55)
    assert schedule.value(100, 100) == pytest.approx(0.1)


def test_wsd_sqrt_shape_falls_faster_at_first():
    assert WSD(peak=1.0, shape="sqrt").value(85, 100) == pytest.approx(1 - math.sqrt(0.25))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Constant(peak=0.0),
        lambda: Constant(peak="1e-3"),
        lambda: Cosine(peak=1.0, warmup_steps=-1),
        lambda: WSD(peak=1.0, decay_fraction=1.5),
        lambda: WSD(peak=1.0, shape="cosine"),
    ],
)
def test_wrong_values_are_refused(make):
    with pytest.raises(ConfigError):
        make()
