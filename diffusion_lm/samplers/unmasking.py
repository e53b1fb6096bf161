"""Unmasking rules: which of the open slots take their draw in a step."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from diffusion_lm.core.checks import check_choice, check_non_negative, check_positive, check_probability
from diffusion_lm.samplers.counts import Count, Even, Fixed
from diffusion_lm.samplers.remasking_rates import RemaskingRate
from diffusion_lm.samplers.rule import MaskedRule, SlotRule
from diffusion_lm.samplers.view import Decision, View, ranks, slot_order

Rank = Literal["confidence", "margin", "entropy", "random"]
RANKS = ("confidence", "margin", "entropy", "random")
TINY = 1e-30


@dataclasses.dataclass(frozen=True)
class AllSlots(SlotRule):
    """Every open slot takes its draw: all target tokens in each step of AR2Diff (arXiv 2401.17181)."""

    def decide(self, view: View) -> Decision:
        """Samples every open slot."""
        return Decision(view.open)


@dataclasses.dataclass(frozen=True)
class Ancestral(MaskedRule):
    """The reverse process of absorbing noise: each MASK is revealed independently.

    From time t to s a MASK is revealed with probability

        (alpha_s - (1 - sigma) alpha_t) / (1 - alpha_t),

    where sigma is the remasking rate, 0 in plain ancestral sampling (D3PM; MDLM, arXiv 2406.07524; MD4, 2406.04329).
    With remasking (ReMDM, arXiv 2503.00307) an unmasked token is remasked with probability sigma, and the expected
    fraction of unmasked tokens stays alpha_s. alpha is the schedule of the sampler's process, read on the even grid
    t = 1 - (1 - last_time) i / steps; a cosine grid of times under linear alpha is `schedules.Cosine` on this grid.

    Attributes:
      last_time: end of the grid; the last step unmasks what is still masked.
      remasking: the rate sigma (`samplers.remasking_rates`), or None.
    """

    last_time: float = 0.0
    remasking: RemaskingRate | None = None

    # Revealing is decided first, and only revealed slots draw a token. One draw over V + 1 outcomes has the same law on
    # paper, but float32 cannot represent the probability delta / V of its outcomes (traps T01, T02).
    ignores_logits = True

    def __post_init__(self):
        check_probability(
            self.last_time, "Ancestral.last_time", "0.0 runs the whole process; Dream stops at 1e-3.", below_one=True
        )

    @property
    def remasks(self) -> bool:
        """Whether there is a remasking rate."""
        return self.remasking is not None

    def noise_rate(self, view: View) -> jax.Array:
        """Returns 1 - alpha_t."""
        return 1.0 - view.process.alpha(view.times(self.last_time)[0])

    def decide(self, view: View) -> Decision:
        """Reveals open slots; with remasking, remasks unmasked ones."""
        t, s = view.times(self.last_time)
        alpha_t, alpha_s = view.process.alpha(t), view.process.alpha(s)
        uniform = view.uniform("reveal")
        if self.remasking is None:
            return Decision(view.open & (uniform < (alpha_s - alpha_t) / jnp.maximum(1.0 - alpha_t, TINY)))
        # Above this limit no reverse process has the marginals of the schedule (ReMDM, equation 4).
        limit = jnp.minimum((1.0 - alpha_s) / jnp.maximum(alpha_t, TINY), 1.0)
        # Rates of a rule of its own may exceed the limit.
        sigma = jnp.minimum(self.remasking.rate(view, t, limit), limit)
        reveal = (alpha_s - (1.0 - sigma) * alpha_t) / jnp.maximum(1.0 - alpha_t, TINY)
        return Decision(view.open & (uniform < reveal), view.active & ~view.open & (uniform < sigma))


@dataclasses.dataclass(frozen=True)
class Ranked(SlotRule):
    """The `count` highest-ranked open slots take their draw.

    Attributes:
      rank: "confidence", the probability of the draw; "margin", the probability of the most likely token minus that of
        the second; "entropy", lowest first; or "random". Of the model at temperature 1, unfiltered, unless `tempered`.
      count: number of slots per step (`samplers.counts`).
      order_temperature: above 0, slots are drawn without replacement from softmax(rank value / order_temperature)
        instead of taken in order (`alg_temp` of Dream). "confidence" enters as a probability, "entropy" as -H.
      tempered: rank by the distributions that tokens are drawn from, after temperature, top-k and top-p, as Dream's
        released code does. At temperature 0 both are the same.
    """

    rank: Rank = "confidence"
    count: Count = Even()
    order_temperature: float = 0.0
    tempered: bool = False

    def __post_init__(self):
        check_choice(self.rank, RANKS, "Ranked.rank")
        check_non_negative(self.order_temperature, "Ranked.order_temperature", "0.0 takes the slots in order.")

    @property
    def summaries(self) -> tuple[str, ...]:
        """The rank's own statistic."""
        return (f"proposal_{self.rank}",) if self.tempered and not self.ignores_logits else summaries_of(self.rank)

    @property
    def ignores_logits(self) -> bool:  # type: ignore[override]
        """True for the random order."""
        return self.rank == "random"

    def decide(self, view: View) -> Decision:
        """Samples the highest-ranked slots."""
        key = rank_key(view, self.rank, self.tempered)
        if self.order_temperature > 0 and not self.ignores_logits:
            # Gumbel top-k: sorting by value + noise draws without replacement from the softmax.
            value = jnp.exp(key) if self.rank == "confidence" else key
            key = value / self.order_temperature + view.gumbel("order")
        return Decision(view.open & (ranks(key, view.open) < self.count.slots(view)))


