"""Rows, windows, the progress line, speed, and files that a kill has cut off."""

import json
import math
import re
import struct
import sys

import jax
import jax.numpy as jnp
import pytest

from diffusion_lm.core.errors import ConfigError
from diffusion_lm.core.types import LossTerms, WeightedMean
from diffusion_lm.training import metrics
from diffusion_lm.training.hooks import Log
from diffusion_lm.training.loop import final_metrics
from diffusion_lm.training.metrics import Clock, MetricWindow, clock_time, row_summary, short_number
from diffusion_lm.training.step import StepStats
from diffusion_lm.training.writers import JsonlWriter, TensorBoardWriter, read_rows


def _stats(loss, weight, accuracy=0.5):
    terms = LossTerms(jnp.float32(loss), jnp.float32(weight), {"accuracy": WeightedMean(jnp.float32(accuracy), 1.0)})
    return StepStats(terms, grad_norm=jnp.float32(2.0), tokens=jnp.int32(10))


def _log(folder, every=2, steps=4, **changes):
    settings = dict(
        batch_size=8, learning_rate=lambda step: 0.1 * (step + 1), flops_per_token=100.0, peak_flops=1e6, step=0,
        window=MetricWindow(), keep=lambda row: False,
    )  # fmt: skip
    return Log(folder, steps=steps, every=every, **(settings | changes))


def test_a_row_is_the_mean_over_its_steps_by_weight(tmp_path):
    with _log(tmp_path) as log:
        log.push(1, _stats(10.0, 2.0))
        log.push(2, _stats(2.0, 4.0))
        log.drain()
    (row,) = read_rows(tmp_path / "metrics.jsonl")
    assert row["loss"] == pytest.approx(12.0 / 6.0), "not the mean of 5.0 and 0.5"
    assert (row["step"], row["examples"], row["tokens"], row["accuracy"]) == (2, 16, 20, 0.5)
    assert row["learning_rate"] == pytest.approx(0.2)


def test_the_step_just_dispatched_is_never_fetched(tmp_path, monkeypatch):
    fetched = []
    real = jax.device_get
    monkeypatch.setattr(jax, "device_get", lambda stats: fetched.append(stats) or real(stats))
    stats = [_stats(1.0, 1.0) for _ in range(3)]
    with _log(tmp_path) as log:
        for number, one in enumerate(stats):
            log.push(number + 1, one)
            assert [id(f) for f in fetched] == [id(s) for s in stats[:number]]


def test_a_last_partial_row_is_written(tmp_path):
    with _log(tmp_path, every=10, steps=3) as log:
        for step in (1, 2, 3):
            log.push(step, _stats(1.0, 1.0))
        log.drain()
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [3]


def test_a_window_without_weight_is_zero():
    window = MetricWindow()
    window.add(1, _stats(0.0, 0.0))
    assert window.means()["loss"] == 0.0
    assert window.sums == {}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_names_its_step(value):
    with pytest.raises(ConfigError, match="the loss of step 7 is"):
        MetricWindow().add(7, _stats(value, 1.0))


def test_cut_off_and_later_lines_are_dropped_on_resume(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "kind": "train"}) for step in (2, 4, 6)]
    path.write_text("\n".join(lines) + "\n" + '{"step": 8, "ki')
    writer = JsonlWriter(path, keep=lambda row: row["step"] <= 4)
    writer.write({"step": 6, "kind": "train"})
    writer.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [2, 4, 6]


def test_a_value_that_is_not_finite_is_null_in_the_log_and_nan_in_the_result(tmp_path):
    """A perplexity beyond the floats ended a run with a traceback."""
    writer = JsonlWriter(tmp_path / "metrics.jsonl", keep=lambda row: True)
    writer.write({"step": 1, "kind": "evaluation", "bound/perplexity": math.inf, "bound/loss": 800.0, "timing": {}})
    writer.close()
    assert "Infinity" not in (tmp_path / "metrics.jsonl").read_text()
    assert read_rows(tmp_path / "metrics.jsonl")[0]["bound/perplexity"] is None
    assert final_metrics(tmp_path, 1) == pytest.approx({"bound/perplexity": math.nan, "bound/loss": 800.0}, nan_ok=True)


