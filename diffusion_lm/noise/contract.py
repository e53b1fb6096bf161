"""What a network was trained for and what a sampler assumes, in one form that can be compared."""

import dataclasses
from collections.abc import Sequence

from diffusion_lm.core.alignment import Alignment
from diffusion_lm.core.errors import require

NO_NOISE = "no noise (next tokens, left to right)"
MASK_NOISE = "MASK noise"
UNIFORM_NOISE = "uniform noise"
HYBRID_NOISE = "noise of MASK and uniform tokens"
NOISES = (NO_NOISE, MASK_NOISE, UNIFORM_NOISE, HYBRID_NOISE)

PROBABILITIES = "probabilities of clean tokens"
RATIOS = "ratios of noisy probabilities"
SCALED_RATIOS = "ratios of noisy probabilities over their scale"
OUTPUTS = (PROBABILITIES, RATIOS, SCALED_RATIOS)

_COMPATIBLE = {MASK_NOISE: (MASK_NOISE, HYBRID_NOISE)}
"""The training noises that a sampler of each noise can decode. Canvases of MASK alone are among those of hybrid noise,
so a masked sampler also decodes networks that were trained with hybrid noise."""


@dataclasses.dataclass(frozen=True)
class Contract:
    """What a network's inputs and outputs mean: in training, or as a sampler takes them.

    Attributes:
      noise: one of `NOISES`.
      visibility: name of the attention visibility (`nn.named_masks`).
      alignment: which hidden state predicts which token.
      output: one of `OUTPUTS`, what the network's outputs mean.
      causal_context: finished blocks and conditioning are causal, whatever the visibility.
      seeds: the first token of a block is never noise.
      closed: EOS is given and clean, so that the length of a target comes from elsewhere (RDM).
    """

    noise: str
    visibility: str
    alignment: Alignment
    output: str = PROBABILITIES
    causal_context: bool = False
    seeds: bool = False
    closed: bool = False

    def __post_init__(self):
        for field, choices in (("noise", NOISES), ("output", OUTPUTS)):
            value = getattr(self, field)
            require(value in choices, f"{value!r}", where=f"Contract.{field}", fix=f"Use one of {', '.join(choices)}.")


def mismatches(trained: Sequence[Contract], decoded: Contract) -> tuple[str, ...]:
    """Returns a description of each difference between training and sampler; empty if one of the processes matches.

    Args:
      trained: the processes that the network was trained for; empty = unknown, and nothing is compared.
      decoded: what the sampler decodes.
    """
    found = [_differences(one, decoded) for one in trained]
    # Of several processes, report the closest one: it is most likely the one that the user meant.
    return min(found, key=len) if found and all(found) else ()


def _differences(trained: Contract, decoded: Contract) -> tuple[str, ...]:
    found = []
    if trained.noise not in _COMPATIBLE.get(decoded.noise, (decoded.noise,)):
        found.append(f"the network was trained with {trained.noise}, and the sampler reverses {decoded.noise}")
    if trained.output != decoded.output:
        found.append(f"the network's outputs are {trained.output}, and the sampler reads them as {decoded.output}")
    if trained.visibility != decoded.visibility:
        found.append(f"visibility is {trained.visibility!r} in training and {decoded.visibility!r} in the sampler")
    else:
        # Settings of blocks can only be compared if both have the same blocks.
        for name in ("causal_context", "seeds"):
            values = [getattr(one, name) for one in (trained, decoded)]
            if values[0] != values[1]:
                found.append(f"{name} is {values[0]} in training and {values[1]} in the sampler")
    if trained.alignment.back != decoded.alignment.back:
        names = [type(one.alignment).__name__ for one in (trained, decoded)]
        found.append(f"alignment is {names[0]} in training and {names[1]} in the sampler")
    if trained.closed and not decoded.closed:
        found.append("EOS is clean in training, and the sampler is not given the length (LengthBeam is)")
    return tuple(found)
