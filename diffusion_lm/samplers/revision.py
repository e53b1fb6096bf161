"""Commit rules that may take a token back, and the rates at which ReMDM does."""

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from diffusion_lm.core.errors import require
from diffusion_lm.nn.cross_entropy import Noised
from diffusion_lm.noise.schedules import Cosine, Linear
from diffusion_lm.samplers.commit import TINY, EntropyBound, Rule
from diffusion_lm.samplers.counts import Scheduled
from diffusion_lm.samplers.view import Decision, View, places


class RemaskingRate(Protocol):
    """sigma of ReMDM (arXiv 2503.00307): the probability with which a committed token turns back into MASK."""

    def rate(self, view: View, t: jax.Array, limit: jax.Array) -> jax.Array:
        """Returns sigma, f32[R,1] or f32[R,T].

        Args:
          view: the step.
          t: f32[R,1], the time at which the step begins.
          limit: f32[R,1], min(1, (1 - alpha_s) / alpha_t), above which no process has the right marginals.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Capped:
    """sigma = min(eta, limit), while the time is in (end, start] (ReMDM-cap; ReMDM-loop on a `Plateau`).

    Attributes:
      eta: highest rate.
      start: the rate is 0 above this time.
      end: and 0 from this time down.
    """

    eta: float = 0.008
    start: float = 1.0
    end: float = 0.0

    def __post_init__(self):
        _check_eta(self)

    def rate(self, view: View, t: jax.Array, limit: jax.Array) -> jax.Array:
        """Returns f32[R,1]."""
        # Half a thousandth of a step aside, so that a boundary that lies on the grid is met in float32 too.
        slack = 5e-4 / view.steps[:, None]
        return jnp.where((t <= self.start + slack) & (t > self.end + slack), jnp.minimum(self.eta, limit), 0.0)


@dataclasses.dataclass(frozen=True)
class Rescaled:
    """sigma = eta * limit (ReMDM-rescale).

    Attributes:
      eta: share of the highest possible rate.
    """

    eta: float = 0.015

    def __post_init__(self):
        _check_eta(self)

    def rate(self, view: View, t: jax.Array, limit: jax.Array) -> jax.Array:
        """Returns f32[R,1]."""
        del view, t
        return self.eta * limit


@dataclasses.dataclass(frozen=True)
class LeastConfident:
    """sigma_i = eta * limit * softmax_i(-p_i) over the committed slots of a block (ReMDM-conf).

    p_i is the probability that the token had when it was written. The rates add up to eta * limit over the block, and
    are 0 at open slots, whose chance of being revealed is then that of plain ancestral sampling.

    Attributes:
      eta: share of the highest possible rate.
    """

    eta: float = 1.0

    def __post_init__(self):
        _check_eta(self)

    def rate(self, view: View, t: jax.Array, limit: jax.Array) -> jax.Array:
        """Returns f32[R,T]."""
        del t
        committed = view.active & ~view.open
        weights = jnp.where(committed, jnp.exp(-jnp.exp(view.log_prob)), 0.0)
        return self.eta * limit * weights / jnp.maximum(jnp.sum(weights, axis=1, keepdims=True), 1e-30)


@dataclasses.dataclass(frozen=True)
class Plateau:
    """A schedule that rests: alpha rises from 0 to `level` by time `start`, waits until `end`, then rises to 1.

    ReMDM-loop holds the noise level while tokens are remasked and drawn again (arXiv 2503.00307).

    Attributes:
      level: alpha of the plateau.
      start: time at which it is reached (times fall from 1 to 0).
      end: time at which it is left.
    """

    level: float = 0.9
    start: float = 0.55
    end: float = 0.05

    def __post_init__(self):
        require(
            0 < self.level < 1 and 0 < self.end < self.start < 1,
            f"level = {self.level}, start = {self.start}, end = {self.end} is no plateau",
            where="Plateau",
            fix="ReMDM-loop uses level = 0.9, start = 0.55, end = 0.05; times fall from 1 to 0.",
        )

    def alpha(self, t: jax.Array) -> jax.Array:
        """Returns f32 in the shape of `t`."""
        rising = self.level * (1.0 - t) / (1.0 - self.start)
        finishing = 1.0 - (1.0 - self.level) * t / self.end
        return jnp.where(t < self.end, finishing, jnp.minimum(rising, self.level))

    def alpha_derivative(self, t: jax.Array) -> jax.Array:
        """Returns d alpha / d t."""
        return jnp.where(
            t < self.end,
            -(1.0 - self.level) / self.end,
            jnp.where(t > self.start, -self.level / (1.0 - self.start), 0.0),
        )


@dataclasses.dataclass(frozen=True)
class Routed(Rule):
    """RDM (arXiv 2302.05737): the floor(N (1 - alpha_s)) slots with the lowest fresh scores are MASK after the step.

    Scores are the log-probabilities of this step's draws, at committed slots too. An open slot outside the lowest takes
    its draw. A committed slot outside the lowest keeps the token it has, even if the network now prefers another.

    Attributes:
      schedule: alpha, read on the even grid.
      conditional: a committed slot is taken back only if it is among the lowest, its draw is the token that it holds,
        and the score fell since that token was written. False takes back whatever is among the lowest.
      noise: the ranking sees score + noise * (1 - alpha_s) * Gumbel; 0 is deterministic.
    """

    schedule: Any = Cosine()
    conditional: bool = False
    noise: float = 0.0

    revises = True

    def __post_init__(self):
        require(
            self.noise >= 0,
            f"noise = {self.noise} is negative",
            where="Routed.noise",
            fix="0.0 is deterministic; the paper's stochastic variant uses 1.0.",
        )

    def decide(self, view: View) -> Decision:
        """Writes and erases by one ranking of the whole block."""
        score = view.stats.sample_log_prob
        ranked = score
        if self.noise > 0:
            ranked = score + self.noise * (1.0 - self.schedule.alpha(view.times()[1])) * view.gumbel("route")
        lowest = places(-ranked, view.active) < Scheduled(self.schedule).left_open(view)
        erase = view.active & ~view.open & lowest
        if self.conditional:
            erase &= (view.stats.sample == view.canvas) & (score < view.log_prob)
        return Decision(view.open & ~lowest, erase)


@dataclasses.dataclass(frozen=True)
class Renoised(Rule):
    """What `rule` does not commit in this step turns into fresh noise (DiffusionGemma's canvas, uniform noise).

    Attributes:
      rule: which slots keep their draw.
    """

    rule: Any = EntropyBound(0.1, tempered=True)

    revises = True

    @property
    def summaries(self) -> tuple[str, ...]:
        """The rule's own."""
        return self.rule.summaries

    def decide(self, view: View) -> Decision:
        """Writes what the rule writes and erases the rest."""
        write = self.rule.decide(view).write
        return Decision(write, view.open & ~write)


@dataclasses.dataclass(frozen=True)
class UniformAncestral(Rule):
    """The reverse process of uniform noise (D3PM; UDLM, arXiv 2412.10193): every slot draws from its posterior.

    From time t to s, with r = alpha_t / alpha_s, token z and the noised prediction w = alpha_s p + (1 - alpha_s) / V,

        q(j | z) is proportional to [ r 1(j = z) + (1 - r) / V ] w_j .

    So a slot keeps z with probability r w_z / (r w_z + (1 - r) / V), and otherwise draws from w. D-CFG guides the
    logarithms of two such posteriors. The bracket is common to both, so what is guided is log w, and z is kept as
    before: exact, and the rare change is a coin of its own instead of an outcome of small probability (traps T01, T02).

    Attributes:
      schedule: alpha, read on the even grid from 1 to 0.
    """

    schedule: Any = Linear()

    revises = True
    needs_uniform_noise = True

    def noise_rate(self, view: View) -> jax.Array:
        """Returns 1 - alpha_t."""
        return 1.0 - self.schedule.alpha(view.times()[0])

    def transition(self, view: View) -> Noised:
        """Mixes the prediction with uniform noise of share 1 - alpha_s."""
        alpha_s = jnp.clip(self.schedule.alpha(view.times()[1]), 0.0, 1.0)
        return Noised(jnp.broadcast_to(alpha_s, view.canvas.shape), view.noise_size)

    def decide(self, view: View) -> Decision:
        """Redraws the slots whose coin says so."""
        t, s = view.times()
        alpha_s = jnp.maximum(self.schedule.alpha(s), TINY)
        kept = jnp.clip(self.schedule.alpha(t) / alpha_s, 0.0, 1.0)
        stay = kept * jnp.exp(view.stats.target_log_prob)
        change = (1.0 - kept) / view.noise_size
        return Decision(view.open & (view.uniform("change") * (stay + change) < change))


def _check_eta(rate: Any) -> None:
    require(
        0 <= rate.eta <= 1,
        f"eta = {rate.eta} is no probability",
        where=f"{type(rate).__name__}.eta",
        fix="0.0 never remasks.",
    )