def test_T55_tokens_per_second_of_a_known_duration(monkeypatch):
    """100 tokens in 4 s of which 1.5 s were an evaluation: 40 tokens a second; waiting for data counts as time."""
    now = [10.0]
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])
    clock = Clock(step=5, tokens=1000)
    now[0] = 14.0
    clock.paused(1.5)
    clock.waited(0.25)
    timing = clock.read(step=10, tokens=1100, flops_per_token=50.0, peak_flops=1e4)
    assert timing["tokens_per_second"] == pytest.approx(40.0)
    assert timing["steps_per_second"] == pytest.approx(2.0)
    assert timing["data_wait_s"] == 0.25
    assert timing["mfu"] == pytest.approx(40.0 * 50.0 / 1e4)
    now[0] = 15.0
    assert clock.read(11, 1110, 50.0, None) == pytest.approx(
        {"seconds": 1.0, "tokens_per_second": 10.0, "steps_per_second": 1.0, "data_wait_s": 0.0, "checkpoint_s": 0.0}
    )


def test_progress_line():
    timing = {"tokens_per_second": 12_300.0, "steps_per_second": 1600 / 83, "mfu": 0.312}
    line = row_summary({"step": 400, "loss": 3.2141, "timing": timing}, 2000)
    assert line == "step 400/2000  loss 3.214  12.3k tok/s  MFU 31%  ETA 1:23"
    del timing["mfu"]
    assert "MFU" not in row_summary({"step": 400, "loss": 3.2141, "timing": timing}, 2000)


def test_lines_go_to_stderr(tmp_path, capsys):
    with _log(tmp_path) as log:
        log.push(1, _stats(10.0, 2.0))
        log.push(2, _stats(2.0, 4.0))
        log.drain()
        log.evaluation("bound", 2, {"loss": 1.5}, 0.1)
    captured = capsys.readouterr()
    assert captured.out == ""
    first, second = captured.err.splitlines()
    assert re.fullmatch(r"step 2/4  loss 2\.000  \S+ tok/s  MFU \d+%  ETA \d+:\d\d", first)
    assert second == "step 2/4  bound  loss 1.5"


@pytest.mark.parametrize(("value", "text"), [(7.2, "7"), (1234.0, "1.2k"), (2.5e6, "2.5M"), (3e9, "3.0G")])
def test_short_numbers(value, text):
    assert short_number(value) == text


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (83, "1:23"), (3723, "1:02:03")])
def test_clock_times(seconds, text):
    assert clock_time(seconds) == text


def test_peak_flops_of_accelerators_and_of_this_cpu(monkeypatch):
    assert 1e8 < metrics.peak_flops() < 1e14

    class Device:
        platform = "tpu"
        device_kind = "TPU v5 lite"

    monkeypatch.setattr(jax, "devices", lambda: [Device()])
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    assert metrics.peak_flops() == 4 * 197e12, "the longest name that fits, not that of the v5p"
    Device.device_kind = "TPU v99"
    assert metrics.peak_flops() is None


def test_tensorboard_events_hold_the_row_and_load_no_tensorflow(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.compat.proto.event_pb2 import Event

    writer = TensorBoardWriter(tmp_path, first_step=5)
    writer.write({"step": 6, "kind": "train", "loss": 1.5, "timing": {"mfu": 0.25}})
    writer.write({"step": 6, "kind": "evaluation", "bound/loss": 2.5, "timing": {}})
    writer.close()
    (file,) = tmp_path.iterdir()
    data, events = file.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        events.append(Event.FromString(data[12 : 12 + length]))
        data = data[16 + length :]
    assert events[0].file_version == "brain.Event:2"
    assert events[1].session_log.status == 1
    assert [{v.tag: v.simple_value for v in e.summary.value} for e in events[2:]] == [
        {"train/loss": 1.5, "train/timing/mfu": 0.25},
        {"bound/loss": 2.5},
    ]
    assert {e.step for e in events[2:]} == {6}
    assert "tensorflow" not in sys.modules


def test_a_loss_of_several_parts_is_logged_as_the_sum_of_their_means():
    """Over a window of two steps each part is its own quotient of sums: (1 + 3)/(2 + 2) + (4 + 0)/(1 + 1)."""
    window = MetricWindow()
    for number, (own, other) in enumerate([(1.0, 4.0), (3.0, 0.0)]):
        terms = LossTerms(jnp.float32(own), jnp.float32(2.0), {}, (WeightedMean(jnp.float32(other), jnp.float32(1.0)),))
        window.add(number, StepStats(terms=terms, grad_norm=jnp.float32(1.0), tokens=jnp.int32(1)))
    assert window.means() == {"loss": 3.0, "grad_norm": 1.0}
    bad = LossTerms(jnp.float32(1.0), jnp.float32(2.0), {}, (WeightedMean(jnp.float32(jnp.nan), jnp.float32(1.0)),))
    with pytest.raises(ConfigError, match="loss of step 7"):
        window.add(7, StepStats(terms=bad, grad_norm=jnp.float32(1.0), tokens=jnp.int32(1)))
