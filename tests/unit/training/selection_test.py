"""The best checkpoint on a validation metric: kept, recorded, handed on, and the same after any interruption."""

import dataclasses
import json
import os
import signal
import typing

import jax
import numpy as np
import pytest
from training_stubs import AUTOREGRESSIVE, RaggedRows, small_run

from diffusion_lm.core.errors import ConfigError
from diffusion_lm.training.checkpoint import FOLDER, CheckpointPolicy, finished_steps, restore_params, selected
from diffusion_lm.training.hooks import Preempted
from diffusion_lm.training.loop import train
from diffusion_lm.training.selection import BestCheckpoint, Selected
from diffusion_lm.training.trained import trained_model

SCORES = (1.0, 3.0, 3.0, 2.0)
"""At steps 2, 4, 6, 8: the best is seen twice."""


@dataclasses.dataclass(frozen=True)
class Scripted:
    """An evaluation whose values are given."""

    scores: tuple[float, ...] = SCORES
    every: int = 2
    name: str = "held_out"
    preempt_at: int | None = dataclasses.field(default=None, compare=False)

    value_names: typing.ClassVar = ("score", "other")

    def run(self, model, step):
        if step == self.preempt_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return {"score": self.scores[step // self.every - 1], "other": 0.0}


@dataclasses.dataclass(frozen=True)
class FailingRows(RaggedRows):
    fail_at: int | None = dataclasses.field(default=None, compare=False)


def make(best=BestCheckpoint("held_out/score"), every=0, keep=1, keep_every=None, **changes):
    policy = CheckpointPolicy(every=every, keep=keep, keep_every=keep_every, best=best)
    return small_run(
        **{"objective": AUTOREGRESSIVE, "steps": 8, "evaluations": (Scripted(),), "checkpoint": policy} | changes
    )


def equal(a, b):
    return all(
        np.array_equal(np.asarray(x), np.asarray(y))
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed")
    return workdir, train(make(), workdir)


def test_the_best_checkpoint_is_kept_recorded_and_handed_on(undisturbed):
    workdir, result = undisturbed
    assert result.selected == selected(workdir) == Selected(4, 3.0, "held_out/score", "max"), "of equals, the earlier"
    assert result.step == 8
    assert finished_steps(workdir) == [4, 8]
    best, last = restore_params(workdir, step=4), restore_params(workdir, step=8)
    assert not equal(best, last)
    assert equal(result.params, best)
    assert equal(restore_params(workdir), best)
    assert equal(trained_model(make(), workdir).params, best)
    assert equal(trained_model(make(), workdir, step=8).params, last)


def test_a_finished_run_returns_the_best_at_once(undisturbed):
    workdir, result = undisturbed
    again = train(make(), workdir, init_params=lambda: pytest.fail("not needed"))
    assert again.selected == result.selected
    assert equal(again.params, result.params)


def test_another_run_starts_from_the_best(undisturbed, tmp_path):
    workdir, result = undisturbed
    run = small_run(objective=AUTOREGRESSIVE, steps=0)
    assert equal(train(run, tmp_path / "path", init_params=workdir).params, result.params)


def test_the_smallest_value_and_the_moving_average(tmp_path):
    run = make(BestCheckpoint("held_out/score", mode="min"), every=3, ema_decay=0.5)
    result = train(run, tmp_path)
    assert result.selected.step == 2
    assert finished_steps(tmp_path) == [2, 8]
    average = restore_params(tmp_path / FOLDER / "2")
    assert equal(result.params, average)
    updates = dataclasses.replace(run, ema_decay=None)
    assert not equal(train(updates, tmp_path / "without").params, average)


def test_without_selection_the_last_checkpoint_is_handed_on(tmp_path):
    result = train(make(None, every=1, keep=2, keep_every=3), tmp_path)
    assert finished_steps(tmp_path) == [3, 6, 7, 8], "the newest and the multiples of keep_every, as before"
    assert (result.selected, selected(tmp_path)) == (None, None)
    assert equal(result.params, restore_params(tmp_path, step=8))


@pytest.mark.parametrize("fail_at", [3, 5, 7])
@pytest.mark.parametrize("every", [0, pytest.param(3, marks=pytest.mark.thorough)])
def test_a_run_that_was_killed_selects_the_same(undisturbed, tmp_path, fail_at, every):
    _, result = undisturbed
    with pytest.raises(OSError, match="disk"):
        train(make(every=every, data=FailingRows(fail_at=fail_at)), tmp_path)
    again = train(make(every=every, data=FailingRows()), tmp_path)
    assert again.selected == result.selected
    assert finished_steps(tmp_path) == [4, 8]
    assert equal(again.params, result.params)


@pytest.mark.parametrize("step", [4, *(pytest.param(step, marks=pytest.mark.thorough) for step in (2, 6))])
def test_a_preempted_run_selects_the_same(undisturbed, tmp_path, step):
    """SIGTERM inside an evaluation; at the next step the run stops."""
    _, result = undisturbed
    with pytest.raises(Preempted):
        train(make(evaluations=(Scripted(preempt_at=step),)), tmp_path)
    again = train(make(), tmp_path)
    assert again.selected == result.selected
    assert equal(again.params, result.params)


def test_an_evaluation_that_a_preemption_left_out_still_selects(undisturbed, tmp_path):
    """Stopped at step 4 before its evaluation: the run that continues measures step 4 and keeps its checkpoint."""
    _, result = undisturbed
    probe = Scripted(name="probe", every=1, scores=(0.0,) * 8, preempt_at=3)
    with pytest.raises(Preempted):
        train(make(evaluations=(probe, Scripted())), tmp_path)
    assert finished_steps(tmp_path)[-1] == 4
    again = train(make(), tmp_path)
    assert again.selected == result.selected
    assert finished_steps(tmp_path) == [4, 8]
    assert equal(again.params, result.params)


def test_a_value_that_is_not_finite_is_never_selected(tmp_path):
    nan, inf = float("nan"), float("inf")
    assert train(make(evaluations=(Scripted((nan, inf, 1.0, nan)),)), tmp_path / "some").selected.step == 6
    for _ in range(2):  # a finished run says the same again
        with pytest.raises(ConfigError, match="metric='held_out/score': was never finite"):
            train(make(evaluations=(Scripted((nan,) * 4),)), tmp_path / "none")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            dict(best=BestCheckpoint("other/score")),
            r"'other/score': no evaluation of the run measures it.*held_out/score",
        ),
        (dict(best=BestCheckpoint("held_out/scores")), r"metric='held_out/scores': .*did you mean held_out/score"),
        (dict(best=BestCheckpoint("held_out")), "metric='held_out': no evaluation of the run measures it"),
        (dict(evaluations=()), "Add the evaluation to TrainRun.evaluations"),
        (dict(evaluations=(Scripted(every=0),)), "only after the last step.*Set the evaluation's `every`"),
    ],
)
def test_a_metric_that_cannot_be_followed_is_refused_when_the_run_is_made(changes, message):
    with pytest.raises(ConfigError, match=message):
        make(**changes)


