"""The samplers of a speed study run every step and fill the window, whatever the network predicts."""

import model_stubs as stubs
import numpy as np
import pytest
import sampler_stubs as samplers

from diffusion_lm.core.rng import StreamKeys
from diffusion_lm.core.special import SpecialTokens
from diffusion_lm.evaluation.speed import SpeedArm, random_prompt
from diffusion_lm.samplers.beam import BeamSearch
from diffusion_lm.samplers.counts import Fixed
from diffusion_lm.samplers.length_beam import LengthBeam
from diffusion_lm.samplers.stopping import LowEntropy, StableAndSure
from diffusion_lm.samplers.uniform import Renoised
from diffusion_lm.samplers.unmasking import Ranked, Threshold

KEYS = StreamKeys.create(0)
MODEL = stubs.nano(**stubs.QUICK)
WINDOW = 6
# All tokens but two and MASK end a target, so nearly every draw is an end.
SPECIAL = SpecialTokens(stubs.VOCAB, mask_id=4, other_eos_ids=tuple(range(5, stubs.VOCAB)))
# One token everywhere: canvases are at a fixed point after a step, and text repeats itself.
REPEATS = stubs.table_model(np.where(np.arange(stubs.VOCAB) == 2, 50.0, np.zeros((9, 1))))
ONE = Ranked(count=Fixed(1))
# The sampler and its forward passes, where they do not depend on the drafts.
SAMPLERS = {
    "autoregressive": (samplers.left_to_right(temperature=1.0), WINDOW),
    "beam": (BeamSearch(beams=2), 1 + 2 * (WINDOW - 1)),
    "speculative": (samplers.speculative(draft=3), None),
    "canvas": (samplers.sundae(steps=40, candidates=2, temperature=0.0), 80),
    "canvas_stop": (samplers.canvas(Renoised(), steps=40, stop=StableAndSure(9.0)), 40),
    "masked_stop": (samplers.masked(ONE, end="stop"), WINDOW),
    "masked_low_entropy": (samplers.masked(ONE, block=2, stop=LowEntropy(0.69, 2, drop=False)), WINDOW),
    "length_beam": (LengthBeam(samplers.masked(ONE, end="stop"), beam=1, lengths="window", closing=False), WINDOW),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_an_arm_of_any_sampler_fills_its_window(name):
    sampler, passes = SAMPLERS[name]
    model = REPEATS if name in ("canvas", "canvas_stop", "masked_low_entropy") else MODEL
    prompt = random_prompt(MODEL.architecture, 2, 3, WINDOW).replace(special=SPECIAL)
    arm = SpeedArm("arm", "any", MODEL.architecture, sampler)
    full, early = (stubs.generate(one, model, prompt, KEYS) for one in (arm.sampler, sampler))
    assert full.forward_passes[0] > early.forward_passes[0], "the sampler itself ends early here"
    if passes is None:
        np.testing.assert_array_equal(full.lengths, WINDOW)
    else:
        np.testing.assert_array_equal(full.forward_passes, passes)


def test_parallel_decoding_is_no_early_end():
    """A rule that unmasks several tokens at once takes fewer passes; that is what a speed study measures."""
    sampler = samplers.masked(Threshold(0.0))
    arm = SpeedArm("arm", "any", MODEL.architecture, sampler)
    prompt = random_prompt(MODEL.architecture, 1, 3, WINDOW)
    assert stubs.generate(arm.sampler, MODEL, prompt, KEYS).forward_passes[0] == 1
