"""What a sampling algorithm is: a rule that decides, in each step, which slots are sampled and which are renoised.

`MaskedRule`s work on canvases with MASK (`masked.MaskedSampler`), `CanvasRule`s on canvases of ordinary tokens
(`canvas.CanvasSampler`), `SlotRule`s on both. A rule is a frozen dataclass; what it remembers from step to step is its
own state, a pytree of per-row arrays that `init` creates and `__call__` returns.
"""

from typing import ClassVar

import jax

from diffusion_lm.nn.cross_entropy import Noised, Ratios
from diffusion_lm.noise.contract import PROBABILITIES
from diffusion_lm.noise.process import Absorbing, Hybrid, Uniform
from diffusion_lm.samplers.view import Decision, View

RuleState = jax.typing.ArrayLike | tuple["RuleState", ...] | dict[str, "RuleState"]
"""A pytree of arrays [R,...]; () for a rule without state. Rows that do not take a step keep theirs."""


class Rule:
    """The defaults of a rule: no state, reads the draws and their log-probabilities, never renoises.

    Attributes:
      summaries: the statistics that the rule reads of `View.stats` in addition to the draw, its log-probability and
        the argmax (`BoundModel.token_stats`).
      reads_logits: whether the rule needs more of the logits than `summaries`; then `View.logit_values` is what
        `from_logits` makes of them.
      ignores_logits: whether the rule decides without the network; then only the slots that are sampled are
        computed and drawn (trap T03). Such a rule has no state.
      output: what the network's outputs mean, one of `noise.contract.OUTPUTS`.
      draws_tokens: whether the rule is not defined at temperature 0.
      mixes_noise: whether `transition` mixes the prediction with noise; guidance then needs unfiltered predictions.
      processes: the noise processes that the rule reverses.
    """

    ignores_logits: ClassVar[bool] = False
    reads_logits: ClassVar[bool] = False
    draws_tokens: ClassVar[bool] = False
    mixes_noise: ClassVar[bool] = False
    processes: ClassVar[tuple[type, ...]] = ()

    @property
    def summaries(self) -> tuple[str, ...]:
        """See the class."""
        return ()

    @property
    def output(self) -> str:
        """See the class."""
        return PROBABILITIES

    def init(self, rows: int) -> RuleState:
        """Returns the state of R rows before the first step."""
        del rows
        return ()

    def __call__(self, view: View, state: RuleState) -> tuple[Decision, RuleState]:
        """Returns the decision of one step and the next state."""
        return self.decide(view), state

    def decide(self, view: View) -> Decision:
        """Returns the decision of a rule without state."""
        raise NotImplementedError(f"{type(self).__name__} defines neither `decide` nor `__call__`")

    def from_logits(self, logits: jax.Array, draws: jax.Array) -> jax.Array:
        """Returns f32[b,t], the rule's own function of f32[b,t,V] logits and of i32[b,t] draws, for a chunk of slots.

        Each slot must be treated independently: chunks are cut along T, and slots are reordered.
        """
        raise NotImplementedError(f"{type(self).__name__} says `reads_logits` and does not define `from_logits`")

    def largest_decision(self, view: View) -> Decision | None:
        """Returns the largest sets that `decide` can return, for any draws; None if that depends on the draws.

        A step in which these are empty needs no forward pass.
        """
        del view
        return None

    def transition(self, view: View) -> Noised | Ratios | None:
        """Returns what the step makes of the network's outputs, arrays f32[R,T]; None draws from the prediction.

        The log-probabilities of the draws and of the canvas are then those of the result (`nn.cross_entropy`).
        """
        del view
        return None

    def temperature(self, view: View, temperature: float) -> float | jax.Array:
        """Returns the temperature of this step's draws, f32[R] if rows differ; `temperature` is the sampler's."""
        del view
        return temperature

    def noise_rate(self, view: View) -> jax.Array | None:
        """Returns f32[R,1], the noise rate of the active slots, the input of time-conditioned networks.

        None if the rule follows no noise schedule.
        """
        del view
        return None


class MaskedRule(Rule):
    """A rule for canvases with MASK: open slots hold MASK, and `Decision.sample` unmasks some of them.

    Attributes:
      remasks: whether an unmasked token may be remasked.
    """

    processes: ClassVar[tuple[type, ...]] = (Absorbing,)

    @property
    def remasks(self) -> bool:
        """See the class."""
        return False


class CanvasRule(Rule):
    """A rule for canvases of ordinary tokens: every slot of the block is open in each step.

    Attributes:
      settles: whether all steps of a block draw from the same distributions while the canvas stays as it is. Then the
        probability of any later change is bounded, and rows can end early (`stopping.settled`).
    """

    settles: ClassVar[bool] = False
    processes: ClassVar[tuple[type, ...]] = (Uniform,)


class SlotRule(MaskedRule, CanvasRule):
    """A rule that selects among the open slots, whatever the noise is, and never renoises."""

    settles = True
    processes = (Absorbing, Uniform, Hybrid)
