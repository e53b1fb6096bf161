"""The noise rates that a time-conditioned network reads in each step, with caches and guidance too."""

import dataclasses

import jax
import jax.numpy as jnp
import model_stubs as stubs
import numpy as np
import pytest
from sampler_stubs import canvas, masked, without_ends

from diffusion_lm.architectures.base import BoundModel
from diffusion_lm.core.errors import ConfigError
from diffusion_lm.core.rng import StreamKeys
from diffusion_lm.noise.process import Uniform
from diffusion_lm.noise.schedules import Cosine
from diffusion_lm.samplers.caching import DualCache, PrefixCache
from diffusion_lm.samplers.speculation import SelfSpeculation
from diffusion_lm.samplers.uniform import UniformAncestral
from diffusion_lm.samplers.unmasking import AllSlots, Ancestral, Ranked

KEYS = StreamKeys.create(5)
PROMPT = without_ends(stubs.as_prompt(stubs.make_batch([2, 5, 3, 4], [8, 3, 6, 5], 11)))
TARGET = np.asarray(PROMPT.target_mask)
MODEL = stubs.nano(**stubs.QUICK, time_conditioning=True)
MASK = 4
MASKED = masked(Ranked(), steps=8, temperature=0.0)


@dataclasses.dataclass(frozen=True)
class Recording(BoundModel):
    """Records the inputs of each call."""

    calls: list = dataclasses.field(default_factory=list)

    def __call__(self, tokens, *, positions, time, **inputs):
        keep = lambda *x: self.calls.append(tuple(np.asarray(one) for one in x))  # noqa: E731
        jax.debug.callback(keep, tokens, positions, time)
        return super().__call__(tokens, positions=positions, time=time, **inputs)


def calls_of(sampler):
    model = Recording(MODEL.architecture, MODEL.params)
    jax.block_until_ready(sampler.generate(model, PROMPT, KEYS).tokens)
    jax.effects_barrier()
    return model.calls


def test_under_mask_noise_it_is_the_fraction_of_mask():
    calls = calls_of(MASKED)
    assert len(calls) > 3
    for tokens, _, time in calls:
        share = ((tokens == MASK) & TARGET).sum(axis=1) / TARGET.sum(axis=1)
        np.testing.assert_allclose(time, np.where(TARGET, share[:, None], 0.0), rtol=1e-6)
    assert (calls[0][2][TARGET] == 1).all()


def test_a_network_with_blocks_reads_the_rate_of_each_block():
    calls = calls_of(masked(Ranked(), block=3, temperature=0.0, visibility="blocks:3"))
    for tokens, _, time in calls:
        for row, first in enumerate(TARGET.argmax(axis=1)):
            end = first + TARGET[row].sum()
            for start in range(first, end, 3):
                block = slice(start, min(start + 3, end))
                np.testing.assert_allclose(time[row, block], (tokens[row, block] == MASK).mean(), rtol=1e-6)
    assert any(len(np.unique(time[0])) > 2 for *_, time in calls)


def test_a_rule_with_a_schedule_gives_the_rate_unless_blocks_are_the_samplers_own():
    ancestral = masked(Ancestral(), schedule=Cosine(), steps=4)
    rates = 1.0 - np.asarray(Cosine().alpha(jnp.float32([1.0, 0.75, 0.5, 0.25])))
    for _, _, time in calls_of(ancestral):
        assert all(any(np.isclose(value, [0.0, *rates], atol=1e-5)) for value in np.unique(time))
    for tokens, _, time in calls_of(masked(Ancestral(), schedule=Cosine(), block=4, steps=8)):
        share = ((tokens == MASK) & TARGET).sum(axis=1) / TARGET.sum(axis=1)
        np.testing.assert_allclose(time, np.where(TARGET, share[:, None], 0.0), rtol=1e-6)


@pytest.mark.parametrize(
    ("update", "rates"),
    [
        (AllSlots(), [1.0, 0.75, 0.5, 0.25]),
        (UniformAncestral(), 1.0 - np.asarray(Cosine().alpha(jnp.float32([1.0, 0.75, 0.5, 0.25])))),
    ],
    ids=["sundae", "posterior"],
)
def test_under_uniform_noise_it_is_the_time_of_the_step(update, rates):
    plain = canvas(update, process=Uniform(Cosine()), steps=4, candidates=2, exit_tolerance=None)
    calls = calls_of(plain)
    assert len(calls) == 4
    for (_, _, time), rate in zip(calls, rates, strict=True):
        np.testing.assert_allclose(time, np.where(np.repeat(TARGET, 2, axis=0), rate, 0.0), rtol=1e-5)


def test_later_blocks_are_noise_and_earlier_blocks_are_clean():
    plain = canvas(AllSlots(), steps=4, block=4, exit_tolerance=None)
    (first, *_, last) = calls_of(plain)
    place = np.cumsum(TARGET, axis=1) - 1
    long = TARGET.sum(axis=1) > 4
    assert (first[2][TARGET & (place >= 4)] == 1).all()
    assert not last[2][long][(TARGET & (place < 4))[long]].any()


@pytest.mark.parametrize("cache", [PrefixCache(programs=1), DualCache()], ids=["prefix", "dual"])
def test_cached_passes_read_the_time_of_their_slots(cache):
    cached = masked(Ranked(), steps=8, temperature=0.0, block=4, cache=cache)
    for tokens, positions, time in calls_of(cached):
        length = TARGET.shape[1]
        inside = np.minimum(positions, length - 1)
        target = np.take_along_axis(TARGET, inside, axis=1) & (positions < length)
        assert not time[~target & (positions < length)].any()
        assert (time[target & (tokens == MASK)] > 0).all()


def test_both_passes_of_guidance_read_the_same_time():
    calls = calls_of(dataclasses.replace(MASKED, guidance=0.5))
    rows = TARGET.shape[0]
    for _, _, time in calls:
        np.testing.assert_array_equal(time[:rows], time[rows:])
    zeros = jax.tree.map(jnp.zeros_like, MODEL.params["time_conditioning"])
    unconditioned = dataclasses.replace(MODEL, params=MODEL.params | {"time_conditioning": zeros})
    conditioned, plain = (MASKED.generate(model, PROMPT, KEYS).tokens for model in (MODEL, unconditioned))
    assert (np.asarray(conditioned) != np.asarray(plain)).any(), "the time changes the predictions"


def test_drafts_have_no_time():
    with pytest.raises(ConfigError, match="time-conditioned network"):
        SelfSpeculation().generate(MODEL, PROMPT, KEYS)
