"""Run folders and data in a bucket, from the loop to the tensors, against a bucket in memory."""

import json
import signal
import threading

import jax
import numpy as np
import pytest
from training_stubs import RaggedRows, SlowRows, small_run

from diffusion_lm.core import files
from diffusion_lm.core.errors import ConfigError
from diffusion_lm.data.grain_source import GrainSource
from diffusion_lm.training.checkpoint import CheckpointPolicy, finished_steps, restore_params
from diffusion_lm.training.loop import train

pytestmark = pytest.mark.thorough


def _rows(bucket, name):
    text = bucket.OBJECTS[f"bucket/{name}/metrics.jsonl"][0].decode()
    return [row for row in map(json.loads, text.splitlines()) if row["kind"] == "train"]


def test_a_run_in_a_bucket_is_the_run_in_a_folder(bucket, tmp_path):
    run = small_run(checkpoint=CheckpointPolicy(every=2, keep=2))
    there, here = train(run, "gs://bucket/run"), train(run, tmp_path / "run")
    assert [row["loss"] for row in _rows(bucket, "run")] == [
        json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    jax.tree.map(np.testing.assert_array_equal, there.params, here.params)
    jax.tree.map(np.testing.assert_array_equal, restore_params("gs://bucket/run"), here.params)
    assert finished_steps("gs://bucket/run") == [4, 6]
    assert not list(tmp_path.glob("gs:*"))
    assert "bucket/run/run_card.json" in bucket.OBJECTS


def test_a_run_in_a_bucket_goes_on_from_it(bucket):
    run = small_run(checkpoint=CheckpointPolicy(every=2))
    with pytest.raises(OSError, match="the disk is gone"):
        train(small_run(checkpoint=CheckpointPolicy(every=2), data=RaggedRows(fail_at=5)), "gs://bucket/cut")
    # The card names the data; here only the fault is taken out of them.
    name = "bucket/cut/run_card.json"
    bucket.put(name, bucket.OBJECTS[name][0].replace(b'"fail_at": 5', b'"fail_at": null'))
    assert finished_steps("gs://bucket/cut") == [2, 4]
    train(run, "gs://bucket/cut")
    train(run, "gs://bucket/whole")
    assert [row["loss"] for row in _rows(bucket, "cut")] == [row["loss"] for row in _rows(bucket, "whole")]


def test_another_configuration_is_refused(bucket):
    train(small_run(steps=2), "gs://bucket/run")
    with pytest.raises(ConfigError, match="run directory of another configuration"):
        train(small_run(steps=2, seed=5), "gs://bucket/run")


def test_the_log_is_in_the_bucket_before_the_checkpoint(bucket, monkeypatch):
    monkeypatch.setattr(files, "_SECONDS_BETWEEN_UPLOADS", 1e9)
    train(small_run(log_every=1, checkpoint=CheckpointPolicy(every=3)), "gs://bucket/run")
    saved = next(index for index, name in enumerate(bucket.UPLOADS) if name.endswith("/3/commit_success.txt"))
    logged = [index for index, name in enumerate(bucket.UPLOADS) if name.endswith("metrics.jsonl")]
    assert any(index < saved for index in logged[1:])
    assert len(logged) == 3, "when it is opened, before the checkpoint, before the last one: not for every row"


def test_a_save_that_was_cut_off_is_not_a_checkpoint(bucket):
    bucket.put("bucket/run/checkpoints/2/params/half", b"")
    train(small_run(steps=2), "gs://bucket/run")
    assert finished_steps("gs://bucket/run") == [2]
    assert "bucket/run/checkpoints/2/params/half" not in bucket.OBJECTS


def test_sigterm_saves_into_the_bucket(bucket):
    run = small_run(data=SlowRows(seconds=0.2), steps=40, log_every=1)
    threading.Timer(3.0, signal.raise_signal, [signal.SIGTERM]).start()
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stopped:
        train(run, "gs://bucket/run")
    assert signal.getsignal(signal.SIGTERM) is before
    assert stopped.value.code == 75
    assert finished_steps("gs://bucket/run") == [stopped.value.step]


def test_data_are_read_from_a_copy(bucket, monkeypatch, tmp_path):
    from diffusion_lm.core.special import SpecialTokens
    from diffusion_lm.data.schema import Manifest, Record
    from diffusion_lm.data.store import write_records

    monkeypatch.setenv("DIFFUSION_LM_CACHE", str(tmp_path / "cache"))
    made = tmp_path / "made" / "copying" / "train"
    records = [Record(np.arange(3, 3 + n), np.arange(3, 6), example_id=n) for n in (1, 2, 3)]
    manifest = Manifest(task="copying", split="train", specials=SpecialTokens(vocab_size=16))
    write_records(made, records, manifest)
    for path in made.iterdir():
        bucket.put(f"bucket/data/copying/train/{path.name}", path.read_bytes())
    source = GrainSource("copying", root="gs://bucket/data")
    assert [len(record.inputs) for record in source.records()] == [1, 2, 3]
    reads = len(list((tmp_path / "cache" / "data" / "from_buckets").glob("*/*.array_record")))
    assert reads == 1
    assert len(source) == 3
    with pytest.raises(ConfigError, match="gcloud storage cp"):
        write_records("gs://bucket/data/x/train", records, manifest)


def test_paths(bucket, tmp_path):
    assert str(files.as_path("gs://bucket/a") / "b") == "gs://bucket/a/b"
    assert files.as_path(files.as_path("gs://bucket/a")) == files.as_path("gs://bucket/a")
    assert str(files.absolute("gs://bucket/a")) == "gs://bucket/a"
    assert files.absolute("a").is_absolute()
    for place in ("gs://bucket/folder/x.json", tmp_path / "folder" / "x.json"):
        files.write_json(place, {"é": 1})
        assert files.read_json(place) == {"é": 1}
        growing = files.GrowingFile(place, b"1\n")
        growing.write(b"2\n")
        growing.close()
        assert files.read_text(place) == "1\n2\n"
        files.remove_folder(files.as_path(place).parent)
        assert not files.as_path(place).exists()
