"""Commit rules: which open slots take the network's draw in a step. Most published samplers are one of these."""

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from diffusion_lm.core.errors import require
from diffusion_lm.nn.cross_entropy import Noised, Ratios
from diffusion_lm.noise.contract import PROBABILITIES
from diffusion_lm.noise.schedules import Linear
from diffusion_lm.samplers.base import check_choice
from diffusion_lm.samplers.counts import Even, Fixed
from diffusion_lm.samplers.view import Decision, View, places, slot_order

RANKS = ("confidence", "margin", "entropy", "random")
TINY = 1e-30


class CommitRule(Protocol):
    """One step's decision. Rules that take tokens back stand in `samplers.revision`."""

    @property
    def summaries(self) -> tuple[str, ...]:
        """What `token_stats` must compute beside the draw and its log-probability."""
        ...

    @property
    def blind(self) -> bool:
        """Whether the rule decides without the network; draws are then made for the chosen slots only (trap T03)."""
        ...

    @property
    def revises(self) -> bool:
        """Whether a written token may turn back into noise."""
        ...

    @property
    def rewrites(self) -> bool:
        """Whether the rule may write slots that do not hold MASK, where the noise has one."""
        ...

    @property
    def output(self) -> str:
        """What the rule takes the network's outputs for, one of `noise.contract.OUTPUTS`."""
        ...

    @property
    def noise_kind(self) -> str | None:
        """The noise that the rule undoes, one of `noise.contract.NOISES`; None = that of the start canvas."""
        ...

    def transition(self, view: View) -> Noised | Ratios | None:
        """Returns what the step makes of the network's outputs, arrays f32[R,T]; None draws from the prediction.

        The log-probabilities of the draws and of the canvas are then those of the mixture (`nn.cross_entropy`).
        """
        ...

    def temperature(self, view: View, given: float | jax.Array) -> float | jax.Array:
        """Returns the temperature of this step's draws, where the sampler's is `given`; f32[R] where rows differ."""
        ...

    def noise_rate(self, view: View) -> jax.Array | None:
        """Returns f32[R,1], the rate of noise that the rule takes the active slots to have; a network may be told it.

        None where the rule knows no rate.
        """
        ...

    def decide(self, view: View) -> Decision:
        """Returns what to write and what to erase. In the last step of a block all open slots are written anyway."""
        ...

    def at_most(self, view: View) -> Decision | None:
        """Returns the most that `decide` can say, whatever the draws are; None where only they can tell.

        A step in which that is nothing needs no network call. Blind rules are asked for their decision instead.
        """
        ...


class Rule:
    """Defaults of `CommitRule`: reads the draws and their log-probabilities, never takes anything back."""

    @property
    def summaries(self) -> tuple[str, ...]:
        """Nothing more."""
        return ()

    @property
    def blind(self) -> bool:
        """False: reads the draws."""
        return False

    @property
    def revises(self) -> bool:
        """False: what is written stands."""
        return False

    @property
    def rewrites(self) -> bool:
        """False: where the noise has MASK, slots that hold another token are never drawn again in place."""
        return False

    @property
    def output(self) -> str:
        """What the rule takes the network's outputs for (`noise.contract.OUTPUTS`): logarithms of probabilities."""
        return PROBABILITIES

    @property
    def noise_kind(self) -> str | None:
        """The noise that the rule undoes (`noise.contract.NOISES`); None = that of the start canvas."""
        return None

    def transition(self, view: View) -> Noised | Ratios | None:
        """None: the network's prediction is drawn from."""
        del view
        return None

    def temperature(self, view: View, given: float | jax.Array) -> float | jax.Array:
        """Returns `given`."""
        del view
        return given

    def noise_rate(self, view: View) -> jax.Array | None:
        """None: the rule counts slots or steps."""
        del view
        return None

    def at_most(self, view: View) -> Decision | None:
        """None: only the draws can tell."""
        del view
        return None


@dataclasses.dataclass(frozen=True)
class Everything(Rule):
    """All open slots take their draw, sure or not: every target token in every step for AR2Diff (arXiv 2401.17181)."""

    def decide(self, view: View) -> Decision:
        """Writes every open slot."""
        return Decision(view.open)


