"""Loss weights of tokens as a function of the noise level.

In the masked family, let m = 1 - alpha(t) be the mask rate, the probability that a token is replaced. A weight is
unbiased if its mean over t and over the choice of tokens is 1 for every token. The weighted loss is a likelihood bound
if, in addition, m is uniform.
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
    """Weights of the per-token loss. They multiply `Batch.loss_weights` and do not enter the denominator of the loss.

    Weightings for a process of T discrete steps have a field `steps`, which must equal that of the time sampler.
    """

    @property
    def bound_kind(self) -> BoundKind:
        """Relation of the weighted loss to the likelihood, for the noise process that the weights belong to."""
        ...

    def weigh(
        self, t_BT: jax.Array, replaced_BT: jax.Array, schedule: Schedule, *, batch: Batch | None = None
    ) -> jax.Array:
        """Returns the weights, f32[B,T], for times `t_BT` and replaced tokens `replaced_BT`, bool[B,T]."""
        ...


@dataclasses.dataclass(frozen=True)
class Flat:
    """Weight 1 for every target token at every noise level, replaced or not (AR2Diff).

    The loss on intact tokens trains the model to recognise which tokens are noise (trap T17). The result is not a
    likelihood bound; uniform-noise models of the SUNDAE family have none.
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
    """Weight 1 for every replaced token at every noise level (masked language models; MaskGIT)."""

    @property
    def bound_kind(self) -> BoundKind:
        """Pseudo-likelihood: a bound needs larger weights at low noise."""
        return "pseudo"

    def weigh(self, t_BT, replaced_BT, schedule, *, batch=None) -> jax.Array:
        """Returns 1 on replaced tokens and 0 elsewhere."""
        return replaced_BT.astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class Nelbo:
    """The likelihood weights of absorbing noise, on replaced tokens.

    Continuous time: -alpha'(t) / (1 - alpha(t)) (MDLM, arXiv 2406.07524; MD4, 2406.04329). T steps of 1/T:
    T (alpha(t - 1/T) - alpha(t)) / (1 - alpha(t)) (D3PM, 2107.03006). Both are 1/t for the linear schedule. The mean
    over t of weight x mask rate is alpha(0) - alpha(1), which is 1 if the schedule covers the full range (trap T12).

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

    The inverse of the probability of being replaced, so the mean weight of each token is 1 under every schedule and
    noise. For absorbing noise and the linear schedule it equals `Nelbo`.
    """

    @property
    def bound_kind(self) -> BoundKind:
        """Pseudo-likelihood; a bound only for absorbing noise with the linear schedule, where it equals `Nelbo`."""
        return "pseudo"

    def weigh(self, t_BT, replaced_BT, schedule, *, batch=None) -> jax.Array:
        """Returns the weight on replaced tokens and 0 elsewhere."""
        return _over_rate(jnp.ones_like(t_BT), t_BT, replaced_BT, schedule)


@dataclasses.dataclass(frozen=True)
class InverseShare:
    """n / k on the k replaced tokens of an example with n target tokens: order-agnostic bound (arXiv 2110.02037).

    Needs `choice.ExactCount` and a mask rate uniform in (0, 1], so that k is uniform in 1..n. With independent choices,
    examples without a masked token would contribute nothing, and the loss would be n / (n + 1) of the bound (trap T08).
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
    """1 - (t - 1/T) on replaced tokens: larger at low noise, like the likelihood weights, but bounded.

    RDM, arXiv 2302.05737.

    Attributes:
      steps: T of a process in discrete time; None = continuous time, 1 - t.
    """

    steps: int | None = None

    @property
    def bound_kind(self) -> BoundKind:
        """Pseudo-likelihood: the weights of the bound are 1/t."""
        return "pseudo"

    def weigh(self, t_BT, replaced_BT, schedule, *, batch=None) -> jax.Array:
        """Returns the weight on replaced tokens and 0 elsewhere."""
        step = 0.0 if self.steps is None else 1.0 / self.steps
        return jnp.where(replaced_BT, 1.0 - (t_BT - step), 0.0)


@dataclasses.dataclass(frozen=True)
class Cart:
    """Weights replaced tokens by the visible tokens around them (CART of Dream, arXiv 2508.15487).

    w_n = 1/2 sum over visible i of p (1 - p)^(|n - i| - 1). Conditioning counts as visible. Tokens of other examples in
    a packed row are not counted.

    Attributes:
      p: decay of the influence of a visible token with its distance. The weight tends to 1 if all others are visible.
    """

    p: float = 0.1

    def __post_init__(self):
        require(0 < self.p < 1, f"p={self.p}: must be in (0, 1)", where="Cart.p", fix="Dream's recipe uses 0.1.")

    @property
    def bound_kind(self) -> BoundKind:
        """Pseudo-likelihood."""
        return "pseudo"

    def weigh(self, t_BT, replaced_BT, schedule, *, batch=None) -> jax.Array:
        """Returns the weight on replaced tokens and 0 elsewhere."""
        assert batch is not None
        visible = (~replaced_BT & (batch.segment_ids > 0)).astype(jnp.float32)
        both = _decayed_sum(visible, batch.segment_ids, self.p)
        both += _decayed_sum(visible[:, ::-1], batch.segment_ids[:, ::-1], self.p)[:, ::-1]
        return jnp.where(replaced_BT, 0.5 * both, 0.0)


def _over_rate(numerator_BT: jax.Array, t_BT: jax.Array, replaced_BT: jax.Array, schedule: Schedule) -> jax.Array:
    """Returns numerator / (1 - alpha) on replaced tokens and 0 elsewhere, also where 1 - alpha is 0."""
    rate = 1.0 - schedule.alpha(t_BT)
    return jnp.where(replaced_BT & (rate > 0), numerator_BT / jnp.where(rate > 0, rate, 1.0), 0.0)


def _decayed_sum(visible_BT: jax.Array, segment_ids_BT: jax.Array, p: float) -> jax.Array:
    """Returns at slot n the sum over i < n of the same segment of visible[i] p (1 - p)^(n - i - 1)."""
    # The recursion s[n] = (1 - p) s[n - 1] + p visible[n - 1], restarted at segment boundaries.
    same = jnp.pad(segment_ids_BT[:, 1:] == segment_ids_BT[:, :-1], ((0, 0), (1, 0))).astype(jnp.float32)
    decay, inflow = (1.0 - p) * same, p * same * jnp.roll(visible_BT, 1, axis=1)

    def then(first, second):
        return first[0] * second[0], first[1] * second[0] + second[1]

    return jax.lax.associative_scan(then, (decay, inflow), axis=1)[1]
