"""The log in Weights & Biases: on request only, resumable, offline; with a stand-in and, if there, the real package."""

import json
import os
import sys
import types

import pytest
from training_stubs import AUTOREGRESSIVE, RaggedRows, SumOfParameters, small_run

from diffusion_lm.core.errors import ConfigError
from diffusion_lm.training.checkpoint import CheckpointPolicy
from diffusion_lm.training.loop import train
from diffusion_lm.training.writers import open_writers

ROWS = (
    {"step": 2, "kind": "train", "loss": 1.5, "timing": {"mfu": 0.25}},
    {"step": 2, "kind": "evaluation", "bound/loss": 2.5, "timing": {"bound/seconds": 0.5}},
)


class FakeRun:
    def __init__(self, settings):
        self.settings, self.metrics, self.logged, self.finished = settings, [], [], False

    def define_metric(self, name, **options):
        self.metrics.append((name, options))

    def log(self, values):
        assert not self.finished
        self.logged.append(values)

    def finish(self):
        self.finished = True


@pytest.fixture
def fake(monkeypatch):
    """The runs that a stand-in for the package is asked for."""
    runs = []

    def init(**settings):
        runs.append(FakeRun(settings))
        return runs[-1]

    module = types.SimpleNamespace(init=init, Settings=lambda **fields: fields)
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setenv("WANDB_PROJECT", "diffusion")
    return runs


def write(folder, rows=ROWS, **options):
    writers = open_writers(folder, keep=lambda row: True, step=0, **options)
    for row in rows:
        for writer in writers:
            writer.write(row)
            writer.flush()
    for writer in writers:
        writer.close()


def test_rows_are_logged_by_step_with_the_configuration(fake, tmp_path):
    write(tmp_path / "mine", identity={"class": "TrainRun", "seed": 3})
    (run,) = fake
    assert run.settings["config"] == {"class": "TrainRun", "seed": 3}
    assert (run.settings["name"], run.settings["group"], run.settings["resume"]) == ("mine", None, "allow")
    assert run.settings["dir"] == str(tmp_path / "mine")
    assert run.metrics == [("step", {}), ("*", {"step_metric": "step"})]
    assert run.logged == [
        {"step": 2, "train/loss": 1.5, "train/timing/mfu": 0.25},
        {"step": 2, "bound/loss": 2.5, "timing/bound/seconds": 0.5},
    ]
    assert run.finished


def test_a_run_that_is_started_again_is_the_same_run_there(fake, tmp_path):
    for name in ("one", "one", "two"):
        write(tmp_path / name)
    first, again, other = (run.settings["id"] for run in fake)
    assert first == again != other
    assert json.loads((tmp_path / "one" / "wandb.json").read_text()) == {"id": first}


def test_stages_of_a_comparison_are_a_group(fake, tmp_path):
    write(tmp_path / "study" / "stages" / "pretrain")
    assert (fake[0].settings["name"], fake[0].settings["group"]) == ("pretrain", "study")


def test_the_variables_of_the_package_come_first(fake, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_NAME", "given")
    monkeypatch.setenv("WANDB_RUN_GROUP", "given")
    write(tmp_path / "study" / "stages" / "pretrain")
    assert (fake[0].settings["name"], fake[0].settings["group"]) == (None, None), "None leaves them to the package"


def test_without_a_project_nothing_is_sent_anywhere(fake, tmp_path, monkeypatch):
    """The package may be installed for something else."""
    monkeypatch.delenv("WANDB_PROJECT")
    write(tmp_path)
    assert fake == []
    assert not (tmp_path / "wandb.json").exists()


def test_a_project_without_the_package_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "diffusion")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"wandb is not installed \(WANDB_PROJECT\)\. .*diffusion-lm\[tracking\]"):
        write(tmp_path)


def test_a_service_that_cannot_be_reached_is_one_sentence(fake, tmp_path, monkeypatch):
    def init(**settings):
        raise OSError("api.wandb.ai: timed out\nstack")

    monkeypatch.setattr(sys.modules["wandb"], "init", init)
    with pytest.raises(ConfigError, match=r"api\.wandb\.ai: timed out \(WANDB_PROJECT\)\. .*WANDB_MODE=offline"):
        write(tmp_path)


def test_training_logs_its_rows_once_and_resumes_the_run(fake, tmp_path):
    run = small_run(objective=AUTOREGRESSIVE, steps=4, evaluations=(SumOfParameters(every=2),))
    policy = CheckpointPolicy(every=2)
    with pytest.raises(OSError, match="disk"):
        train(small_run(**vars(run) | {"data": RaggedRows(fail_at=3), "checkpoint": policy}), tmp_path)
    assert fake[0].finished, "also where training fails"
    card = json.loads((tmp_path / "run_card.json").read_text())
    assert fake[0].settings["config"] == card["identity"]
    card["identity"]["data"]["fail_at"] = None  # the fault is taken out of the data
    (tmp_path / "run_card.json").write_text(json.dumps(card))
    train(small_run(**vars(run) | {"checkpoint": policy}), tmp_path)
    assert fake[0].settings["id"] == fake[1].settings["id"]
    found = [(row["step"], *sorted(name for name in row if "loss" in name)) for one in fake for row in one.logged]
    assert found == [(2, "train/loss"), (2, "probe/loss"), (4, "train/loss"), (4, "probe/loss")]


@pytest.mark.thorough
def test_offline_runs_of_the_real_package_are_in_the_run_folder(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_PROJECT", "diffusion")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for _ in range(2):
        write(tmp_path / "mine", identity={"seed": 3})
    wandb.teardown()  # its process writes the last rows when it ends
    mark = json.loads((tmp_path / "mine" / "wandb.json").read_text())["id"]
    files = sorted((tmp_path / "mine" / "wandb").glob(f"offline-run-*-{mark}/run-{mark}.wandb"))
    assert files
    for file in files:
        content = file.read_bytes()
        assert all(name in content for name in (b"train/loss", b"bound/loss", b"train/timing/mfu", b"diffusion"))
    assert not (tmp_path / "wandb").exists()
