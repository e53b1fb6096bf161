"""The masked rules on ragged windows: what the property tests of samplers share."""

import model_stubs as stubs
import numpy as np
from sampler_stubs import masked, without_ends

from diffusion_lm.core.rng import StreamKeys
from diffusion_lm.samplers.counts import Even, Fixed, Proportional
from diffusion_lm.samplers.remasking_rates import Capped, LeastConfident
from diffusion_lm.samplers.routing import Routed
from diffusion_lm.samplers.unmasking import Ancestral, EntropyBound, Factor, Ranked, Threshold

KEYS = StreamKeys.create(9)
MASK = 4
LENGTHS = [1, 2, 3, 5, 8, 9]
PROMPT = without_ends(stubs.as_prompt(stubs.make_batch([2, 1, 3, 2, 1, 2], LENGTHS, 12)))
TARGET = np.asarray(PROMPT.target_mask)


# Every slot has its own distribution, whatever the canvas; cheap to compile.
TABLE = stubs.table_model(np.random.default_rng(2).normal(scale=2.0, size=(12, stubs.VOCAB)))


def decode(unmask, prompt=PROMPT, model=TABLE, **fields):
    return stubs.generate(masked(unmask, **fields), model, prompt, KEYS)


RULES = {
    "ancestral": Ancestral(),
    "low_confidence": Ranked("confidence", Even()),
    "random": Ranked("random", Even()),
    "dream": Ranked("margin", Proportional(), order_temperature=0.5),
    "too_many": Ranked("entropy", Fixed(7)),
    "threshold": Threshold(0.3),
    "factor": Factor(2.0),
    "entropy_bound": EntropyBound(3.0),
    "remdm": Ancestral(remasking=Capped(0.4)),
    "remdm_conf": Ancestral(remasking=LeastConfident()),
    "rdm": Routed(),
    "rdm_cond": Routed(conditional=True, noise=1.0),
}
