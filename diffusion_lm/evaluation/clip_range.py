"""BD3-LM's search for the range of mask rates in training (arXiv 2503.09573, section 5 and algorithm 1).

The loss of a block at mask rate r is weighted by 1/r, so its variance depends on the range [low, high] from which r is
drawn. At every evaluation, the variance of the loss over blocks of held-out text is measured for each candidate range,

    (low*, high*) = argmin Var[ 1/r x mean over the block's tokens of (masked x cross-entropy) ],   r ~ U(low, high)

and training continues with the range of smallest variance.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_lm.architectures.base import Architecture, BoundModel
from diffusion_lm.core.errors import ConfigError, require
from diffusion_lm.core.rng import StreamKeys
from diffusion_lm.core.types import Batch
from diffusion_lm.data.iterator import DataPipeline
from diffusion_lm.nn.constrain import Constrain, no_constraint
from diffusion_lm.noise.choice import CHOICE_STREAM
from diffusion_lm.objectives.block_diffusion import BlockDiffusion
from diffusion_lm.objectives.block_layout import blocks_of, sum_by_run
from diffusion_lm.objectives.objective import Objective, evaluation_keys

SMALLEST_RATE = 1e-3
"""Lower end of the full range, as in the released code; with a lower end of 0, 1/r has no finite variance."""

Sum = jax.Array | np.ndarray
"""A sum on the devices, or on the host after batches were accumulated."""


class Moments(NamedTuple):
    """Sums over blocks, f32[]; on the host f64[], or f64[candidates].

    Attributes:
      blocks: number of blocks.
      total: sum over blocks of the mean loss per scored token.
      squares: sum over blocks of its square.
    """

    blocks: Sum
    total: Sum
    squares: Sum

    @property
    def mean(self) -> Sum:
        """Mean loss of a block, in nats per token."""
        return self.total / self.blocks

    @property
    def variance(self) -> Sum:
        """Variance over blocks, in nats^2 per token^2."""
        return self.squares / self.blocks - self.mean**2


def block_moments(
    objective: BlockDiffusion,
    model: BoundModel,
    batch: Batch,
    keys: StreamKeys,
    low: jax.Array | float,
    high: jax.Array | float,
) -> Moments:
    """Returns the moments of the block losses for rates drawn from [low, high], without dropout.

    The noise is frozen and the same for every range, so ranges are compared on the same draws.
    """
    keys = evaluation_keys(keys)
    blocks = blocks_of(batch, objective.block_size, objective.first_block)
    unit_BT = objective.with_range(0.0, 1.0).block_rates(keys, batch, blocks)
    rate_BT = low + (high - low) * unit_BT
    uniform = keys.token_uniform(CHOICE_STREAM, batch.example_ids, batch.positions)
    masked = (uniform < rate_BT) & objective.maskable(batch, blocks)
    forward = objective.passes(model, batch, blocks, keys, train=False)
    losses = objective.token_losses(model, batch, blocks, masked, 1.0 / rate_BT, forward)
    scored = (batch.loss_weights > 0).astype(jnp.float32)
    # `mean` is repeated at every token of a block. The weight 1/(tokens of the block) makes each block count once.
    tokens = jnp.maximum(sum_by_run(scored, blocks.runs), 1.0)
    mean = sum_by_run(losses.diffusion * scored, blocks.runs) / tokens
    once = scored / tokens
    return Moments(jnp.sum(once), jnp.sum(once * mean), jnp.sum(once * mean**2))


@functools.cache
def _compiled(
    architecture: Architecture,
    objective: BlockDiffusion,
    ranges: tuple[tuple[float, float], ...],
    constrain: Constrain = no_constraint,
):
    """Returns a jitted function `(params, batch, keys) -> Moments` with one entry per range."""

    def run(params, batch: Batch, keys: StreamKeys) -> Moments:
        model = BoundModel(architecture, params, constrain)

        def one(ends):
            return block_moments(objective, model, batch, keys, ends[0], ends[1])

        return constrain.whole(jax.lax.map(one, jnp.asarray(ranges, jnp.float32)))

    return jax.jit(run)


@dataclasses.dataclass(frozen=True)
class ClipRangeSearch:
    """Chooses the range of mask rates at every evaluation; training continues with that range (`adjusted`).

    Checkpoints store the chosen range, so a resumed run is identical to an uninterrupted one. A new range recompiles
    the training step. Logged values: `low`, `high`, and `variance/LOW-HIGH` for every candidate.

    Attributes:
      data: held-out examples.
      objective: the objective of the run. Its `low` and `high` apply until the first evaluation.
      name: prefix of the logged values.
      every: period in steps.
      limit: number of examples; None = all.
      batch_size: examples per forward pass.
      seed: seed of the frozen noise.
      widths: widths of the candidate ranges (released code: 0.5 to 0.9).
      spacing: distance between the lower ends of consecutive candidates of the same width.
    """

    data: DataPipeline
    objective: BlockDiffusion
    name: str = "clip_range"
    every: int = 0
    limit: int | None = None
    batch_size: int = 32
    seed: int = 0
    widths: tuple[float, ...] = (0.5, 0.6, 0.7, 0.8, 0.9)
    spacing: float = 0.05

    def __post_init__(self):
        object.__setattr__(self, "widths", tuple(self.widths))
        require(
            all(0 < width < 1 for width in self.widths),
            f"widths={self.widths}: each must be in (0, 1)",
            where="ClipRangeSearch.widths",
            fix="The released code uses (0.5, 0.6, 0.7, 0.8, 0.9). The full range is always a candidate.",
        )
        require(
            0 < self.spacing < 1,
            f"spacing={self.spacing}: must be in (0, 1)",
            where="ClipRangeSearch.spacing",
            fix="The released code uses 0.05.",
        )
        objective = self.objective
        _check_range(objective)
        require(
            objective.weighting == "nelbo" and objective.rates.half_life is None,
            f"weighting={objective.weighting!r}, half_life={objective.rates.half_life}: the search requires loss "
            "weights 1/rate with one rate per block",
            where="ClipRangeSearch.objective",
            fix="Set BlockDiffusion.weighting = 'nelbo' and MaskRates.half_life = None, or remove the search.",
        )

    @property
    def ranges(self) -> tuple[tuple[float, float], ...]:
        """(low, high) of every candidate; the full range is first."""
        found = [(SMALLEST_RATE, 1.0)]
        for width in self.widths:
            count = int(np.floor((1.0 - width) / self.spacing + 1e-6)) + 1
            lows = np.round(self.spacing * np.arange(count), 9)
            found += [(max(float(low), SMALLEST_RATE), min(round(float(low) + width, 9), 1.0)) for low in lows]
        return tuple(found)

    def run(self, model: BoundModel, step: int) -> dict[str, float]:
        """Returns the variance of every candidate and the range with the smallest variance."""
        del step
        architecture, constrain = model.architecture, model.constrain
        moments = _compiled(architecture, self.objective, self.ranges, constrain)
        keys, sums = StreamKeys.create(self.seed), None
        for batch, _ in self.data.with_encoder(architecture.needs_encoder).eval_batches(
            self.batch_size, limit=self.limit
        ):
            found = jax.device_get(moments(model.params, constrain.rows(batch), keys))
            found = Moments(*(np.asarray(part, np.float64) for part in found))
            sums = found if sums is None else Moments(*map(np.add, sums, found))
        if sums is None:
            raise ConfigError(
                "the evaluation split has no examples",
                where="ClipRangeSearch.data",
                fix="Use a split that is not empty.",
            )
        variances = np.asarray(sums.variance)
        low, high = self.ranges[int(np.argmin(variances))]
        named = {f"variance/{a:g}-{b:g}": float(v) for (a, b), v in zip(self.ranges, variances, strict=True)}
        return {"low": low, "high": high, **named}

    def adjusted(self, objective: Objective, values: Mapping[str, float]) -> Objective:
        """Returns the objective for the following steps."""
        _check_range(objective)
        adjustable: Any = objective
        return adjustable.with_range(values["low"], values["high"])


def _check_range(objective: Objective) -> None:
    require(
        hasattr(objective, "with_range"),
        f"{type(objective).__name__} has no range of mask rates",
        where="ClipRangeSearch.objective",
        fix="Use BlockDiffusion, or remove the search.",
    )
