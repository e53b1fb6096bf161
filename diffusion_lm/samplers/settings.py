"""The settings that masked and canvas samplers have in common, and the check that they fit the rule."""

from typing import Protocol

from diffusion_lm.core.alignment import Alignment
from diffusion_lm.core.errors import require
from diffusion_lm.noise.contract import PROBABILITIES
from diffusion_lm.noise.process import NoiseProcess
from diffusion_lm.samplers.decoding import Decoding
from diffusion_lm.samplers.rule import Rule


class DenoisingSettings(Protocol):
    """The settings that masked and canvas samplers have in common; see `masked.MaskedSampler`."""

    @property
    def process(self) -> NoiseProcess:
        """The noise process."""
        ...

    @property
    def rule(self) -> Rule:
        """What is done in a step."""
        ...

    @property
    def steps(self) -> int | None:
        """Denoising steps per window."""
        ...

    @property
    def decoding(self) -> Decoding:
        """The settings of the draws."""
        ...

    @property
    def guidance(self) -> float:
        """Strength of classifier-free guidance."""
        ...

    @property
    def self_conditioning(self) -> bool | None:
        """Whether calls read the prediction of the call before."""
        ...

    @property
    def candidates(self) -> int:
        """Decodes per prompt."""
        ...

    @property
    def alignment(self) -> Alignment:
        """Which hidden state predicts which token."""
        ...

    @property
    def visibility(self) -> str:
        """Attention visibility."""
        ...

    @property
    def keep_trace(self) -> bool:
        """Whether to return the canvas after each step."""
        ...


def check_rule(sampler: DenoisingSettings, name: str) -> None:
    """Raises `ConfigError` if the rule does not reverse the sampler's process, or the draw is not defined for it."""
    rule, where = sampler.rule, type(sampler).__name__
    known = ", ".join(one.__name__ for one in rule.processes)
    require(
        isinstance(sampler.process, rule.processes),
        f"process={type(sampler.process).__name__}: {type(rule).__name__} reverses {known}",
        where=f"{where}.process",
        fix=f"Use one of {known}, or another rule ({where}.{name}).",
    )
    require(
        rule.output == PROBABILITIES or sampler.decoding.is_plain,
        f"{sampler.decoding}: temperature, top_k and top_p are not defined for the ratios that {type(rule).__name__} "
        "reads",
        where=f"{where}.decoding",
        fix="Use Decoding.temperature = 1.0, top_k = 0, top_p = 1.0.",
    )
    require(
        sampler.guidance == 0 or not rule.mixes_noise or (sampler.decoding.top_k == 0 and sampler.decoding.top_p == 1),
        f"guidance={sampler.guidance} with {sampler.decoding}: a guided posterior is not defined if top_k or top_p "
        "leave one of the two passes without a token",
        where=f"{where}.guidance",
        fix="Use Decoding.top_k = 0 and top_p = 1.0, or guidance = 0.0.",
    )
    require(
        sampler.guidance == 0 or not rule.reads_logits,
        f"guidance={sampler.guidance}: {type(rule).__name__} reads the logits of one pass, and guidance mixes two",
        where=f"{where}.guidance",
        fix="Use guidance = 0.0.",
    )
    require(
        sampler.decoding.temperature > 0 or not rule.draws_tokens,
        f"temperature={sampler.decoding.temperature}: must be > 0 for {type(rule).__name__}",
        where="Decoding.temperature",
        fix="Use 1.0.",
    )
