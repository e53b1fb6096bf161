"""The loop: resume bit for bit, order of hooks, preemption, finished runs, initial parameters, the log."""

import dataclasses
import gzip
import json
import os
import shutil
import signal
import time

import jax
import numpy as np
import pytest
from training_stubs import AUTOREGRESSIVE, VOCAB, RaggedRows, SumOfParameters, nano, small_run

from diffusion_lm.architectures.exponents import WithTokenSchedules
from diffusion_lm.core.errors import ConfigError
from diffusion_lm.objectives.masked_diffusion import MaskedDiffusion
from diffusion_lm.objectives.sundae import Sundae
from diffusion_lm.objectives.token_schedules import TokenSchedules
from diffusion_lm.training.checkpoint import Checkpointer, CheckpointPolicy, finished_steps, restore_params
from diffusion_lm.training.hooks import RESTART_EXIT_CODE, Preempted
from diffusion_lm.training.imported import check_mask
from diffusion_lm.training.loop import train
from diffusion_lm.training.optimizers import AdamW
from diffusion_lm.training.schedules import Constant
from diffusion_lm.training.step import TrainStep

MASKED = MaskedDiffusion()
FED_BACK = Sundae(unrolls=0, self_conditioning=0.5)
SCHEDULED = TokenSchedules()


def rows(workdir):
    """The log without what is measured by the clock."""
    found = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "timing"} for row in found]


