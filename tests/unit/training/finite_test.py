"""A network that holds NaN or Inf is never resumed, trained further, saved or read: one sentence names the tensors."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training_stubs import AUTOREGRESSIVE, RaggedRows, SumOfParameters, small_run

from diffusion_lm.core.errors import ConfigError
from diffusion_lm.training import card, finite
from diffusion_lm.training.checkpoint import Checkpointer, CheckpointPolicy, finished_steps, restore_params, save_params
from diffusion_lm.training.loop import train
from diffusion_lm.training.step import TrainStep
from diffusion_lm.training.trained import trained_model

NAME = "final_norm/scale"


def poisoned(params, value=np.nan):
    return {**params, "final_norm": {"scale": params["final_norm"]["scale"].at[3].set(value)}}


@pytest.fixture(scope="module")
def run():
    return small_run(objective=AUTOREGRESSIVE, steps=3, checkpoint=CheckpointPolicy(every=2), evaluations=())


@pytest.fixture(scope="module")
def broken(run, tmp_path_factory):
    """The folder of a run that was stopped after step 2, whose state then got a NaN."""
    workdir = tmp_path_factory.mktemp("broken")
    with pytest.raises(OSError, match="disk"):
        train(dataclasses.replace(run, data=FailingRows(fail_at=2)), workdir)
    with Checkpointer(workdir, CheckpointPolicy(keep=1)) as checkpoints:
        state, progress = checkpoints.restore(run.train_step().abstract_state)
        state = dataclasses.replace(state, params=poisoned(state.params))
        checkpoints._manager.delete(2)
        checkpoints.save(state, progress)
    return workdir


@dataclasses.dataclass(frozen=True)
class FailingRows(RaggedRows):
    fail_at: int | None = dataclasses.field(default=None, compare=False)


def test_resuming_names_the_tensor(run, broken):
    with pytest.raises(ConfigError, match=rf"checkpoints/2 holds NaN or Inf in 1 of \d+ tensors: {NAME}"):
        train(dataclasses.replace(run, data=FailingRows()), broken)


@pytest.mark.parametrize("way", ["initial", "memory", "trained_model", "restore_params"])
def test_starting_from_it_and_reading_it_name_the_tensor(run, broken, tmp_path, way):
    ways = {
        "initial": lambda: train(dataclasses.replace(run, initial=str(broken)), tmp_path),
        "memory": lambda: train(run, tmp_path, init_params=poisoned(run.train_step().init(jax.random.key(0)).params)),
        "trained_model": lambda: trained_model(run, broken),
        "restore_params": lambda: restore_params(broken),
    }
    with pytest.raises(ConfigError, match=rf"NaN or Inf in 1 of \d+ tensors: {NAME}"):
        ways[way]()
    assert finished_steps(tmp_path) == []


def test_parameters_that_are_to_be_written_as_a_run_folder(run, tmp_path):
    """What `import` does with a checkpoint from elsewhere."""
    params = poisoned(run.train_step().init(jax.random.key(0)).params, np.inf)
    with pytest.raises(ConfigError, match=NAME):
        save_params(tmp_path, params)
    assert finished_steps(tmp_path) == []


@pytest.mark.parametrize("evaluations", [(), (SumOfParameters(),)])
def test_an_update_that_breaks_the_network_is_not_saved_as_the_result(run, tmp_path, monkeypatch, evaluations):
    """The loss of the last step was finite: it is that of the parameters before the update."""

    def breaking(self, state, batch, root, learning_rate):
        state, stats = self.compiled(state, batch, root, learning_rate)
        return dataclasses.replace(state, params=poisoned(state.params)), stats

    monkeypatch.setattr(TrainStep, "__call__", breaking)
    one = dataclasses.replace(run, steps=1, evaluations=evaluations)
    with pytest.raises(ConfigError, match=rf"after step 1 .*{NAME}.*learning rate"):
        train(one, tmp_path)
    assert finished_steps(tmp_path) == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_both_ways_of_looking_agree(dtype, value):
    """On the host where arrays are there already, on the devices otherwise."""
    tree = {
        "good": jnp.linspace(-3e4, 3e4, 12).astype(dtype).reshape(3, 4),
        "bad": jnp.zeros((2, 3), dtype).at[1, 2].set(value),
        "empty": jnp.zeros((0, 4), dtype),
        "counts": jnp.arange(4),
    }
    leaves = jax.tree.leaves(tree)
    assert finite.not_finite(tree) == ("bad",)
    assert np.asarray(finite.on_devices(leaves)).tolist() == finite.on_host(leaves) == [False, True, True, True]


def test_many_tensors_are_counted_and_the_first_are_named():
    tree = {f"w{number}": jnp.full(2, np.nan) for number in range(5)} | {"ok": jnp.ones(2)}
    with pytest.raises(ConfigError, match=r"NaN or Inf in 5 of 6 tensors: w0, w1, w2 and 2 more \(here\)\. Do this\."):
        finite.require_finite(tree, "it holds", where="here", fix="Do this.")


@dataclasses.dataclass(frozen=True)
class Clip:
    at: float


def test_a_card_keeps_numbers_that_json_does_not_have():
    """Two configurations that differ in them differ, and the card is JSON."""
    assert [card.plain(Clip(value))["at"] for value in (np.inf, -np.inf, np.nan, 1.0)] == ["inf", "-inf", "nan", 1.0]
    assert len({card.fingerprint(Clip(value)) for value in (np.inf, -np.inf, np.nan, 1.0)}) == 4
