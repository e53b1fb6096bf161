"""What a network that reads the time is told in training, in bounds and by estimators: each slot's rate of noise."""

import dataclasses

import jax
import jax.numpy as jnp
import model_stubs as stubs
import numpy as np
import pytest

from diffusion_lm.architectures.base import BoundModel
from diffusion_lm.core.rng import StreamKeys
from diffusion_lm.evaluation.scoring_estimators import ExactAutoregressive, LeftToRight
from diffusion_lm.noise.process import Absorbing, Uniform
from diffusion_lm.noise.schedules import Cosine
from diffusion_lm.objectives.autoregressive import Autoregressive
from diffusion_lm.objectives.block_diffusion import BlockDiffusion
from diffusion_lm.objectives.masked_diffusion import MaskedDiffusion
from diffusion_lm.objectives.sundae import Sundae
from diffusion_lm.objectives.uniform_diffusion import UniformDiffusion

KEYS = StreamKeys.create(1, 3)
BATCH = stubs.make_batch([3, 4, 2, 3], [6, 5, 7, 6], 10)
TARGET = np.asarray(BATCH.target_mask)
MASK = stubs.SPECIAL.mask


@dataclasses.dataclass(frozen=True)
class Listening(BoundModel):
    """Keeps what each forward pass read and was told."""

    heard: list = dataclasses.field(default_factory=list)

    def __call__(self, tokens, *, time=None, **inputs):
        told = jnp.full(tokens.shape, -1.0) if time is None else time
        jax.debug.callback(lambda *x: self.heard.append(tuple(np.asarray(one) for one in x)), tokens, told)
        return super().__call__(tokens, time=time, **inputs)


def heard(run, **changes):
    plain = stubs.nano(**stubs.QUICK, **{"time_conditioning": True} | changes)
    model = Listening(plain.architecture, plain.params)
    jax.block_until_ready(run(model))
    jax.effects_barrier()
    return model.heard


@pytest.mark.parametrize("unrolls", [0, 1])
def test_denoising_tells_the_rate_at_target_slots_in_every_pass(unrolls):
    objective = Sundae(Uniform(Cosine()), unrolls=unrolls)
    t = objective.time.draw(KEYS, BATCH.example_ids)
    passes = heard(lambda model: objective.loss(model, BATCH, KEYS).loss_sum)
    assert len(passes) == 1 + unrolls
    expected = np.where(TARGET, 1.0 - np.asarray(Cosine().alpha(t)), 0.0)
    assert expected[TARGET].min() > 0
    for _, time in passes:
        np.testing.assert_allclose(time, expected, rtol=1e-6)


def test_the_bound_of_masks_tells_its_own_mask_rates_and_not_the_schedule_of_training():
    objective = MaskedDiffusion(Absorbing(Cosine()))
    passes = heard(lambda model: objective.bound(model, BATCH, KEYS).loss_sum)
    found = sorted(float(time[TARGET].mean()) for _, time in passes)
    assert len(found) == objective.evaluation_draws
    for tokens, time in passes:
        share = ((tokens == MASK) & TARGET).sum(axis=1) / TARGET.sum(axis=1)
        np.testing.assert_allclose(time, np.where(TARGET, share[:, None], 0.0), rtol=1e-6)
    assert found[0] < 0.4 < 0.6 < found[-1]


def test_uniform_noise_tells_one_minus_the_signal():
    objective = UniformDiffusion(Uniform(Cosine()))
    t = objective.time.draw(KEYS, BATCH.example_ids, strata=BATCH.strata)
    ((_, time),) = heard(lambda model: objective.loss(model, BATCH, KEYS).loss_sum)
    np.testing.assert_allclose(time, np.where(TARGET, 1.0 - np.asarray(Cosine().alpha(t)), 0.0), rtol=1e-5)


def test_blocks_are_told_their_own_share_of_masks_and_the_clean_copy_nothing():
    objective = BlockDiffusion(block_size=3)
    length = BATCH.tokens.shape[1]
    ((tokens, time),) = heard(lambda model: objective.loss(model, BATCH, KEYS).loss_sum)
    assert not time[:, length:].any()
    noisy = tokens[:, :length] == MASK
    for row, first in enumerate(TARGET.argmax(axis=1)):
        count = TARGET[row].sum()
        for start in range(first, first + count, 3):
            block = slice(start, min(start + 3, first + count))
            np.testing.assert_allclose(time[row, block], noisy[row, block].mean(), rtol=1e-6)
        assert not time[row, :first].any()
    assert len(np.unique(time[:, :length])) > 2


def test_a_network_without_the_layer_is_told_nothing_and_an_autoregressive_pass_neither():
    for run, changes in (
        (lambda model: Sundae().loss(model, BATCH, KEYS).loss_sum, {"time_conditioning": False}),
        (lambda model: Autoregressive().loss(model, BATCH, KEYS).loss_sum, {}),
    ):
        assert all((time == -1).all() for _, time in heard(run, **changes))


def test_estimators_tell_the_share_of_masks():
    level = jnp.zeros(BATCH.tokens.shape[0])
    passes = heard(lambda model: LeftToRight().nll(model, BATCH, KEYS, level))
    assert len(passes) == TARGET.sum(axis=1).max()
    for tokens, time in passes:
        share = ((tokens == MASK) & TARGET).sum(axis=1) / TARGET.sum(axis=1)
        np.testing.assert_allclose(time, np.where(TARGET, share[:, None], 0.0), rtol=1e-6)
    ((_, time),) = heard(lambda model: ExactAutoregressive().nll(model, BATCH, KEYS, level))
    assert not np.maximum(time, 0).any()
