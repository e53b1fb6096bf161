"""Checks that the training objective, the target window and the sampler match.

A sampler for another noise process, attention mask, alignment or output than in training runs without an error and
generates plausible but wrong text. Objectives declare what they train (`Needs.contracts`), samplers what they decode
(`Sampler.contract`). The checks compare both before anything is trained or decoded.
"""

from collections.abc import Sequence

from diffusion_lm.core.errors import ConfigError
from diffusion_lm.data.target_window import TargetWindow
from diffusion_lm.noise.contract import Contract, mismatches
from diffusion_lm.objectives.objective import Needs
from diffusion_lm.samplers.sampler import Sampler


def sampler_differences(trained: Sequence[Contract], sampler: Sampler | None) -> tuple[str, ...]:
    """Returns a description of each difference between `sampler` and the training; empty if either is not declared."""
    contract = getattr(sampler, "contract", None)
    return () if contract is None else mismatches(trained, contract)


def check_sampler(trained: Sequence[Contract], sampler: Sampler | None, *, where: str, fix: str) -> None:
    """Raises `ConfigError` if the sampler assumes another contract than the network was trained for."""
    found = sampler_differences(trained, sampler)
    if found:
        raise ConfigError(
            f"{type(sampler).__name__} does not match the training: {'; '.join(found)}", where=where, fix=fix
        )


def check_window(needs: Needs, window: TargetWindow | None, *, where: str) -> None:
    """Raises `ConfigError` if the target window does not match the way in which the objective learns target lengths.

    Args:
      needs: requirements of the objective.
      window: target window of the data, or None if its converter has none.
      where: gin parameter of the window.
    """
    filler, name = getattr(window, "filler", None), type(window).__name__
    if filler is None:
        return
    if needs.contracts and all(contract.closed for contract in needs.contracts):
        raise ConfigError(
            f"the objective keeps EOS clean and {name} fills the window after EOS: the position of EOS would reveal "
            "the length in training, but is unknown in decoding",
            where=where,
            fix="Use ExactEos and predict the length (gin/runs/length_head.gin, gin/samplers/length_beam.gin).",
        )
    if needs.tail is not None and needs.tail != filler:
        raise ConfigError(
            f"the objective noises a tail of {needs.tail} jointly, but {name} fills the window with {filler}: filler "
            "that stays clean would reveal the length",
            where=where,
            fix="Use EosFilled for a tail of EOS, PadFilled for a tail of PAD.",
        )