@dataclasses.dataclass(frozen=True)
class Threshold(SlotRule):
    """Every open slot whose draw has probability >= threshold, and at least the best one (Fast-dLLM, arXiv 2505.22618).

    Attributes:
      threshold: 0.9 in Fast-dLLM, 0.85 in SDAR, 0.95 in LLaDA 2.
      at_least: slots per step that take their draw in any case, 1 or more; `counts.Even()` is SDAR's dynamic variant.
    """

    threshold: float = 0.9
    at_least: Count = Fixed(1)

    def __post_init__(self):
        check_probability(self.threshold, "Threshold.threshold", "Fast-dLLM uses 0.9.")

    def decide(self, view: View) -> Decision:
        """Samples the confident slots."""
        key = view.stats.sample_log_prob
        least = jnp.maximum(self.at_least.slots(view), 1)
        return Decision(view.open & ((jnp.exp(key) >= self.threshold) | (ranks(key, view.open) < least)))


@dataclasses.dataclass(frozen=True)
class Factor(SlotRule):
    """The n most confident open slots, for the largest n with (n + 1) (1 - c_n) < factor, and at least one.

    c_n is the n-th highest confidence. With factor 1 this is the condition of Fast-dLLM's theorem (arXiv 2505.22618)
    under which parallel and sequential greedy decoding agree.

    Attributes:
      factor: 1 is the theorem's; lower values are stricter.
    """

    factor: float = 1.0

    def __post_init__(self):
        check_positive(self.factor, "Factor.factor", "1.0 is the condition of the theorem.")

    def decide(self, view: View) -> Decision:
        """Samples the confident slots."""
        key = view.stats.sample_log_prob
        rank = ranks(key, view.open)
        # rank 0 is n = 1. The left side grows with n, so the slots that pass are the first ones.
        passes = (rank + 2) * -jnp.expm1(jnp.minimum(key, 0.0)) < self.factor
        return Decision(view.open & (passes | (rank == 0)))


@dataclasses.dataclass(frozen=True)
class EntropyBound(SlotRule):
    """The largest set of first-ranked open slots with sum H - max H <= bound.

    sum H - max H bounds the mutual information that drawing the slots independently ignores (EB-Sampler, arXiv
    2505.24857). The first slot always passes.

    Attributes:
      bound: gamma in nats; 0 samples one token per step (more only where entropies are exactly 0).
      rank: the order in which slots are added; "entropy", lowest first, gives the largest sets.
      tempered: use the entropies of the distributions that tokens are drawn from, before top-k and top-p, instead of
        the model's at temperature 1 (DiffusionGemma).
    """

    bound: float = 0.1
    rank: Rank = "entropy"
    tempered: bool = False

    def __post_init__(self):
        check_choice(self.rank, RANKS, "EntropyBound.rank")
        check_non_negative(self.bound, "EntropyBound.bound", "0.1 is the usual value.")

    @property
    def summaries(self) -> tuple[str, ...]:
        """The entropy, and the rank's own statistic."""
        entropy = "tempered_entropy" if self.tempered else "entropy"
        return (entropy, *(name for name in summaries_of(self.rank) if name != "entropy"))

    def decide(self, view: View) -> Decision:
        """Samples the slots that the bound allows."""
        assert view.stats.entropy is not None
        order = slot_order(rank_key(view, self.rank), view.open)
        entropies = jnp.take_along_axis(jnp.where(view.open, view.stats.entropy, 0.0), order, axis=1)
        # sum H - max H of the first n slots in order never falls with n, so one comparison per slot is enough.
        ignored = jnp.cumsum(entropies, axis=1) - jax.lax.cummax(entropies, axis=1)
        passes = (ignored <= self.bound).at[:, 0].set(True)
        return Decision(view.open & jnp.take_along_axis(passes, jnp.argsort(order, axis=1), axis=1))


def summaries_of(rank: str) -> tuple[str, ...]:
    """Returns what a rank needs of `BoundModel.token_stats`."""
    return (rank,) if rank in ("margin", "entropy") else ()


def rank_key(view: View, rank: str, tempered: bool = False) -> jax.Array:
    """Returns f32[R,T], higher is better. Confidence stays a logarithm: probabilities near 1 would tie (trap T04).

    With `tempered` the statistics are those of the proposals (`Ranked.summaries` asks for them).
    """
    if rank == "random":
        return view.uniform("rank")
    stats = view.stats
    if rank == "confidence":
        found = stats.proposal_log_prob if tempered else stats.sample_log_prob
    else:
        found = stats.margin if rank == "margin" else stats.entropy
    assert found is not None, "`summaries` asks for the statistic of the rank"
    return -found if rank == "entropy" else found
