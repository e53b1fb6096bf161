"""At which noise level t each example is trained."""

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp

from diffusion_lm.core.errors import require
from diffusion_lm.core.rng import StreamKeys

TIME_STREAM = "noise/time"


class TimeSampler(Protocol):
    """Draws one time per example."""

    def draw(self, keys: StreamKeys, example_ids: jax.Array, *, strata: jax.Array | None = None) -> jax.Array:
        """Returns f32 times in the shape of `example_ids` (u32[B,T]); the tokens of one example share theirs.

        `strata` is that of the `Batch`; only stratified samplers read it.
        """
        ...

    def at(self, uniform: jax.Array) -> jax.Array:
        """Returns the times that `draw` makes of uniform numbers in [0, 1): evaluation spreads these evenly."""
        ...


def _uniform(keys: StreamKeys, example_ids: jax.Array, strata: jax.Array | None) -> jax.Array:
    """Returns one uniform in [0, 1) an example: its own, or its place in the batch moved by the step's one draw.

    Every example's value is uniform either way, over the steps; with strata the B values of one batch are a grid of
    step 1/B. The draw depends on the place in the *global* batch, so microbatches and devices do not change it.
    """
    if strata is None:
        return keys.example_uniform(TIME_STREAM, example_ids)
    moved = strata + jax.random.uniform(keys.key(TIME_STREAM))
    return moved - jnp.floor(moved)


@dataclasses.dataclass(frozen=True)
class UniformTime:
    """t uniform in (low, high], one draw per example (AR2Diff).

    The interval is open below and closed above: pure noise, the state every sampler starts from, is in the support, and
    t = 0, at which likelihood weights diverge, is not.

    Attributes:
      low: lower end.
      high: upper end.
      stratified: spreads the times of a batch evenly (MDLM, MD4), which lowers the variance of the loss and nothing
        else. Batches that do not say where in the global batch a row stands (`Batch.strata`; only those of training do)
        get independent times of the same law.
    """

    low: float = 0.0
    high: float = 1.0
    stratified: bool = False

    def __post_init__(self):
        require(
            0.0 <= self.low < self.high <= 1.0,
            f"times must satisfy 0 <= low < high <= 1, got low = {self.low}, high = {self.high}",
            where="UniformTime",
            fix="The full range is low = 0.0, high = 1.0.",
        )

    def draw(self, keys: StreamKeys, example_ids: jax.Array, *, strata: jax.Array | None = None) -> jax.Array:
        """Returns f32 times in the shape of `example_ids`."""
        return self.at(_uniform(keys, example_ids, strata if self.stratified else None))

    def at(self, uniform: jax.Array) -> jax.Array:
        """Returns high at 0, falling to low."""
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
        require(
            self.steps >= 1,
            f"steps = {self.steps} leaves no noise level",
            where="DiscreteTime.steps",
            fix="RDM uses 50, D3PM 1000.",
        )

    def draw(self, keys: StreamKeys, example_ids: jax.Array, *, strata: jax.Array | None = None) -> jax.Array:
        """Returns f32 times in the shape of `example_ids`."""
        return self.at(_uniform(keys, example_ids, strata if self.stratified else None))

    def at(self, uniform: jax.Array) -> jax.Array:
        """Returns 1/steps at 0, rising to 1."""
        return (jnp.floor(uniform * self.steps) + 1.0) / self.steps


@dataclasses.dataclass(frozen=True)
class FixedTime:
    """The same time for every example: masked language models, whose rate never changes (BERT, arXiv 1810.04805).

    Attributes:
      t: the time; under the linear schedule also the rate, 0.15 in BERT.
    """

    t: float

    def __post_init__(self):
        require(
            0.0 < self.t <= 1.0,
            f"t = {self.t} lies outside (0, 1]",
            where="FixedTime.t",
            fix="BERT's rate is 0.15.",
        )

    def draw(self, keys: StreamKeys, example_ids: jax.Array, *, strata: jax.Array | None = None) -> jax.Array:
        """Returns f32 times in the shape of `example_ids`."""
        del keys, strata
        return jnp.full(example_ids.shape, self.t, jnp.float32)

    def at(self, uniform: jax.Array) -> jax.Array:
        """Returns the one time."""
        return jnp.full(uniform.shape, self.t, jnp.float32)
