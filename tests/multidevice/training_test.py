"""Training on eight (fake CPU) devices: loss, gradient and noise are those of one device, on every mesh."""

import dataclasses
import pathlib
import sys

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "unit" / "training"))

from training_stubs import AUTOREGRESSIVE, DIFFUSION, RaggedRows, nano, small_run

from diffusion_lm.architectures.lora import WithLoRA
from diffusion_lm.core.errors import ConfigError
from diffusion_lm.noise.weighting import Flat
from diffusion_lm.objectives.autoregressive import Autoregressive
from diffusion_lm.objectives.masked_diffusion import MaskedDiffusion
from diffusion_lm.objectives.mixture import ConstantFactor, Mixture
from diffusion_lm.parallel.mesh import MeshSpec
from diffusion_lm.parallel.rules import LogicalRules
from diffusion_lm.planning import programs
from diffusion_lm.training.checkpoint import CheckpointPolicy, restore_params
from diffusion_lm.training.loop import train
from diffusion_lm.training.optimizers import AdamW
from diffusion_lm.training.step import TrainStep

BATCH = RaggedRows().batch(0, 16)
MODEL = nano(num_heads=8, head_dim=4)
QUERY_OUTPUT_DOWN = (("attention", "query"), ("attention", "output"), ("mlp", "down"))


@dataclasses.dataclass(frozen=True)
class OneDevice(MeshSpec):
    """A mesh of the first of the eight devices."""

    def build(self, devices=None):
        return super().build(jax.devices()[:1])


ONE = OneDevice(data=1, fsdp=1)
MESHES = {
    "8x1": MeshSpec(data=1, fsdp=8),
    "4x2": MeshSpec(data=2, fsdp=2, tensor=2),
    "2x4": MeshSpec(data=2, fsdp=1, tensor=4),
    "1x8": MeshSpec(data=1, fsdp=1, tensor=8),
}


def _step(objective, mesh, microbatches=1, ema_decay=None, model=MODEL, batch=BATCH):
    """Returns the parameters, gradient moments and statistics after one step of Adam from fixed parameters."""
    train_step = TrainStep(
        model, objective, AdamW(), mesh, LogicalRules(), microbatches=microbatches, ema_decay=ema_decay
    ).shared()
    state = train_step.init(jax.random.key(7))
    state, stats = train_step(state, batch, jax.random.key(0), np.float32(1e-3))
    return state, jax.device_get(stats)


@pytest.fixture(scope="module")
def one_device():
    return {objective: _step(objective, ONE) for objective in (AUTOREGRESSIVE, DIFFUSION)}


def _assert_as_on_one_device(state, stats, expected):
    one_state, one_stats = expected
    np.testing.assert_allclose(stats.terms.loss, one_stats.terms.loss, rtol=2e-6)
    np.testing.assert_allclose(stats.grad_norm, one_stats.grad_norm, rtol=2e-5)
    assert stats.terms.weight == one_stats.terms.weight
    # Adam's first moment after one step is 0.1 x the clipped gradient (norm 1).
    gradient, one_gradient = state.opt_state[1].mu, one_state.opt_state[1].mu
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(one_gradient), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=1e-7)


@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
def test_T27_noise_depends_on_topology(mesh, one_device):
    """The corrupted tokens, hence loss and gradient, are those of one device: T10, T27 and T28 in one."""
    _assert_as_on_one_device(*_step(DIFFUSION, mesh), one_device[DIFFUSION])


def test_T28_tensor_parallel_ranks_disagree(one_device):
    """Ranks that share a batch must corrupt it alike: how many tokens came out right is equal to the last one."""
    _, stats = _step(DIFFUSION, MESHES["2x4"])
    _, expected = one_device[DIFFUSION]
    for name, mean in expected.terms.metrics.items():
        np.testing.assert_allclose(stats.terms.metrics[name].total, mean.total, rtol=1e-5, err_msg=name)
    accuracy = "prediction_accuracy"
    assert stats.terms.metrics[accuracy].total == expected.terms.metrics[accuracy].total


def test_T10_local_denominator_on_a_mesh_with_microbatches(one_device):
    """Ragged targets, eight devices, two microbatches: one division, by the global weight."""
    _assert_as_on_one_device(*_step(AUTOREGRESSIVE, MESHES["8x1"], microbatches=2), one_device[AUTOREGRESSIVE])


