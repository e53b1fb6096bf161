"""Runs that train adapters: what moves, what is kept for it, and what such a run leaves."""

import jax
import numpy as np
import pytest
from training_stubs import AUTOREGRESSIVE, DIFFUSION, ONE_DEVICE, RaggedRows, nano, small_run

from diffusion_lm.architectures.lora import WithLoRA
from diffusion_lm.core.rng import StreamKeys
from diffusion_lm.parallel.rules import LogicalRules
from diffusion_lm.training import metrics
from diffusion_lm.training.checkpoint import restore_params
from diffusion_lm.training.loop import train
from diffusion_lm.training.optimizers import Adafactor, AdamW, Muon
from diffusion_lm.training.partial import rejoined, trained_part
from diffusion_lm.training.schedules import Constant
from diffusion_lm.training.step import TrainStep

PLAIN = nano(num_layers=1, scan_layers=False)
ADAPTED = WithLoRA(PLAIN, rank=4, targets=("query", "value", "mlp"))
WITH_EMBED = WithLoRA(PLAIN, rank=4, targets=("query",), trained_too=("embed",))
KEY = StreamKeys.create(0).key("init")


def names(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in leaves}


def train_step_of(model, optimizer=None, **options):
    optimizer = AdamW(schedule=Constant(1e-2), weight_decay=0.5) if optimizer is None else optimizer
    return TrainStep(model, DIFFUSION, optimizer, ONE_DEVICE, LogicalRules(), **options).shared()


def run_steps(train_step, count, batch_size=4):
    state = train_step.init(KEY)
    before = names(state.params)
    for step in range(count):
        batch = RaggedRows().batch(step, batch_size)
        state, stats = train_step(state, batch, jax.random.key(0), np.float32(1e-2))
    return before, state, stats


@pytest.mark.parametrize(
    "optimizer",
    [
        None,
        pytest.param(Muon(), marks=pytest.mark.thorough),
        pytest.param(Adafactor(), marks=pytest.mark.thorough),
    ],
    ids=["adamw", "muon", "adafactor"],
)
def test_only_adapters_move_and_only_they_have_state(optimizer):
    train_step = train_step_of(ADAPTED, optimizer, ema_decay=0.9)
    before, state, _ = run_steps(train_step, 3)
    after, mean, frozen = names(state.params), names(state.ema), ADAPTED.frozen_arrays()
    for name, value in before.items():
        moved = (after[name] != value).any()
        assert moved == (name not in frozen), name
        if name in frozen:
            np.testing.assert_array_equal(mean[name], value)
    sizes = {name: leaf.size for name, leaf in names(state.opt_state).items()}
    assert not [name for name in sizes if "embed" in name or "relative_bias" in name]
    trained = sum(leaf.size for name, leaf in before.items() if name not in frozen)
    assert sum(sizes.values()) <= 2 * trained + 4 * len(before)


def test_named_arrays_are_trained_along():
    before, state, _ = run_steps(train_step_of(WITH_EMBED), 2)
    moved = {name for name, value in names(state.params).items() if (value != before[name]).any()}
    assert moved == {"embed/tokens", "lora/blocks/attention/query/a", "lora/blocks/attention/query/b"}


def test_the_gradient_is_that_of_the_trained_arrays_and_microbatches_change_nothing():
    whole, parts = (run_steps(train_step_of(ADAPTED, microbatches=count), 2, batch_size=8) for count in (1, 4))
    for name, value in names(whole[1].params).items():
        np.testing.assert_allclose(names(parts[1].params)[name], value, atol=2e-6, err_msg=name)
    everything = run_steps(train_step_of(PLAIN), 1)[2].grad_norm
    adapters = run_steps(train_step_of(ADAPTED), 1)[2].grad_norm
    assert 0 < adapters < 0.9 * everything


def test_trained_part_and_rejoined_are_inverse():
    whole = {"a": {"x": 1, "y": 2}, "b": {"z": {"w": 3}}, "c": 4}
    part = trained_part(whole, frozenset({"a/x", "b/z/w"}))
    assert part == {"a": {"y": 2}, "c": 4}
    assert rejoined(whole, {"a": {"y": 20}, "c": 40}) == {"a": {"x": 1, "y": 20}, "b": {"z": {"w": 3}}, "c": 40}
    assert trained_part(whole, frozenset()) is whole


@pytest.mark.thorough
def test_from_an_ar_run_to_adapters_to_a_plain_network(tmp_path):
    """An AR run, a diffusion run of adapters on it that is interrupted, and the merged network as a run of 0 steps."""
    train(small_run(model=PLAIN, objective=AUTOREGRESSIVE, steps=2), tmp_path / "ar")
    run = small_run(model=ADAPTED, steps=4, initial=str(tmp_path / "ar"))
    result = train(run, tmp_path / "adapted")
    assert {name for name in result.report.added if not name.startswith("lora/")} == set()
    assert result.report.dropped == ()
    before, after = names(restore_params(tmp_path / "ar")), names(restore_params(tmp_path / "adapted"))
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value)
    assert after["lora/blocks/mlp/up/b"].any()
    assert train(run, tmp_path / "adapted").report is None
    merged = train(small_run(model=PLAIN, steps=0, initial=str(tmp_path / "adapted")), tmp_path / "merged")
    assert len(merged.report.merged) == 5
    assert (np.asarray(merged.params["blocks"]["mlp"]["up"]) != before["blocks/mlp/up"]).any()
    np.testing.assert_array_equal(merged.params["embed"]["tokens"], before["embed/tokens"])


def test_training_flops_leave_out_the_gradient_of_frozen_matrices():
    plain, adapted = (metrics.train_flops_per_token(model, DIFFUSION, 16, None) for model in (PLAIN, ADAPTED))
    passes = DIFFUSION.needs().passes
    forward = ADAPTED.flops_per_token(16)
    assert adapted == passes * (3 * forward - ADAPTED.saved_flops_per_token(16))
    assert adapted < 0.85 * plain
