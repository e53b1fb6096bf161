"""Settings that depend on the training step: the causal mask that opens, the block size that grows.

The step is `StreamKeys.step`, which counts from the start of a run. It is 0 in the first step of a run that starts from
`TrainRun.initial` or from the parameters of another `Stage`; a resumed run continues its own count.
"""

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp

from diffusion_lm.core.errors import require
from diffusion_lm.core.rng import StreamKeys, fold_in_each
from diffusion_lm.core.types import Batch
from diffusion_lm.nn.masks import Causal, ExplicitMask, Visibility
from diffusion_lm.nn.named_masks import named_visibility

OPENING_STREAM = "visibility/opening"


class Annealing(Protocol):
    """Changes the visibility of training with the step."""

    def __hash__(self) -> int: ...

    def visibility(self, name: str, batch: Batch, keys: StreamKeys) -> Visibility:
        """Returns who attends to whom at step `keys.step`; `name` is the final visibility."""
        ...


def annealed_visibility(annealing: Annealing | None, name: str, batch: Batch, keys: StreamKeys) -> str | Visibility:
    """Returns the visibility of this training step: `name` itself where nothing is annealed."""
    return name if annealing is None else annealing.visibility(name, batch, keys)


@dataclasses.dataclass(frozen=True)
class MaskAnnealing:
    """Opens a causal mask step by step, as the released code of DiffuGPT does (arXiv 2410.17891).

    In step s a query sees what stands before it and, each with probability r = min(1, (s + 1) / steps), the other keys
    that the objective's visibility allows: causal OR (visibility AND Bernoulli(r)), drawn again in each step. At r = 0
    this is an autoregressive model's attention, at r = 1 the objective's visibility, exactly.

    The draw is one matrix a step for all layers, heads, passes and examples, read at the positions of query and key
    inside their example. So it is the same on every host and mesh, in every microbatch, for packed and for padded rows.

    A comparison's adaptation stage opens the mask from its own beginning, however long the stage before it was.

    Attributes:
      steps: from this step on the mask is open. DiffuGPT: 10,000; 1 in its fine-tuning, which is not annealing.
      per_example: a matrix for each example instead of one for all.
    """

    steps: int = 10_000
    per_example: bool = False

    def __post_init__(self):
        require(
            isinstance(self.steps, int) and self.steps >= 1,
            f"steps={self.steps}: must be an integer >= 1",
            where="MaskAnnealing.steps",
            fix="DiffuGPT opens the mask over 10000 steps; with 1 it is open from the first step.",
        )

    def rate(self, step: jax.Array) -> jax.Array:
        """Returns f32[], the probability r at i32[] steps."""
        return jnp.minimum((step.astype(jnp.float32) + 1.0) / self.steps, 1.0)

    def visibility(self, name: str, batch: Batch, keys: StreamKeys) -> Visibility:
        """Returns who sees whom in this step; `name` is the visibility when all is open."""
        return self.opened(self.rate(keys.step), name, batch, keys)

    def opened(self, rate: jax.Array | float, name: str, batch: Batch, keys: StreamKeys) -> Visibility:
        """Returns `visibility` at the given probability."""
        length = batch.tokens.shape[1]

        def row(key):
            # The first numbers of a longer row are those of a shorter one, so padding changes nothing.
            return jax.random.uniform(key, (length,)) < rate

        if self.per_example:
            row_keys = keys.per_token(OPENING_STREAM, batch.example_ids, batch.positions)
            rows_BTT = jax.vmap(jax.vmap(row))(row_keys)
        else:
            seen_TT = jax.vmap(row)(fold_in_each(keys.key(OPENING_STREAM), jnp.arange(length)))
            rows_BTT = jnp.take(seen_TT, batch.positions, axis=0)
        # Columns as rows: whole rows are what accelerators gather well.
        seen_BTT = jax.vmap(lambda seen, at: jnp.take(seen.T, at, axis=0).T)(rows_BTT, batch.positions)
        return Causal() | (named_visibility(name, batch.target_mask) & ExplicitMask(seen_BTT))


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """Block sizes of block diffusion, one after the other (LLaDA2.0, arXiv 2512.15745: grow, stay, shrink).

    A block as long as the row is masked diffusion without blocks.

    Attributes:
      sizes: tokens per block of each phase; the last one is the model's own, which `bound` and samplers use.
      until: the steps at which the next phase begins, one fewer than sizes.
    """

    sizes: tuple[int, ...]
    until: tuple[int, ...]

    def __post_init__(self):
        for field in ("sizes", "until"):
            object.__setattr__(self, field, tuple(getattr(self, field)))
        require(
            len(self.sizes) == len(self.until) + 1 and all(isinstance(n, int) and n > 0 for n in self.sizes),
            f"sizes={self.sizes}, until={self.until}: must be positive integers, one more size than steps",
            where="BlockSizes.sizes",
            fix="Give each phase a size, and each phase but the last one its end.",
        )
        require(
            all(isinstance(n, int) for n in self.until) and list(self.until) == sorted({0, *self.until} - {0}),
            f"until={self.until}: must be strictly increasing integers > 0",
            where="BlockSizes.until",
            fix="Give the first step of each later phase.",
        )

    def at(self, step: jax.Array) -> jax.Array:
        """Returns i32[], the block size at i32[] steps."""
        phase = jnp.sum(step >= jnp.asarray(self.until, jnp.int32), dtype=jnp.int32)
        return jnp.asarray(self.sizes, jnp.int32)[phase]
