"""Whether what a network was trained for, the windows that it saw and the sampler that decodes it belong together.

A sampler that undoes another noise than the training's, or that reads another attention mask, alignment or output, runs
without complaint and gives text that looks plausible. Objectives say what they train (`Needs.contracts`), samplers what
they decode (`Sampler.contract`); here both are compared, before anything is trained or decoded.
"""

from collections.abc import Sequence
from typing import Any

from diffusion_lm.core.errors import ConfigError
from diffusion_lm.noise.contract import Contract, mismatches
from diffusion_lm.objectives.objective import Needs


def sampler_differences(trained: Sequence[Contract], sampler: Any) -> tuple[str, ...]:
    """Returns in words what `sampler` takes otherwise than the training; nothing where either does not say."""
    contract = getattr(sampler, "contract", None)
    return () if contract is None else mismatches(trained, contract)


def check_sampler(trained: Sequence[Contract], sampler: Any, *, where: str, fix: str) -> None:
    """Raises `ConfigError` where the sampler assumes another contract than the network was trained for."""
    found = sampler_differences(trained, sampler)
    if found:
        raise ConfigError(
            f"{type(sampler).__name__} does not fit the training: {'; '.join(found)}", where=where, fix=fix
        )


def check_window(needs: Needs, window: Any, *, where: str) -> None:
    """Raises `ConfigError` where the target window gives away, or never shows, what the objective learns length from.

    Args:
      needs: what the objective says.
      window: a `data.target_window.TargetWindow`.
      where: gin parameter of the window.
    """
    filler, name = getattr(window, "filler", None), type(window).__name__
    if filler is None:
        return
    if needs.contracts and all(contract.closed for contract in needs.contracts):
        raise ConfigError(
            f"the objective keeps EOS clean and {name} fills the window after it: EOS shows the length in training, "
            "and a sampler does not know it",
            where=where,
            fix="Use ExactEos, and predict lengths (gin/runs/length_head.gin, gin/samplers/length_beam.gin).",
        )
    if needs.tail is not None and needs.tail != filler:
        raise ConfigError(
            f"the objective noises a tail of {needs.tail} as a whole, and {name} fills the window with {filler}: what "
            "is left of the filler shows the length",
            where=where,
            fix="Use EosFilled for a tail of EOS, PadFilled for one of PAD.",
        )
