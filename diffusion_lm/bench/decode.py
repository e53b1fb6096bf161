"""Times the samplers of a speed study on an untrained network with random prompts, at the full target length."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from diffusion_lm.bench.benchmark import Facts, device_facts, first_call, memory_facts
from diffusion_lm.core.types import Decoded
from diffusion_lm.evaluation.speed import SpeedStudy, decoder, random_prompt
from diffusion_lm.evaluation.timing import timed
from diffusion_lm.interop.save import save
from diffusion_lm.samplers.decoding import Decoding


class DecodeBenchmark:
    """All arms of a study at one target length; a round decodes one batch with one arm."""

    def __init__(self, study: SpeedStudy, length: int):
        """Stores the study and the target length."""
        self.study, self.length = study, length
        self._decoders: dict[str, Callable[[int], Decoded]] = {}

    @property
    def labels(self) -> Sequence[str]:
        """Labels of the arms."""
        return tuple(arm.label for arm in self.study.arms)

    def prepare(self, export: str | None = None) -> Facts:
        """Initialises the parameters, compiles and runs each arm once; returns facts by arm.

        The facts include the number of forward passes and the decoded tokens. The network of the first arm is exported.
        """
        study = self.study
        parameters: dict[Any, Any] = {}
        arms = {}
        for arm in study.arms:
            if arm.architecture not in parameters:
                parameters[arm.architecture] = jax.jit(arm.architecture.init)(jax.random.key(0))
            prompt = random_prompt(arm.architecture, study.batch_size, study.prompt_length, self.length)
            self._decoders[arm.label] = decode = decoder(arm, parameters[arm.architecture], prompt)
            with first_call() as first:
                decoded = decode(0)
            draws = getattr(arm.sampler, "decoding", Decoding())
            arms[arm.label] = {
                "forward_passes": int(decoded.forward_passes[0]),
                "forbidden": list(draws.never_drawn(prompt.special)),
                "greedy": arm.family == "ar" and draws.temperature == 0,
                "sampler": type(arm.sampler).__name__,
                "parameters": arm.architecture.count_parameters()["total"],
                "compile_seconds": first.seconds,
                "compiled_from_cache": first.from_cache,
                "window": np.asarray(decoded.tokens)[:, -self.length :].tolist(),
            }
        if export is not None:
            first_network = study.arms[0].architecture
            save(export, first_network, parameters[first_network])
        return {"arms": arms, "dtype": study.arms[0].architecture.spec.dtype, "platform": jax.default_backend()}

    def measure(self, label: str, number: int) -> float:
        """Times one batch; returns seconds."""
        return timed(lambda: self._decoders[label](number + 1))

    def finish(self) -> Facts:
        """Returns the peak memory over all arms, and the device."""
        return {**memory_facts(), "device": device_facts()}
