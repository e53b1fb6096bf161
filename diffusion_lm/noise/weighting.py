"""How much the loss of each token counts at its noise level.

Weights of the masked family look at three numbers: the mask rate m = 1 - alpha(t), the probability that a token is
replaced at all; the law of t; and which tokens were replaced. A weight is unbiased per token where its mean over t and
over the choice is 1 for every token, and the weighted loss bounds the likelihood where, beyond that, m is uniform.
"""

import dataclasses
from typing import Literal, Protocol

import jax
import jax.numpy as jnp

from diffusion_lm.core.errors import require
from diffusion_lm.core.segments import segment_sum
from diffusion_lm.core.types import Batch
from diffusion_lm.noise.schedules import Schedule

BoundKind = Literal["exact", "nelbo", "pseudo"]


class Weighting(Protocol):
    """Weights the per-token loss; the weights multiply the batch's own `loss_weights` and enter no denominator.

    A weighting of a process of T discrete steps says so by a field `steps`, which must be that of the time sampler.
    """

    @property
    def bound_kind(self) -> BoundKind:
        """What the loss with these weights says about the likelihood, under the noise that they are made for."""
        ...

    def weigh(
        self, t_BT: jax.Array, replaced_BT: jax.Array, schedule: Schedule, *, batch: Batch | None = None
    ) -> jax.Array:
        """Returns f32[B,T] from the times, from which tokens were corrupted, from the schedule and from the batch."""
        ...


@dataclasses.dataclass(frozen=True)
class Flat:
    """Every target token counts one at every noise level, corrupted or not (AR2Diff).

    Scoring intact tokens too is what makes the model say which tokens are noise (trap T17). The result is not a
    likelihood bound: uniform-noise models of the SUNDAE family have none.
    """

    @property
    def bound_kind(self) -> BoundKind:
        """Pseudo-likelihood."""
        return "pseudo"

    def weigh(self, t_BT, replaced_BT, schedule, *, batch=None) -> jax.Array:
        """Returns ones."""
        return jnp.ones_like(t_BT)


@dataclasses.dataclass(frozen=True)
class FlatOnReplaced:
    """Every replaced token counts one at every noise level (masked language models; MaskGIT)."""

    @property
    def bound_kind(self) -> BoundKind:
        """Pseudo-likelihood: low noise counts too little for a bound."""
        return "pseudo"

    def weigh(self, t_BT, replaced_BT, schedule, *, batch=None) -> jax.Array:
        """Returns 1 on replaced tokens and 0 elsewhere."""
        return replaced_BT.astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class Nelbo:
    """The likelihood weights of absorbing noise, on replaced tokens.

    Continuous time: -alpha'(t) / (1 - alpha(t)) (MDLM, arXiv 2406.07524; MD4, 2406.04329). T steps of 1/T:
    T (alpha(t - 1/T) - alpha(t)) / (1 - alpha(t)) (D3PM, 2107.03006). Both are 1/t for the linear schedule. The mean
    over t of weight x mask rate is alpha(0) - alpha(1), 1 up to what the schedule itself leaves out (trap T12).

    Attributes:
      steps: T of a process in discrete time; None = continuous time.
    """

    steps: int | None = None

    @property
    def bound_kind(self) -> BoundKind:
        """A bound, under absorbing noise and over the full range of times."""
        return "nelbo"

    def weigh(self, t_BT, replaced_BT, schedule, *, batch=None) -> jax.Array:
        """Returns the weight on replaced tokens and 0 elsewhere."""
        if self.steps is None:
            fall = -schedule.alpha_derivative(t_BT)
        else:
            fall = self.steps * (schedule.alpha(t_BT - 1.0 / self.steps) - schedule.alpha(t_BT))
        return _over_rate(fall, t_BT, replaced_BT, schedule)


@dataclasses.dataclass(frozen=True)
class InverseRate:
    """1 / (1 - alpha(t)) on replaced tokens (LLaDA's 1 / p_mask, arXiv 2502.09992).

    One over the probability of being replaced: each token counts one on average under every schedule and every kind of
    noise. For absorbing noise and the linear schedule it is `Nelbo`.
    """

    @property
    def bound_kind(self) -> BoundKind:
        """Pseudo-likelihood: only under absorbing noise with the linear schedule is it a bound, and there `Nelbo`."""
        return "pseudo"

    def weigh(self, t_BT, replaced_BT, schedule, *, batch=None) -> jax.Array:
        """Returns the weight on replaced tokens and 0 elsewhere."""
        return _over_rate(jnp.ones_like(t_BT), t_BT, replaced_BT, schedule)


