"""The interface of objectives: what is learned from a batch, and what that needs from the model and the run."""

import dataclasses
from typing import Literal, Protocol

import jax.numpy as jnp

from diffusion_lm.architectures.base import BoundModel
from diffusion_lm.core.alignment import Alignment
from diffusion_lm.core.rng import StreamKeys
from diffusion_lm.core.types import Batch, LossTerms
from diffusion_lm.noise.contract import Contract
from diffusion_lm.noise.weighting import BoundKind


@dataclasses.dataclass(frozen=True)
class Needs:
    """What an objective needs from the model and from the run.

    Attributes:
      visibility: name of the attention visibility that it trains under.
      passes: forward passes of the network per training step.
      frozen_passes: number of these passes without a backward pass.
      mask_token: whether the vocabulary must have a MASK token.
      one_example_per_row: whether rows must not be packed.
      self_conditioning: whether the network must be able to read its own previous prediction.
      token_schedules: whether the network must have an exponent per token (`architectures.exponents`).
      several_weights: whether its loss has parts that are divided by weights of their own (`LossTerms.others`).
      contracts: what the network is trained for, which a sampler must match (`noise.contract.mismatches`); empty if the
        objective does not train the network.
      tail: the filler that is noised as a whole, which the target window must have; otherwise lengths leak.
    """

    visibility: str
    passes: int = 1
    frozen_passes: int = 0
    mask_token: bool = False
    one_example_per_row: bool = False
    self_conditioning: bool = False
    token_schedules: bool = False
    several_weights: bool = False
    contracts: tuple[Contract, ...] = ()
    tail: Literal["eos", "pad"] | None = None

    @property
    def cost_in_forward_passes(self) -> float:
        """Cost of a training step in forward passes: a backward pass costs two."""
        return 3.0 * self.passes - 2.0 * self.frozen_passes


class Objective(Protocol):
    """A frozen dataclass, configured by one gin file."""

    def __hash__(self) -> int: ...

    @property
    def alignment(self) -> Alignment:
        """Which hidden state predicts which token."""
        ...

    @property
    def bound_kind(self) -> BoundKind:
        """What `bound` says about the likelihood: "exact", "nelbo" (an upper bound of -log p) or "pseudo" (neither)."""
        ...

    def needs(self) -> Needs:
        """Returns what it needs from the model and from the run."""
        ...

    def loss(self, model: BoundModel, batch: Batch, keys: StreamKeys, *, train: bool = True) -> LossTerms:
        """Returns the sums to be differentiated; `train` enables dropout (where the model has any)."""
        ...

    def bound(self, model: BoundModel, batch: Batch, keys: StreamKeys) -> LossTerms:
        """Returns the evaluation sums: no dropout, and the same noise at every training step.

        Several draws are averaged (`draws.mean_over_draws`), so `loss_sum / weight` and `weight` do not depend on their
        number.
        """
        ...


def evaluation_keys(keys: StreamKeys) -> StreamKeys:
    """Returns the keys of step 0, so that evaluating the same weights at any time gives the same value (trap T31)."""
    return keys.replace(step=jnp.zeros((), jnp.int32))
