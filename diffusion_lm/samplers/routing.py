"""RDM's decoder: one ranking of all slots of a block decides which are MASK after the step (arXiv 2302.05737)."""

import dataclasses

from diffusion_lm.core.checks import check_non_negative
from diffusion_lm.noise.schedules import Cosine, Schedule
from diffusion_lm.samplers.counts import Scheduled
from diffusion_lm.samplers.rule import MaskedRule
from diffusion_lm.samplers.view import Decision, View, ranks


@dataclasses.dataclass(frozen=True)
class Routed(MaskedRule):
    """The floor(N (1 - alpha_s)) slots with the lowest scores are MASK after the step (RDM, arXiv 2302.05737).

    Scores are the log-probabilities of this step's draws, at unmasked slots too. A masked slot outside the lowest takes
    its draw. An unmasked slot outside the lowest keeps its token, even if the network now prefers another.

    Attributes:
      schedule: alpha of the number of masked slots, read on the even grid.
      conditional: an unmasked slot is remasked only if it is among the lowest, its draw is the token that it holds, and
        the score is lower than when that token was sampled. False remasks whatever is among the lowest.
      noise: the ranking reads score + noise * (1 - alpha_s) * Gumbel; 0 is deterministic.
    """

    schedule: Schedule = Cosine()
    conditional: bool = False
    noise: float = 0.0

    remasks = True  # type: ignore[assignment]

    def __post_init__(self):
        check_non_negative(self.noise, "Routed.noise", "0.0 is deterministic; the paper's stochastic variant uses 1.0.")

    def decide(self, view: View) -> Decision:
        """Unmasks and remasks by one ranking of the whole block."""
        score = view.stats.sample_log_prob
        ranked = score
        if self.noise > 0:
            ranked = score + self.noise * (1.0 - self.schedule.alpha(view.times()[1])) * view.gumbel("route")
        lowest = ranks(-ranked, view.active) < Scheduled(self.schedule).left_masked(view)
        remask = view.active & ~view.open & lowest
        if self.conditional:
            remask &= (view.stats.sample == view.canvas) & (score < view.log_prob)
        return Decision(view.open & ~lowest, remask)