@dataclasses.dataclass(frozen=True)
class InverseShare:
    """n / k on the k replaced ones of an example's n target tokens: the order-agnostic bound (arXiv 2110.02037).

    Needs `corruption.ExactCount` and a mask rate uniform in (0, 1], so that k is uniform in 1..n. With independent
    choices the examples in which nothing is masked would go missing: n / (n + 1) of the loss is left (trap T08).
    """

    needs_exact_count = True

    @property
    def bound_kind(self) -> BoundKind:
        """A bound, under absorbing noise over the full range of times."""
        return "nelbo"

    def weigh(self, t_BT, replaced_BT, schedule, *, batch=None) -> jax.Array:
        """Returns the weight on replaced tokens and 0 elsewhere."""
        assert batch is not None
        count = segment_sum(replaced_BT.astype(jnp.float32), batch.segment_ids)
        targets = segment_sum(batch.target_mask.astype(jnp.float32), batch.segment_ids)
        return jnp.where(replaced_BT, targets / jnp.maximum(count, 1.0), 0.0)


@dataclasses.dataclass(frozen=True)
class LinearDecay:
    """1 - (t - 1/T) on replaced tokens: bounded, but like the likelihood's weights larger at low noise (RDM).

    arXiv 2302.05737.

    Attributes:
      steps: T of a process in discrete time; None = continuous time, 1 - t.
    """

    steps: int | None = None

    @property
    def bound_kind(self) -> BoundKind:
        """Pseudo-likelihood: the bound's weights are 1/t."""
        return "pseudo"

    def weigh(self, t_BT, replaced_BT, schedule, *, batch=None) -> jax.Array:
        """Returns the weight on replaced tokens and 0 elsewhere."""
        step = 0.0 if self.steps is None else 1.0 / self.steps
        return jnp.where(replaced_BT, 1.0 - (t_BT - step), 0.0)


@dataclasses.dataclass(frozen=True)
class Cart:
    """A replaced token counts by the known tokens around it (CART of Dream, arXiv 2508.15487).

    w_n = 1/2 sum over known i of p (1 - p)^(|n - i| - 1), where the example's conditioning is known too. Tokens of
    other examples in a packed row are not counted.

    Attributes:
      p: how fast the influence of a known token falls with its distance; the sum reaches 1 where all others are known.
    """

    p: float = 0.1

    def __post_init__(self):
        require(0 < self.p < 1, f"p = {self.p} is not between 0 and 1", where="Cart.p", fix="Dream's recipe has 0.1.")

    @property
    def bound_kind(self) -> BoundKind:
        """Pseudo-likelihood."""
        return "pseudo"

    def weigh(self, t_BT, replaced_BT, schedule, *, batch=None) -> jax.Array:
        """Returns the weight on replaced tokens and 0 elsewhere."""
        assert batch is not None
        known = (~replaced_BT & (batch.segment_ids > 0)).astype(jnp.float32)
        both = _from_the_left(known, batch.segment_ids, self.p)
        both += _from_the_left(known[:, ::-1], batch.segment_ids[:, ::-1], self.p)[:, ::-1]
        return jnp.where(replaced_BT, 0.5 * both, 0.0)


def _over_rate(numerator_BT: jax.Array, t_BT: jax.Array, replaced_BT: jax.Array, schedule: Schedule) -> jax.Array:
    """Returns numerator / (1 - alpha) on replaced tokens; where nothing can be replaced the quotient is not taken."""
    rate = 1.0 - schedule.alpha(t_BT)
    return jnp.where(replaced_BT & (rate > 0), numerator_BT / jnp.where(rate > 0, rate, 1.0), 0.0)


def _from_the_left(known_BT: jax.Array, segment_ids_BT: jax.Array, p: float) -> jax.Array:
    """Returns sum over i < n of the same segment of known[i] p (1 - p)^(n - i - 1), as a recursion over the slots."""
    same = jnp.pad(segment_ids_BT[:, 1:] == segment_ids_BT[:, :-1], ((0, 0), (1, 0))).astype(jnp.float32)
    decay, inflow = (1.0 - p) * same, p * same * jnp.roll(known_BT, 1, axis=1)

    def then(first, second):
        return first[0] * second[0], first[1] * second[0] + second[1]

    return jax.lax.associative_scan(then, (decay, inflow), axis=1)[1]