@dataclasses.dataclass(frozen=True)
class Ancestral(Rule):
    """The reverse process of absorbing noise: each open slot is revealed by a coin of its own.

    From time t to s a MASK is revealed with probability (alpha_s - (1 - sigma) alpha_t) / (1 - alpha_t), where sigma is
    the remasking rate, 0 in plain ancestral sampling (D3PM; MDLM, arXiv 2406.07524; MD4, 2406.04329). With
    remasking (ReMDM, arXiv 2503.00307) a committed token turns back into MASK with probability sigma, which keeps
    the share alpha_s of committed tokens.

    The coin comes first and only revealed slots draw a token. One draw over V + 1 outcomes has the same law on paper;
    in float32 it puts what matters at probability delta / V and loses it (traps T01, T02).

    Attributes:
      schedule: alpha, read on the even grid t = 1 - (1 - last_time) i / steps. A cosine grid of times under linear
        alpha is `schedules.Cosine` on the even grid.
      last_time: end of the grid; what is open then is written in the last step.
      remasking: rate at which committed tokens are taken back (`samplers.revision`), or None.
    """

    schedule: Any = Linear()
    last_time: float = 0.0
    remasking: Any = None

    blind = True

    def __post_init__(self):
        require(
            0 <= self.last_time < 1,
            f"last_time = {self.last_time} is no time below 1",
            where="Ancestral.last_time",
            fix="0.0 runs the whole process; Dream stops at 1e-3.",
        )

    @property
    def revises(self) -> bool:
        """Whether there is remasking."""
        return self.remasking is not None

    def noise_rate(self, view: View) -> jax.Array:
        """Returns 1 - alpha_t."""
        return 1.0 - self.schedule.alpha(view.times(self.last_time)[0])

    def decide(self, view: View) -> Decision:
        """Reveals open slots; with remasking, erases committed ones."""
        t, s = view.times(self.last_time)
        alpha_t, alpha_s = self.schedule.alpha(t), self.schedule.alpha(s)
        uniform = view.uniform("reveal")
        if self.remasking is None:
            return Decision(view.open & (uniform < (alpha_s - alpha_t) / jnp.maximum(1.0 - alpha_t, TINY)))
        limit = jnp.minimum((1.0 - alpha_s) / jnp.maximum(alpha_t, TINY), 1.0)
        sigma = jnp.minimum(self.remasking.rate(view, t, limit), limit)
        reveal = (alpha_s - (1.0 - sigma) * alpha_t) / jnp.maximum(1.0 - alpha_t, TINY)
        return Decision(view.open & (uniform < reveal), view.active & ~view.open & (uniform < sigma))


@dataclasses.dataclass(frozen=True)
class Ranked(Rule):
    """The `count` best open slots take their draw.

    Attributes:
      rank: "confidence", the draw's probability; "margin", that of the most likely token minus the second's;
        "entropy", the lowest first; or "random". Of the model at temperature 1, unfiltered, unless `tempered`.
      count: how many a step (`samplers.counts`).
      order_temperature: above 0 the slots are drawn without replacement from softmax(rank value / order_temperature)
        instead of taken in order (`alg_temp` of Dream). "confidence" enters as a probability, "entropy" as -H.
      tempered: take the ranks of the distributions that the tokens are drawn from, after temperature, top-k and top-p,
        as Dream's released code does, and not of the model's own. At temperature 0 both are the same.
    """

    rank: str = "confidence"
    count: Any = Even()
    order_temperature: float = 0.0
    tempered: bool = False

    def __post_init__(self):
        check_choice(self.rank, RANKS, "Ranked.rank")
        require(
            self.order_temperature >= 0,
            f"order_temperature = {self.order_temperature} is negative",
            where="Ranked.order_temperature",
            fix="0.0 takes the slots in order.",
        )

    @property
    def summaries(self) -> tuple[str, ...]:
        """The rank's own."""
        return (f"proposal_{self.rank}",) if self.tempered and not self.blind else summaries_of(self.rank)

    @property
    def blind(self) -> bool:
        """True for the random order."""
        return self.rank == "random"

    def decide(self, view: View) -> Decision:
        """Writes the best slots."""
        key = rank_key(view, self.rank, self.tempered)
        if self.order_temperature > 0 and not self.blind:
            value = jnp.exp(key) if self.rank == "confidence" else key
            key = value / self.order_temperature + view.gumbel("order")
        return Decision(view.open & (places(key, view.open) < self.count.commits(view)))


