"""Samplers of the diffusion time t of each training example."""

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp

from diffusion_lm.core.checks import check_count
from diffusion_lm.core.errors import require
from diffusion_lm.core.rng import StreamKeys

TIME_STREAM = "noise/time"


class TimeSampler(Protocol):
    """Samples one time per example."""

    def draw(self, keys: StreamKeys, example_ids: jax.Array, *, strata: jax.Array | None = None) -> jax.Array:
        """Returns f32 times in the shape of `example_ids` (u32[B,T]); all tokens of an example get the same time.

        `strata` is `Batch.strata`; only stratified samplers use it.
        """
        ...

    def at(self, uniform: jax.Array) -> jax.Array:
        """Maps uniform numbers in [0, 1) to times, as `draw` does; evaluation passes an even grid."""
        ...


def _uniform(keys: StreamKeys, example_ids: jax.Array, strata: jax.Array | None) -> jax.Array:
    """Returns one number in [0, 1) per example: an independent draw, or its stratum shifted by one draw per step.

    Each number is uniform in both cases. With strata, the B numbers of a batch are a grid with spacing 1/B. Strata are
    places in the *global* batch, so microbatches and devices do not change them.
    """
    if strata is None:
        return keys.example_uniform(TIME_STREAM, example_ids)
    shifted = strata + jax.random.uniform(keys.key(TIME_STREAM))
    return shifted - jnp.floor(shifted)


@dataclasses.dataclass(frozen=True)
class UniformTime:
    """t uniform in (low, high], one draw per example (AR2Diff).

    The interval contains high = 1, pure noise, from which every sampler starts. It does not contain low = 0, where
    likelihood weights diverge.

    Attributes:
      low: lower end.
      high: upper end.
      stratified: spread the times of a batch evenly (MDLM, MD4), which only lowers the variance of the loss. Needs
        `Batch.strata`, which training batches have; other batches get independent times with the same distribution.
    """

    low: float = 0.0
    high: float = 1.0
    stratified: bool = False

    def __post_init__(self):
        require(
            0.0 <= self.low < self.high <= 1.0,
            f"low={self.low}, high={self.high}: must satisfy 0 <= low < high <= 1",
            where="UniformTime",
            fix="The full range is low = 0.0, high = 1.0.",
        )

    def draw(self, keys: StreamKeys, example_ids: jax.Array, *, strata: jax.Array | None = None) -> jax.Array:
        """Returns f32 times in the shape of `example_ids`."""
        return self.at(_uniform(keys, example_ids, strata if self.stratified else None))

    def at(self, uniform: jax.Array) -> jax.Array:
        """Returns high - (high - low) uniform."""
        return self.high - (self.high - self.low) * uniform


@dataclasses.dataclass(frozen=True)
class DiscreteTime:
    """t = k / steps with k uniform in 1..steps, one draw per example (D3PM, arXiv 2107.03006; RDM, arXiv 2302.05737).

    Attributes:
      steps: number of noise levels T.
      stratified: as for `UniformTime`.
    """

    steps: int
    stratified: bool = False

    def __post_init__(self):
        check_count(self.steps, "DiscreteTime.steps", "RDM uses 50, D3PM 1000.")

    def draw(self, keys: StreamKeys, example_ids: jax.Array, *, strata: jax.Array | None = None) -> jax.Array:
        """Returns f32 times in the shape of `example_ids`."""
        return self.at(_uniform(keys, example_ids, strata if self.stratified else None))

    def at(self, uniform: jax.Array) -> jax.Array:
        """Returns (floor(uniform steps) + 1) / steps."""
        return (jnp.floor(uniform * self.steps) + 1.0) / self.steps


@dataclasses.dataclass(frozen=True)
class FixedTime:
    """The same time for every example: masked language models with a constant rate (BERT, arXiv 1810.04805).

    Attributes:
      t: the time in (0, 1]; with the linear schedule it is the mask rate, 0.15 in BERT.
    """

    t: float

    def __post_init__(self):
        require(
            0.0 < self.t <= 1.0,
            f"t={self.t}: must be in (0, 1]",
            where="FixedTime.t",
            fix="BERT's rate is 0.15.",
        )

    def draw(self, keys: StreamKeys, example_ids: jax.Array, *, strata: jax.Array | None = None) -> jax.Array:
        """Returns f32 times in the shape of `example_ids`."""
        del keys, strata
        return jnp.full(example_ids.shape, self.t, jnp.float32)

    def at(self, uniform: jax.Array) -> jax.Array:
        """Returns `t` in the shape of `uniform`."""
        return jnp.full(uniform.shape, self.t, jnp.float32)
