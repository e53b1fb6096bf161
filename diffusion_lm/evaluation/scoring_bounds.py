"""Estimators of `scoring.score` that are the bound of an objective: block diffusion's, and any other."""

import dataclasses

import jax
import jax.numpy as jnp

from diffusion_lm.architectures.base import BoundModel
from diffusion_lm.core.errors import require
from diffusion_lm.core.rng import StreamKeys
from diffusion_lm.core.types import Batch
from diffusion_lm.evaluation.scoring_estimators import require_draws
from diffusion_lm.noise.weighting import BoundKind
from diffusion_lm.objectives.block_diffusion import BlockDiffusion
from diffusion_lm.objectives.block_layout import blocks_of
from diffusion_lm.objectives.objective import Objective


@dataclasses.dataclass(frozen=True)
class BlockNelbo:
    """The bound of block diffusion (BD3-LM, arXiv 2503.09573): the sum of its blocks' bounds given the clean past.

    With blocks of one token it is exact.

    Attributes:
      objective: the objective that the model was trained with.
      draws: draws a row.
      append_eos: whether the choices of a question are scored with EOS behind them.
    """

    objective: BlockDiffusion
    draws: int = 128
    append_eos: bool = False
    random_start: bool = dataclasses.field(default=True, init=False)

    def __post_init__(self):
        require_draws(self)

    @property
    def bound_kind(self) -> BoundKind:
        """A bound, and exact for blocks of one token."""
        return "exact" if self.objective.block_size == 1 else "nelbo"

    def exact_for(self, tokens: int) -> bool:
        """True for a single token and for blocks of one."""
        return tokens == 1 or self.objective.block_size == 1

    def nll(self, model: BoundModel, batch: Batch, keys: StreamKeys, level_B: jax.Array) -> jax.Array:
        """Returns f32[B], one unbiased draw of the negative ELBO."""
        blocks = blocks_of(batch, self.objective.block_size, self.objective.first_block)
        level = self.objective.block_levels(level_B[:, None], blocks)
        masked, weights = self.objective.exact_count(level, keys, batch, blocks)
        forward = self.objective.passes(model, batch, blocks, keys, train=False)
        losses = self.objective.token_losses(model, batch, blocks, masked, weights, forward)
        return jnp.sum(losses.diffusion * batch.loss_weights, axis=1)


@dataclasses.dataclass(frozen=True)
class ObjectiveBound:
    """The bound of an objective, row by row, with noise of its own for every draw: uniform noise, score entropy ...

    In nats of the row, as every estimator: the loss per token of `bound`, whatever it is divided by and however many
    draws it takes, times the row's scored tokens.

    Attributes:
      objective: the objective that the model was trained with.
      draws: evaluations of its `bound` a row, each of which may take several draws of its own.
      append_eos: whether the choices of a question are scored with EOS behind them.
    """

    objective: Objective
    draws: int = 32
    append_eos: bool = False
    random_start: bool = dataclasses.field(default=True, init=False)

    def __post_init__(self):
        require_draws(self)

    @property
    def bound_kind(self) -> BoundKind:
        """The objective's."""
        return self.objective.bound_kind

    def exact_for(self, tokens: int) -> bool:
        """True where the objective's bound is exact."""
        del tokens
        return self.bound_kind == "exact"

    def nll(self, model: BoundModel, batch: Batch, keys: StreamKeys, level_B: jax.Array) -> jax.Array:
        """Returns f32[B], the objective's bound of each row."""
        del level_B

        def one(row: Batch) -> jax.Array:
            batch = jax.tree.map(lambda x: x[None], row)
            terms = self.objective.bound(model, batch, keys)
            require(
                "nll_per_real_token" in terms.metrics,
                f"the loss of {type(self.objective).__name__} is not about the tokens of a target",
                where="ObjectiveBound.objective",
                fix="Give the objective that the network itself was trained with.",
            )
            return terms.loss * jnp.sum(batch.loss_weights)

        return jax.vmap(one)(batch)
