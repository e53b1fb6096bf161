"""Seconds against output length for several samplers of one network (the AR2Diff speed study, figure 3).

Speed does not depend on what the weights say as long as no sampler may stop early, so the network is not trained: every
sampler here must run its full course (EOS and PAD forbidden, or `early_exit=False`) and the study refuses any other.
"""

import dataclasses
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_lm.architectures.base import Architecture
from diffusion_lm.core.errors import require
from diffusion_lm.core.rng import StreamKeys
from diffusion_lm.core.types import Batch, EncoderInputs
from diffusion_lm.evaluation.generation import compiled_generate
from diffusion_lm.samplers.base import Sampler


@dataclasses.dataclass(frozen=True)
class SpeedArm:
    """One line of the figure.

    Attributes:
      label: how the line is called.
      family: "ar" or "diffusion".
      architecture: the network; its parameters are drawn at random.
      sampler: runs its full course whatever the tokens.
    """

    label: str
    family: str
    architecture: Architecture
    sampler: Sampler

    def __post_init__(self):
        sampler: Any = self.sampler
        name = type(sampler).__name__
        if hasattr(sampler, "early_exit"):
            may_stop, fix = sampler.early_exit, f"Bind {name}.early_exit = False in the speed study's scope."
        else:
            may_stop = not {sampler.eos_id, sampler.pad_id} <= set(sampler.forbidden)
            fix = f"Bind {name}.forbidden = (PAD, EOS) in the speed study's scope."
        require(not may_stop, f"the sampler of speed arm '{self.label}' may stop early", where=f"{name}", fix=fix)


@dataclasses.dataclass(frozen=True)
class SpeedStudy:
    """Which lengths are timed, and how.

    Attributes:
      arms: the lines of the figure.
      lengths: output lengths W in tokens.
      prompt_length: conditioning tokens before the window, BOS included.
      batch_size: prompts decoded together.
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
            require(value >= 1, f"{name} = {value} is less than 1", where=f"SpeedStudy.{name}", fix="Use 1 or more.")


def measure(study: SpeedStudy, *, seed: int = 0) -> dict[str, Any]:
    """Times every arm at every length.

    Returns:
      `{"device", "rows": [{"label", "family", "length", "seconds", "spread", "forward_passes", "batch_size"}]}`, where
      `seconds` is the median of `repeats` runs after compilation and `spread` is (max - min) / median.
    """
    parameters: dict[Any, Any] = {}
    rows = []
    for length in study.lengths:
        calls = []
        for arm in study.arms:
            if arm.architecture not in parameters:
                parameters[arm.architecture] = jax.jit(arm.architecture.init)(jax.random.key(seed))
            prompt = random_prompt(study, arm.architecture, length)
            calls.append((compiled_generate(arm.architecture, arm.sampler), parameters[arm.architecture], prompt))
        passes = [int(decode(p, prompt, StreamKeys.create(seed)).forward_passes[0]) for decode, p, prompt in calls]
        seconds: list[list[float]] = [[] for _ in calls]
        for repeat in range(study.repeats):
            for times, (decode, params, prompt) in zip(seconds, calls, strict=True):
                started = time.perf_counter()
                jax.block_until_ready(decode(params, prompt, StreamKeys.create(seed, repeat)))
                times.append(time.perf_counter() - started)
        for arm, times, count in zip(study.arms, seconds, passes, strict=True):
            median = statistics.median(times)
            rows.append(
                {
                    "label": arm.label,
                    "family": arm.family,
                    "length": length,
                    "batch_size": study.batch_size,
                    "seconds": median,
                    "spread": (max(times) - min(times)) / median,
                    "forward_passes": count,
                }
            )
    return {"device": jax.devices()[0].device_kind, "rows": rows}


def random_prompt(study: SpeedStudy, architecture: Architecture, length: int) -> Batch:
    """Returns prompts of random tokens with a target window of `length` tokens."""
    tokens = np.random.default_rng(0).integers(
        0, architecture.spec.vocab_size, (study.batch_size, study.prompt_length), dtype=np.int32
    )
    encoder = None
    if architecture.needs_encoder:
        encoder = EncoderInputs(jnp.asarray(tokens), jnp.ones(tokens.shape, jnp.int32), _slots(tokens.shape))
        tokens = tokens[:, :1]  # the decoder's row opens with BOS alone
    conditioning = tokens.shape[1]
    tokens = np.pad(tokens, ((0, 0), (0, length)))
    return Batch(
        tokens=jnp.asarray(tokens),
        target_mask=_slots(tokens.shape) >= conditioning,
        loss_weights=jnp.zeros(tokens.shape, jnp.float32),
        segment_ids=jnp.ones(tokens.shape, jnp.int32),
        positions=_slots(tokens.shape),
        example_ids=jnp.broadcast_to(jnp.arange(len(tokens), dtype=jnp.uint32)[:, None], tokens.shape),
        encoder=encoder,
    )


def _slots(shape: tuple[int, ...]) -> jax.Array:
    """Returns i32[B,T], the slot number of each token."""
    return jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape)
