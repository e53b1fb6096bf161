"""Estimators of `scoring.score` that evaluate the bound of an objective: of block diffusion, and of any other."""

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
    """The bound of block diffusion (BD3-LM, arXiv 2503.09573): sum over blocks of the bound given the clean past.

    It is exact for blocks of one token.

    Attributes:
      objective: the objective of the model's training.
      draws: number of draws per row.
      append_eos: whether EOS is appended to the choices of a question.
    """

    objective: BlockDiffusion
    draws: int = 128
    append_eos: bool = False
    random_start: bool = dataclasses.field(default=True, init=False)

    def __post_init__(self):
        require_draws(self)

    @property
    def bound_kind(self) -> BoundKind:
        """The kind of the value: exact for blocks of one token, otherwise a bound."""
        return "exact" if self.objective.block_size == 1 else "nelbo"

    def exact_for(self, tokens: int) -> bool:
        """True for a single token and for blocks of one token."""
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
    """The bound of any objective (uniform noise, score entropy, ...), row by row, with independent noise per draw.

    The value is in nats per row: loss per token as returned by `objective.bound`, times the scored tokens of the row.

    Attributes:
      objective: the objective of the model's training.
      draws: number of evaluations of `objective.bound` per row; each may itself average several draws.
      append_eos: whether EOS is appended to the choices of a question.
    """

    objective: Objective
    draws: int = 32
    append_eos: bool = False
    random_start: bool = dataclasses.field(default=True, init=False)

    def __post_init__(self):
        require_draws(self)

    @property
    def bound_kind(self) -> BoundKind:
        """The bound kind of the objective."""
        return self.objective.bound_kind

    def exact_for(self, tokens: int) -> bool:
        """True if the bound of the objective is exact."""
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
                f"{type(self.objective).__name__} has no loss per target token",
                where="ObjectiveBound.objective",
                fix="Use the objective that trained the network, not that of a head.",
            )
            return terms.loss * jnp.sum(batch.loss_weights)

        return jax.vmap(one)(batch)