@dataclasses.dataclass(frozen=True)
class Threshold(Rule):
    """Every open slot whose draw has probability >= threshold, and at least the best one (Fast-dLLM, arXiv 2505.22618).

    Attributes:
      threshold: 0.9 in Fast-dLLM, 0.85 in SDAR, 0.95 in LLaDA 2.
      at_least: commits per step that are made in any case, 1 or more; `counts.Even()` is SDAR's dynamic variant.
    """

    threshold: float = 0.9
    at_least: Any = Fixed(1)

    def __post_init__(self):
        _check_share(self.threshold, "Threshold.threshold", "Fast-dLLM uses 0.9.")

    def decide(self, view: View) -> Decision:
        """Writes the confident slots."""
        key = view.stats.sample_log_prob
        least = jnp.maximum(self.at_least.commits(view), 1)
        return Decision(view.open & ((jnp.exp(key) >= self.threshold) | (places(key, view.open) < least)))


@dataclasses.dataclass(frozen=True)
class Factor(Rule):
    """The n most confident open slots, n as large as (n + 1) (1 - c_n) < factor allows, and at least one.

    c_n is the n-th highest confidence; with factor 1 this is the condition of Fast-dLLM's theorem (arXiv 2505.22618)
    under which parallel and sequential greedy decoding agree.

    Attributes:
      factor: 1 is the theorem's; lower is stricter.
    """

    factor: float = 1.0

    def __post_init__(self):
        require(
            self.factor > 0,
            f"factor = {self.factor} is not positive",
            where="Factor.factor",
            fix="1.0 is the condition of the theorem.",
        )

    def decide(self, view: View) -> Decision:
        """Writes the confident slots."""
        key = view.stats.sample_log_prob
        place = places(key, view.open)
        # The left side grows with n, so the slots that pass are the first ones.
        passes = (place + 2) * -jnp.expm1(jnp.minimum(key, 0.0)) < self.factor
        return Decision(view.open & (passes | (place == 0)))


@dataclasses.dataclass(frozen=True)
class EntropyBound(Rule):
    """The largest set of first-ranked open slots whose entropies sum to at most `bound` beside their largest one.

    sum H - max H bounds the information that the slots may have about each other and that drawing them independently
    gives up (EB-Sampler, arXiv 2505.24857). The first slot always passes.

    Attributes:
      bound: gamma in nats; 0 commits one token a step (more only where entropies are exactly 0).
      rank: the order in which slots are added; "entropy", the lowest first, gives the largest sets.
      tempered: take the entropies of the distributions that the tokens are drawn from, before top-k and top-p, and not
        of the model at temperature 1 (DiffusionGemma).
    """

    bound: float = 0.1
    rank: str = "entropy"
    tempered: bool = False

    def __post_init__(self):
        check_choice(self.rank, RANKS, "EntropyBound.rank")
        require(
            self.bound >= 0,
            f"bound = {self.bound} is negative",
            where="EntropyBound.bound",
            fix="0.1 is the usual value.",
        )

    @property
    def summaries(self) -> tuple[str, ...]:
        """The entropy, and the rank's own."""
        entropy = "tempered_entropy" if self.tempered else "entropy"
        return (entropy, *(name for name in summaries_of(self.rank) if name != "entropy"))

    def decide(self, view: View) -> Decision:
        """Writes the slots that the bound allows."""
        order = slot_order(rank_key(view, self.rank), view.open)
        entropies = jnp.take_along_axis(jnp.where(view.open, view.stats.entropy, 0.0), order, axis=1)
        lost = jnp.cumsum(entropies, axis=1) - jax.lax.cummax(entropies, axis=1)
        passes = (lost <= self.bound).at[:, 0].set(True)
        return Decision(view.open & jnp.take_along_axis(passes, jnp.argsort(order, axis=1), axis=1))


def summaries_of(rank: str) -> tuple[str, ...]:
    """Returns what a rank needs of `token_stats`."""
    return (rank,) if rank in ("margin", "entropy") else ()


def rank_key(view: View, rank: str, tempered: bool = False) -> jax.Array:
    """Returns f32[R,T], higher is better. Confidence stays a logarithm: probabilities near 1 would tie (trap T04).

    With `tempered` the statistics are those of the proposals (`Ranked.summaries` asks for them).
    """
    match rank:
        case "margin":
            return view.stats.margin
        case "entropy":
            return -view.stats.entropy
        case "random":
            return view.uniform("rank")
    return view.stats.proposal_log_prob if tempered else view.stats.sample_log_prob


def _check_share(value: float, where: str, fix: str) -> None:
    require(0 <= value <= 1, f"{value} is no probability", where=where, fix=fix)
