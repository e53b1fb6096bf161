"""What a sampler tells a network that reads the time, step by step; caches and guidance hand it on."""

import dataclasses

import jax
import jax.numpy as jnp
import model_stubs as stubs
import numpy as np
import pytest

from diffusion_lm.architectures.base import BoundModel
from diffusion_lm.core.errors import ConfigError
from diffusion_lm.core.rng import StreamKeys
from diffusion_lm.noise.corruption import AbsorbingCorruption, UniformCorruption
from diffusion_lm.noise.schedules import Cosine
from diffusion_lm.samplers.caching import DualCache, PrefixCache
from diffusion_lm.samplers.commit import Ancestral, Everything, Ranked
from diffusion_lm.samplers.denoising import DenoisingSampler
from diffusion_lm.samplers.revision import UniformAncestral
from diffusion_lm.samplers.speculation import SelfSpeculation

KEYS = StreamKeys.create(5)
PROMPT = stubs.as_prompt(stubs.make_batch([2, 5, 3, 4], [8, 3, 6, 5], 11))
TARGET = np.asarray(PROMPT.target_mask)
MODEL = stubs.nano(**stubs.QUICK, time_conditioning=True)
MASK = 4
MASKED = DenoisingSampler(
    start=AbsorbingCorruption(MASK), commit=Ranked(), steps=8, candidates=1, temperature=0.0, eos_id=41, pad_id=42
)


@dataclasses.dataclass(frozen=True)
class Listening(BoundModel):
    """Keeps what each call read and was told."""

    heard: list = dataclasses.field(default_factory=list)

    def __call__(self, tokens, *, positions, time, **inputs):
        keep = lambda *x: self.heard.append(tuple(np.asarray(one) for one in x))  # noqa: E731
        jax.debug.callback(keep, tokens, positions, time)
        return super().__call__(tokens, positions=positions, time=time, **inputs)


def heard(sampler):
    model = Listening(MODEL.architecture, MODEL.params)
    jax.block_until_ready(sampler.generate(model, PROMPT, KEYS).tokens)
    jax.effects_barrier()
    return model.heard


def test_under_masks_it_is_the_share_that_is_left():
    calls = heard(MASKED)
    assert len(calls) > 3
    for tokens, _, time in calls:
        share = ((tokens == MASK) & TARGET).sum(axis=1) / TARGET.sum(axis=1)
        np.testing.assert_allclose(time, np.where(TARGET, share[:, None], 0.0), rtol=1e-6)
    assert (calls[0][2][TARGET] == 1).all()


def test_a_network_of_blocks_is_told_each_block_by_itself():
    calls = heard(dataclasses.replace(MASKED, block=3, steps=None, visibility="blocks:3"))
    for tokens, _, time in calls:
        for row, first in enumerate(TARGET.argmax(axis=1)):
            end = first + TARGET[row].sum()
            for start in range(first, end, 3):
                block = slice(start, min(start + 3, end))
                np.testing.assert_allclose(time[row, block], (tokens[row, block] == MASK).mean(), rtol=1e-6)
    assert any(len(np.unique(time[0])) > 2 for *_, time in calls)


def test_a_rule_with_a_schedule_says_it_itself_but_not_for_blocks_that_the_network_does_not_know():
    ancestral = dataclasses.replace(MASKED, commit=Ancestral(Cosine()), steps=4, temperature=1.0)
    rates = 1.0 - np.asarray(Cosine().alpha(jnp.float32([1.0, 0.75, 0.5, 0.25])))
    for _, _, time in heard(ancestral):
        assert all(any(np.isclose(value, [0.0, *rates], atol=1e-5)) for value in np.unique(time))
    for tokens, _, time in heard(dataclasses.replace(ancestral, block=4, steps=8)):
        share = ((tokens == MASK) & TARGET).sum(axis=1) / TARGET.sum(axis=1)
        np.testing.assert_allclose(time, np.where(TARGET, share[:, None], 0.0), rtol=1e-6)


@pytest.mark.parametrize(
    ("commit", "rates"),
    [
        (Everything(), [1.0, 0.75, 0.5, 0.25]),
        (UniformAncestral(Cosine()), 1.0 - np.asarray(Cosine().alpha(jnp.float32([1.0, 0.75, 0.5, 0.25])))),
    ],
    ids=["sundae", "posterior"],
)
def test_under_uniform_noise_it_is_the_clock(commit, rates):
    plain = DenoisingSampler(
        start=UniformCorruption(), commit=commit, steps=4, candidates=2, temperature=1.0, early_exit=False
    )
    calls = heard(plain)
    assert len(calls) == 4
    for (_, _, time), rate in zip(calls, rates, strict=True):
        np.testing.assert_allclose(time, np.where(np.repeat(TARGET, 2, axis=0), rate, 0.0), rtol=1e-5)


def test_blocks_to_come_are_noise_and_blocks_behind_are_clean():
    plain = DenoisingSampler(start=UniformCorruption(), steps=4, block=4, candidates=1, early_exit=False)
    (first, *_, last) = heard(plain)
    place = np.cumsum(TARGET, axis=1) - 1
    long = TARGET.sum(axis=1) > 4
    assert (first[2][TARGET & (place >= 4)] == 1).all()
    assert not last[2][long][(TARGET & (place < 4))[long]].any()


@pytest.mark.parametrize("cache", [PrefixCache(programs=1), DualCache()], ids=["prefix", "dual"])
def test_caches_hand_on_the_time_of_the_slots_that_they_read(cache):
    cached = dataclasses.replace(MASKED, block=4, cache=cache)
    for tokens, positions, time in heard(cached):
        length = TARGET.shape[1]
        inside = np.minimum(positions, length - 1)
        target = np.take_along_axis(TARGET, inside, axis=1) & (positions < length)
        assert not time[~target & (positions < length)].any()
        assert (time[target & (tokens == MASK)] > 0).all()


def test_guidance_tells_both_passes_and_does_not_change_what_one_says():
    calls = heard(dataclasses.replace(MASKED, guidance=0.5))
    rows = TARGET.shape[0]
    for _, _, time in calls:
        np.testing.assert_array_equal(time[:rows], time[rows:])
    deaf = jax.tree.map(jnp.zeros_like, MODEL.params["time_conditioning"])
    untold = dataclasses.replace(MODEL, params=MODEL.params | {"time_conditioning": deaf})
    told, plain = (MASKED.generate(model, PROMPT, KEYS).tokens for model in (MODEL, untold))
    assert (np.asarray(told) != np.asarray(plain)).any(), "the network listens"


def test_drafts_have_no_time():
    with pytest.raises(ConfigError, match="reads the time"):
        SelfSpeculation(mask_id=MASK).generate(MODEL, PROMPT, KEYS)