@pytest.mark.thorough
def test_parts_of_a_mixture_keep_their_global_weights_on_a_mesh_with_microbatches():
    """One part counts the replaced tokens, which differ from microbatch to microbatch and from device to device."""
    masked = MaskedDiffusion(weighting=Flat(), normaliser="replaced")
    mixed = Mixture(("a", "b"), (masked, Autoregressive()), (ConstantFactor(0.5), ConstantFactor(2.0)), "a")
    batch = RaggedRows(mask_id=4).batch(0, 16)
    state, stats = _step(mixed, MESHES["4x2"], microbatches=2, batch=batch)
    expected = _step(mixed, ONE, batch=batch)
    _assert_as_on_one_device(state, stats, expected)
    assert stats.terms.weights[0] < 0.8 * stats.terms.weights[1]


def test_the_state_is_sharded_by_the_rules():
    train_step = TrainStep(MODEL, AUTOREGRESSIVE, AdamW(), MESHES["4x2"], LogicalRules(), ema_decay=0.9)
    state = train_step.init(jax.random.key(0))
    up = P(None, "fsdp", "tensor")
    for tree in (state.params, state.opt_state[1].mu, state.opt_state[1].nu, state.ema):
        assert tree["blocks"]["mlp"]["up"].sharding.spec == up
    assert state.opt_state[1].count.sharding.spec == P()


def test_adapters_are_sharded_like_their_matrices_and_learn_the_same_on_every_mesh():
    """Also where a frozen matrix is split over devices that the gradient of its adapter is summed over."""
    model = WithLoRA(MODEL, rank=4, trained_too=("embed",))
    state, stats = _step(DIFFUSION, MESHES["4x2"], ema_decay=0.9, model=model)
    _assert_as_on_one_device(state, stats, _step(DIFFUSION, ONE, ema_decay=0.9, model=model))
    for tree in (state.params, state.opt_state[1].mu, state.opt_state[1].nu, state.ema):
        query, output, down = (tree["lora"]["blocks"][a][b] for a, b in QUERY_OUTPUT_DOWN)
        assert (query["a"].sharding.spec, query["b"].sharding.spec) == (P(None, "fsdp"), P(None, None, "tensor"))
        assert (output["a"].sharding.spec, output["b"].sharding.spec) == (P(None, "tensor"), P(None, None, "fsdp"))
        assert (down["a"].sharding.spec, down["b"].sharding.spec) == (P(None, "tensor"), P(None, None, "fsdp"))
    assert set(state.opt_state[1].mu) == {"embed", "lora"}


def test_a_run_may_continue_on_another_mesh(tmp_path):
    run = small_run(
        model=MODEL, objective=AUTOREGRESSIVE, batch_size=16, mesh=MESHES["8x1"], checkpoint=CheckpointPolicy(every=3)
    )
    undisturbed = train(dataclasses.replace(run, mesh=ONE), tmp_path / "one")

    @dataclasses.dataclass(frozen=True)
    class Stops(RaggedRows):
        fail_at: int | None = dataclasses.field(default=4, compare=False)

    with pytest.raises(OSError, match="disk"):
        train(dataclasses.replace(run, data=Stops()), tmp_path / "two")
    result = train(dataclasses.replace(run, data=Stops(fail_at=None), mesh=ONE), tmp_path / "two")
    for a, b in zip(jax.tree.leaves(result.params), jax.tree.leaves(undisturbed.params), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=2e-4)
    for a, b in zip(jax.tree.leaves(restore_params(tmp_path / "two")), jax.tree.leaves(result.params), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_a_batch_that_does_not_divide_by_the_mesh_is_one_sentence(tmp_path):
    with pytest.raises(ConfigError, match="a batch of 4 rows cannot be split over 8 devices"):
        train(small_run(mesh=MESHES["8x1"]), tmp_path)
    with pytest.raises(ConfigError, match="a microbatch of 4 rows cannot be split over 8 devices"):
        train(small_run(mesh=MESHES["8x1"], batch_size=16, microbatches=4), tmp_path)
    with pytest.raises(ConfigError, match="does not fit 8 devices"):
        train(small_run(mesh=MeshSpec(data=3, fsdp=1)), tmp_path)


@pytest.mark.parametrize("compiled", [programs.train, programs.bound])
def test_a_plan_refuses_it_before_compiling(compiled):
    run = dataclasses.replace(small_run(), mesh=MESHES["8x1"])
    found = compiled(run, jax.devices())
    assert found.executable is None
    assert "a batch of 4 rows cannot be split over 8 devices" in found.refusal
