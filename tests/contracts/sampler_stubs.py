"""Samplers for tests in one call: the settings of blocks and of the draws are flat keywords."""

from typing import Any

from diffusion_lm.core.special import SpecialTokens
from diffusion_lm.core.types import Batch
from diffusion_lm.noise.process import Absorbing, Uniform
from diffusion_lm.noise.schedules import Linear
from diffusion_lm.samplers.autoregressive import AutoregressiveSampler
from diffusion_lm.samplers.blocks import Blocks
from diffusion_lm.samplers.canvas import CanvasSampler
from diffusion_lm.samplers.decoding import Decoding
from diffusion_lm.samplers.masked import MaskedSampler
from diffusion_lm.samplers.speculation import SelfSpeculation

_DRAWS = ("temperature", "top_k", "top_p", "forbidden")


def _decoding(fields: dict[str, Any], temperature: float) -> Decoding:
    given = {name: fields.pop(name) for name in _DRAWS if name in fields}
    return Decoding(**({"temperature": temperature} | given))


def masked(unmask: Any, *, block: int = 0, schedule: Any = Linear(), **fields) -> MaskedSampler:
    """Returns a masked sampler at temperature 1; `block = 0` is one block, which then has no seeds, cache and so on."""
    decoding = _decoding(fields, 1.0)
    settings = {name: fields.pop(name) for name in ("seeds", "causal_context", "cache") if name in fields}
    assert block or not any(settings.values())
    blocks = Blocks(block, **settings) if block else None
    return MaskedSampler(Absorbing(schedule), unmask, blocks=blocks, decoding=decoding, **fields)


def canvas(update: Any, *, block: int = 0, process: Any = Uniform(), **fields) -> CanvasSampler:
    """Returns a canvas sampler at temperature 1 with one candidate."""
    decoding = _decoding(fields, 1.0)
    return CanvasSampler(process, update, canvas=block, decoding=decoding, **({"candidates": 1} | fields))


def sundae(**fields) -> CanvasSampler:
    """Returns AR2Diff's sampler with other settings."""
    return CanvasSampler(decoding=_decoding(fields, 0.2), **fields)


def left_to_right(**fields) -> AutoregressiveSampler:
    """Returns an autoregressive sampler, greedy by default."""
    return AutoregressiveSampler(decoding=_decoding(fields, 0.0), **fields)


def speculative(**fields) -> SelfSpeculation:
    """Returns a self-speculative sampler, greedy by default."""
    return SelfSpeculation(decoding=_decoding(fields, 0.0), **fields)


def without_ends(prompt: Batch, mask_id: int | None = 4) -> Batch:
    """Returns the prompt with EOS and PAD that no network generates, so that the whole window is visible."""
    return prompt.replace(special=SpecialTokens(1 << 20, eos_id=(1 << 20) - 2, pad_id=(1 << 20) - 1, mask_id=mask_id))
