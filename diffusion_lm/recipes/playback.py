"""Records the denoising steps of one example as text."""

import dataclasses

import jax
import numpy as np

from diffusion_lm.architectures.base import BoundModel
from diffusion_lm.core.rng import StreamKeys
from diffusion_lm.evaluation.generation import GenerationTask, compiled_generate
from diffusion_lm.recipes.records import Playback
from diffusion_lm.samplers.sampler import Sampler


def record_playback(model: BoundModel, sampler: Sampler, task: GenerationTask, *, seed: int = 0) -> Playback:
    """Decodes the first example of the task and records the sampler's trace.

    Returns:
      `{"input", "reference", "frames"}`. A frame is the list of vocabulary pieces in the target window after one
      forward pass; PAD is the empty string.
    """
    data = task.data.with_encoder(model.architecture.needs_encoder)
    prompt, records = next(iter(data.prompt_batches(1, limit=1)))
    decode = compiled_generate(model.architecture, dataclasses.replace(sampler, keep_trace=True), model.constrain)
    decoded = jax.device_get(decode(model.params, model.constrain.rows(prompt), StreamKeys.create(seed)))
    window = np.flatnonzero(np.asarray(prompt.target_mask)[0])
    vocabulary = data.vocabulary
    steps = int(decoded.trace.tokens.shape[0])
    frames = [[vocabulary.piece(int(token)) for token in decoded.trace.tokens[s, 0, window]] for s in range(steps)]
    return {"input": records[0].inputs_text, "reference": records[0].targets_text, "frames": frames}