def test_a_direction_that_is_none_is_refused():
    with pytest.raises(ConfigError, match=r"mode='up'.*max, min"):
        BestCheckpoint("held_out/score", mode="up")


def test_a_value_that_an_evaluation_turns_out_not_to_measure_is_named(tmp_path):
    class Silent(Scripted):
        value_names = ("score", "other", "f1")

    with pytest.raises(ConfigError, match=r"'held_out/f1': the evaluation did not measure it.*held_out/score"):
        train(make(BestCheckpoint("held_out/f1"), evaluations=(Silent(),)), tmp_path)


def test_the_longer_name_of_two_evaluations_is_meant():
    short, long = Scripted(name="bound"), Scripted(name="bound/qa")
    assert BestCheckpoint("bound/qa/score").evaluation((short, long)) is long
    assert BestCheckpoint("bound/score").evaluation((short, long)) is short


@pytest.mark.parametrize(
    "changes",
    [
        dict(best=None),
        dict(best=BestCheckpoint("held_out/score", "min")),
        dict(evaluations=(Scripted((1.0, 2.0)), Scripted(name="probe"))),
        dict(evaluations=(Scripted(every=4),)),
    ],
)
def test_what_changes_the_choice_is_another_configuration(undisturbed, changes):
    with pytest.raises(ConfigError, match=r"another configuration: TrainRun\.best"):
        train(make(**changes), undisturbed[0])


def test_what_does_not_change_the_choice_may_change(undisturbed):
    workdir, result = undisturbed
    other = make(every=5, keep=7, evaluations=(Scripted(), Scripted(name="probe")))
    assert train(other, workdir).selected == result.selected


def test_a_best_checkpoint_that_was_removed_is_named(undisturbed, tmp_path):
    import shutil

    shutil.copytree(undisturbed[0], tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / FOLDER / "4")
    with pytest.raises(ConfigError, match="checkpoint of step 4, selected by held_out/score, is not in"):
        restore_params(tmp_path / "run")
    assert restore_params(tmp_path / "run", step=8)


def test_checkpoints_of_versions_without_selection_are_read(undisturbed, tmp_path):
    import shutil

    shutil.copytree(undisturbed[0], tmp_path / "run")
    meta = tmp_path / "run" / FOLDER / "8" / "meta" / "metadata"
    content = json.loads(meta.read_text())
    del content["best"]
    meta.write_text(json.dumps(content))
    assert selected(tmp_path / "run") is None
    assert equal(restore_params(tmp_path / "run"), restore_params(tmp_path / "run", step=8))