def assert_equal(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A whole run and its folder; everything else is compared with it."""
    run = small_run(evaluations=(SumOfParameters(every=3),), checkpoint=CheckpointPolicy(every=3), ema_decay=0.9)
    workdir = tmp_path_factory.mktemp("undisturbed")
    return run, workdir, train(run, workdir)


@dataclasses.dataclass(frozen=True)
class FailingRows(RaggedRows):
    """Rows whose reading fails at one batch; equal to rows that do not fail."""

    fail_at: int | None = dataclasses.field(default=None, compare=False)


def test_rows_of_the_log(undisturbed):
    run, workdir, result = undisturbed
    found = rows(workdir)
    assert [(row["step"], row["kind"]) for row in found] == [
        (2, "train"), (3, "evaluation"), (4, "train"), (6, "train"), (6, "evaluation"),
    ]  # fmt: skip
    last = found[3]
    assert last["examples"] == 24
    assert last["tokens"] == sum((run.data.batch(i, 4).segment_ids > 0).sum() for i in range(6))
    assert last["learning_rate"] == run.optimizer.schedule.value(5, 6)
    assert {"loss", "grad_norm", "nll_per_real_token", "unrolled_nll_per_real_token"} <= set(last)
    assert result.metrics == {k: v for k, v in (last | found[4]).items() if k not in ("step", "kind")}
    timing = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[0])["timing"]
    assert {"tokens_per_second", "data_wait_s", "mfu"} <= set(timing)


def test_evaluations_see_the_moving_average(undisturbed):
    _, _, result = undisturbed
    total = sum(np.abs(np.asarray(leaf)).sum() for leaf in jax.tree.leaves(result.params))
    assert result.metrics["probe/loss"] == pytest.approx(total)


@pytest.mark.parametrize("fail_at", [0, 4, 5])
def test_T29_resume_changes_noise(undisturbed, tmp_path, fail_at):
    """A run that dies and is started again writes the same log and ends with the same bits."""
    run, workdir, result = undisturbed
    with pytest.raises(OSError, match="disk"):
        train(dataclasses.replace(run, data=FailingRows(fail_at=fail_at)), tmp_path)
    again = train(dataclasses.replace(run, data=FailingRows()), tmp_path)
    assert_equal(again.params, result.params)
    assert rows(tmp_path) == rows(workdir)
    assert again.metrics == result.metrics


def test_a_finished_run_returns_at_once(undisturbed):
    """Without reading data, compiling or writing; the parameters come from the checkpoint."""
    run, workdir, result = undisturbed
    before = (workdir / "metrics.jsonl").read_bytes()
    again = train(dataclasses.replace(run), workdir, init_params=lambda: pytest.fail("not needed"))
    assert_equal(again.params, result.params)
    assert again.metrics == result.metrics
    assert (workdir / "metrics.jsonl").read_bytes() == before


def test_a_folder_with_more_steps_than_the_run_is_an_error(undisturbed):
    run, workdir, _ = undisturbed
    constant = dataclasses.replace(run.optimizer, schedule=Constant(1e-2))
    with pytest.raises(ConfigError, match=r"another configuration: TrainRun.optimizer.schedule is Cosine there"):
        train(dataclasses.replace(run, optimizer=constant), workdir)


@dataclasses.dataclass(frozen=True)
class Terminator:
    """Sends SIGTERM to this very process when it is evaluated."""

    at: int
    name: str = "terminator"
    every: int = 1

    def run(self, model, step):
        if step == self.at:
            os.kill(os.getpid(), signal.SIGTERM)
        return {}


def test_preemption_saves_and_asks_to_be_started_again(undisturbed, tmp_path):
    run, workdir, result = undisturbed
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Preempted) as stopped:
        train(dataclasses.replace(run, evaluations=(Terminator(at=2), SumOfParameters(every=3))), tmp_path)
    assert stopped.value.code == RESTART_EXIT_CODE
    assert stopped.value.step == 3
    assert finished_steps(tmp_path) == [3]
    assert signal.getsignal(signal.SIGTERM) is handler
    assert [row["step"] for row in rows(tmp_path) if row["kind"] == "evaluation" and "probe/loss" in row] == []
    # The evaluation that was due at step 3 was left to the run that continues.
    again = train(run, tmp_path)
    assert_equal(again.params, result.params)
    assert [row for row in rows(tmp_path) if row.keys() != {"step", "kind"}] == rows(workdir)


def test_steps_0_leaves_the_network_as_it_was_initialised(tmp_path):
    run = small_run(steps=0, evaluations=(SumOfParameters(),))
    result = train(run, tmp_path)
    assert finished_steps(tmp_path) == [0]
    assert_equal(restore_params(tmp_path), result.params)
    assert [row["kind"] for row in rows(tmp_path)] == ["evaluation"]
    trained = train(small_run(steps=1), tmp_path / "other")
    assert not np.array_equal(result.params["final_norm"]["scale"], trained.params["final_norm"]["scale"])


def test_initial_parameters_from_a_run_folder_from_memory_and_from_a_function(undisturbed, tmp_path):
    _, workdir, result = undisturbed
    run = small_run(steps=1)
    ways = [
        train(dataclasses.replace(run, initial=str(workdir)), tmp_path / "path"),
        train(run, tmp_path / "memory", init_params=result.params),
        train(run, tmp_path / "function", init_params=lambda: result.params),
    ]
    for other in ways[1:]:
        assert_equal(other.params, ways[0].params)
    assert ways[0].report is not None
    assert ways[0].report.added == ways[0].report.dropped == ()
    assert not np.array_equal(
        train(run, tmp_path / "fresh").params["embed"]["tokens"], ways[0].params["embed"]["tokens"]
    )
    assert all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(result.params)), "donated by mistake"


def test_a_checkpoint_gets_the_layer_that_reads_predictions_and_trains_it(undisturbed, tmp_path):
    _, workdir, _ = undisturbed
    run = small_run(steps=2, model=nano(self_conditioning=True), objective=FED_BACK, initial=str(workdir))
    result = train(run, tmp_path)
    assert set(result.report.added) == {
        f"self_conditioning/{name}" for name in ("mlp/down", "mlp/gate", "mlp/up", "norm/scale")
    }
    down = np.asarray(result.params["self_conditioning"]["mlp"]["down"])
    assert np.isfinite(down).all()
    assert down.any(), "it begins at zero"


def test_a_checkpoint_gets_exponents_and_trains_them(undisturbed, tmp_path):
    _, workdir, _ = undisturbed
    parts = {"model": WithTokenSchedules(nano()), "objective": SCHEDULED, "data": RaggedRows(mask_id=1)}
    run = small_run(steps=2, initial=str(workdir), **parts)
    result = train(run, tmp_path)
    assert result.report.added == ("exponents/raw",)
    found = np.asarray(result.params["exponents"]["raw"])
    assert np.isfinite(found).all()
    assert np.ptp(found[:VOCAB]) > 1e-3, "all begin alike"


def test_another_mask_than_that_of_an_imported_diffusion_model_is_refused(undisturbed, tmp_path):
    _, workdir, _ = undisturbed
    folder = tmp_path / "imported"
    shutil.copytree(workdir, folder)
    run = small_run(steps=1, initial=str(folder), objective=MASKED, data=RaggedRows(mask_id=3))
    (folder / "import.json").write_text(json.dumps({"diffusion": {"mask_id": 5}}))
    with pytest.raises(ConfigError, match="trained with MASK = 5, and MASK of the data's vocabulary is 3"):
        train(run, tmp_path / "refused")
    for facts in ({"diffusion": {"mask_id": 3}}, {"diffusion": {"mask_id": None}}, {"diffusion": None}):
        (folder / "import.json").write_text(json.dumps(facts))
        check_mask(folder, run.data.specials)


def test_a_run_without_a_horizon_in_its_schedule_may_be_prolonged(tmp_path):
    run = small_run(steps=2, optimizer=AdamW(schedule=Constant(1e-2)))
    train(run, tmp_path / "short")
    longer = train(dataclasses.replace(run, steps=4), tmp_path / "short")
    assert_equal(longer.params, train(dataclasses.replace(run, steps=4), tmp_path / "long").params)
    assert rows(tmp_path / "short") == rows(tmp_path / "long")
    with pytest.raises(ConfigError, match=r"steps=2: .* has already been trained for 4 steps"):
        train(run, tmp_path / "short")


def test_a_loss_that_is_not_finite_stops_the_run_with_a_sentence(tmp_path):
    optimizer = AdamW(schedule=Constant(1e30), clip_norm=None)
    run = small_run(objective=AUTOREGRESSIVE, optimizer=optimizer, checkpoint=CheckpointPolicy(every=1))
    with pytest.raises(ConfigError, match=r"of step \d is (nan|inf).*Lower the learning rate"):
        train(run, tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(data=RaggedRows(vocab_size=VOCAB + 1)), "vocab_size=40: the vocabulary of the data has 41 tokens"),
        (dict(model=nano(position="learned", max_positions=8)), "max_positions=8: the rows of the data have 16 tokens"),
        (dict(objective=MASKED), "needs a MASK token, and the vocabulary of the data has none"),
        (dict(objective=SCHEDULED, data=RaggedRows(mask_id=1)), "the network has no exponents"),
        (dict(objective=FED_BACK), "needs a network that reads its predictions"),
        (dict(initial="/nowhere/at/all"), "no checkpoint in /nowhere/at/all"),
    ],
)
def test_what_does_not_fit_is_one_sentence(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        train(small_run(**changes), tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(batch_size=4, microbatches=3), "microbatches=3: must divide batch_size=4"),
        (dict(steps=-1), "steps=-1"),
        (dict(batch_size=2.0), "batch_size=2.0"),
        (dict(ema_decay=1.0), "ema_decay=1.0"),
        (dict(profile=(3,)), r"profile=\(3,\)"),
        (dict(steps=4, profile=(4, 1)), "begins after the last of 4 steps"),
        (dict(xla_options=("fast",)), "xla_options='fast': there is no such set"),
        (dict(evaluations=[SumOfParameters(), SumOfParameters(every=2)]), "two evaluations have the same name"),
        (dict(objective=[1]), "list cannot be hashed"),
    ],
)
def test_wrong_fields_are_refused_when_the_run_is_made(changes, message):
    with pytest.raises(ConfigError, match=message):
        small_run(**changes)


def test_a_step_moves_nothing_but_its_learning_rate(undisturbed, tmp_path, monkeypatch):
    run, _, result = undisturbed

    def guarded(self, state, batch, root, learning_rate):
        learning_rate = jax.device_put(learning_rate)  # the only number that the host computes in each step
        with jax.transfer_guard("disallow"):
            return self.compiled(state, batch, root, learning_rate)

    monkeypatch.setattr(TrainStep, "__call__", guarded)
    assert_equal(train(run, tmp_path).params, result.params)
    train_step, key = run.train_step(), jax.random.key(0)
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        train_step(train_step.init(key), run.data.batch(0, run.batch_size), key, np.float32(0))


def test_the_log_says_how_long_a_checkpoint_held_up_the_run(tmp_path, monkeypatch):
    save = Checkpointer.save

    def slow(self, state, progress):
        time.sleep(0.05)
        save(self, state, progress)

    monkeypatch.setattr(Checkpointer, "save", slow)
    train(small_run(steps=4, log_every=2, checkpoint=CheckpointPolicy(every=2)), tmp_path)
    timings = [json.loads(line)["timing"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert timings[0]["checkpoint_s"] == 0
    assert timings[1]["checkpoint_s"] >= 0.05


def test_a_window_of_steps_is_traced_and_changes_nothing(undisturbed, tmp_path):
    run, _, result = undisturbed
    traced = dataclasses.replace(run, profile=(2, 2), xla_options=("overlap_collectives",))
    assert_equal(train(traced, tmp_path / "run").params, result.params)
    found = list((tmp_path / "run" / "profile").rglob("*.trace.json.gz"))
    assert len(found) == 1
    names = {event.get("name") for event in json.loads(gzip.decompress(found[0].read_bytes()))["traceEvents"]}
    assert "train" in names, "the steps are marked"
    assert json.loads((tmp_path / "run" / "run_card.json").read_text())["xla_options"] == {}, "none for a CPU"


def test_a_trace_of_the_last_steps_ends_with_the_run(tmp_path):
    run = small_run(steps=2, profile=(1, 5))
    train(run, tmp_path)
    assert list((tmp_path / "profile").rglob("*.trace.json.gz"))


def test_lists_become_tuples():
    assert small_run(evaluations=[SumOfParameters()]).evaluations == (SumOfParameters(),)


def test_data_that_was_made_anew_is_another_configuration(tmp_path):
    @dataclasses.dataclass(frozen=True)
    class Files(RaggedRows):
        count: int = dataclasses.field(default=7, compare=False)

        @property
        def manifests(self):
            return ({"task": "files", "count": self.count},)

    train(small_run(steps=0, data=Files()), tmp_path)
    with pytest.raises(ConfigError, match=r"another configuration: TrainRun\.manifests"):
        train(small_run(steps=0, data=Files(count=8)), tmp_path)
