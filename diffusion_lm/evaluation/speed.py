"""Measures decoding time by output length for several samplers (the AR2Diff speed study, figure 3).

Every sampler runs all its steps and fills the window (`Sampler.without_early_end`). Decoding time then does not depend
on the values of the weights, so the networks are not trained.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_lm.architectures.base import Architecture
from diffusion_lm.core.errors import require
from diffusion_lm.core.rng import StreamKeys
from diffusion_lm.core.special import SpecialTokens
from diffusion_lm.core.types import Batch, Decoded, EncoderInputs, Params
from diffusion_lm.evaluation.generation import compiled_generate
from diffusion_lm.evaluation.timing import alternate, spread, timed
from diffusion_lm.samplers.sampler import Sampler


@dataclasses.dataclass(frozen=True)
class SpeedArm:
    """One series of the figure.

    Attributes:
      label: name of the series.
      family: "ar" or "diffusion".
      architecture: the network, with random parameters.
      sampler: the sampler; it is replaced by its `without_early_end()`.
    """

    label: str
    family: str
    architecture: Architecture
    sampler: Sampler

    def __post_init__(self):
        object.__setattr__(self, "sampler", self.sampler.without_early_end())


@dataclasses.dataclass(frozen=True)
class SpeedStudy:
    """Configuration of a speed study.

    Attributes:
      arms: the series of the figure.
      lengths: output lengths in tokens.
      prompt_length: conditioning tokens before the target window, including BOS.
      batch_size: prompts per batch.
      repeats: timed runs of every arm at every length, interleaved (A, B, A, B); the median is reported.
    """

    arms: tuple[SpeedArm, ...]
    lengths: tuple[int, ...] = (32, 64, 128, 256)
    prompt_length: int = 32
    batch_size: int = 1
    repeats: int = 3

    def __post_init__(self):
        object.__setattr__(self, "arms", tuple(self.arms))
        object.__setattr__(self, "lengths", tuple(self.lengths))
        for name in ("prompt_length", "batch_size", "repeats"):
            value = getattr(self, name)
            require(value >= 1, f"{name}={value}: must be >= 1", where=f"SpeedStudy.{name}")


def measure(study: SpeedStudy, *, seed: int = 0) -> dict[str, Any]:
    """Times every arm at every length.

    Returns:
      `{"device", "rows": [{"label", "family", "length", "seconds", "spread", "forward_passes", "batch_size"}]}`, where
      `seconds` is the median of `repeats` runs after compilation and `spread` is (max - min) / median.
    """
    parameters: dict[Architecture, Params] = {}
    rows = []
    for length in study.lengths:
        calls, passes = [], []
        for arm in study.arms:
            if arm.architecture not in parameters:
                parameters[arm.architecture] = jax.jit(arm.architecture.init)(jax.random.key(seed))
            prompt = random_prompt(arm.architecture, study.batch_size, study.prompt_length, length)
            decode = decoder(arm, parameters[arm.architecture], prompt, seed=seed)
            passes.append(int(decode(0).forward_passes[0]))
            calls.append(lambda repeat, decode=decode: timed(lambda: decode(repeat)))
        for arm, times, count in zip(study.arms, alternate(calls, study.repeats), passes, strict=True):
            found = spread(times)
            rows.append(
                {
                    "label": arm.label,
                    "family": arm.family,
                    "length": length,
                    "batch_size": study.batch_size,
                    "seconds": found.median,
                    "spread": (found.most - found.least) / found.median,
                    "forward_passes": count,
                }
            )
    return {"device": jax.devices()[0].device_kind, "rows": rows}


def decoder(arm: SpeedArm, params: Params, prompt: Batch, *, seed: int = 0) -> Callable[[int], Decoded]:
    """Returns a function that decodes repeat number n and waits for the result; the first call compiles."""
    program = compiled_generate(arm.architecture, arm.sampler)
    return lambda repeat: jax.block_until_ready(program(params, prompt, StreamKeys.create(seed, repeat)))


def random_prompt(architecture: Architecture, batch_size: int, prompt_length: int, length: int) -> Batch:
    """Returns prompts of `prompt_length` random tokens with a target window of `length` tokens."""
    shape = (batch_size, prompt_length)
    tokens = np.random.default_rng(0).integers(0, architecture.spec.vocab_size, shape, dtype=np.int32)
    encoder = None
    if architecture.needs_encoder:
        encoder = EncoderInputs(jnp.asarray(tokens), jnp.ones(tokens.shape, jnp.int32), _slots(tokens.shape))
        tokens = tokens[:, :1]  # the prompt is in the encoder; the decoder's row starts with BOS only
    conditioning = tokens.shape[1]
    tokens = np.pad(tokens, ((0, 0), (0, length)))
    return Batch(
        tokens=jnp.asarray(tokens),
        target_mask=_slots(tokens.shape) >= conditioning,
        loss_weights=jnp.zeros(tokens.shape, jnp.float32),
        segment_ids=jnp.ones(tokens.shape, jnp.int32),
        positions=_slots(tokens.shape),
        example_ids=jnp.broadcast_to(jnp.arange(len(tokens), dtype=jnp.uint32)[:, None], tokens.shape),
        # There is no vocabulary, and any ids will do: these are the ids of this project's vocabularies.
        special=SpecialTokens(architecture.spec.vocab_size, bos_id=2, mask_id=4),
        encoder=encoder,
    )


def _slots(shape: tuple[int, ...]) -> jax.Array:
    """Returns i32[B,T], the position of each token."""
    return jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape)
