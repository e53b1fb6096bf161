"""Rules for uniform noise: fresh noise for what is not sampled, ancestral sampling, and predictor-corrector steps."""

import dataclasses

import jax
import jax.numpy as jnp

from diffusion_lm.core.checks import check_probability
from diffusion_lm.core.errors import require
from diffusion_lm.nn.cross_entropy import Noised
from diffusion_lm.samplers.rule import CanvasRule, RuleState, SlotRule
from diffusion_lm.samplers.unmasking import TINY, EntropyBound
from diffusion_lm.samplers.view import Decision, View


@dataclasses.dataclass(frozen=True)
class Renoised(CanvasRule):
    """Slots that `rule` does not select take fresh noise tokens (DiffusionGemma's canvas).

    Attributes:
      rule: which slots keep their draw.
      final_temperature: the temperature falls linearly to this value over the steps of a block; None keeps it.
    """

    rule: SlotRule = EntropyBound(0.1, tempered=True)
    final_temperature: float | None = None

    def __post_init__(self):
        require(
            self.final_temperature is None or self.final_temperature > 0,
            f"final_temperature={self.final_temperature}: must be > 0",
            where="Renoised.final_temperature",
            fix="None keeps the temperature of Decoding; DiffusionGemma falls from 0.8 to 0.4.",
        )

    @property
    def draws_tokens(self) -> bool:  # type: ignore[override]
        """Whether there is a final temperature, which needs an initial one above 0."""
        return self.final_temperature is not None

    @property
    def summaries(self) -> tuple[str, ...]:
        """The rule's own."""
        return self.rule.summaries

    def init(self, rows: int) -> RuleState:
        """Returns the rule's own state."""
        return self.rule.init(rows)

    def temperature(self, view: View, temperature: float) -> float | jax.Array:
        """Returns f32[R], between `temperature` and `final_temperature`."""
        if self.final_temperature is None:
            return temperature
        left = 1.0 - view.step / view.steps
        return self.final_temperature + (temperature - self.final_temperature) * left

    def __call__(self, view: View, state: RuleState) -> tuple[Decision, RuleState]:
        """Samples what the rule samples and renoises the rest."""
        decision, state = self.rule(view, state)
        return Decision(decision.sample, view.open & ~decision.sample), state


@dataclasses.dataclass(frozen=True)
class UniformAncestral(CanvasRule):
    """The reverse process of uniform noise (D3PM; UDLM, arXiv 2412.10193): every slot draws from its posterior.

    From time t to s, with r = alpha_t / alpha_s, token z and the noised prediction w = alpha_s p + (1 - alpha_s) / V,

        q(j | z) is proportional to [ r 1(j = z) + (1 - r) / V ] w_j .

    So a slot keeps z with probability r w_z / (r w_z + (1 - r) / V), and otherwise draws from w. alpha is the schedule
    of the sampler's process, read on the even grid from 1 to 0. D-CFG guides the logarithms of two such posteriors. The
    bracket is common to both, so guiding log w and keeping z as before is exact. A change is decided by a Bernoulli
    draw of its own instead of being an outcome of small probability (traps T01, T02).
    """

    mixes_noise = True

    def noise_rate(self, view: View) -> jax.Array:
        """Returns 1 - alpha_t."""
        return 1.0 - view.process.alpha(view.times()[0])

    def transition(self, view: View) -> Noised:
        """Mixes the prediction with uniform noise of mass 1 - alpha_s."""
        alpha_s = jnp.clip(view.process.alpha(view.times()[1]), 0.0, 1.0)
        return Noised(jnp.broadcast_to(alpha_s, view.canvas.shape), view.vocab_size)

    def decide(self, view: View) -> Decision:
        """Resamples the slots that change."""
        t, s = view.times()
        alpha_s = jnp.maximum(view.process.alpha(s), TINY)
        r = jnp.clip(view.process.alpha(t) / alpha_s, 0.0, 1.0)
        stay = r * jnp.exp(view.stats.target_log_prob)  # r w_z
        change = (1.0 - r) / view.vocab_size
        return Decision(view.open & (view.uniform("change") * (stay + change) < change))


@dataclasses.dataclass(frozen=True)
class PredictorCorrector(CanvasRule):
    """With probability kappa a slot takes a step of `UniformAncestral`, else it is denoised and noised again.

        z_s  ~  kappa q(z_s | z_t, p) + (1 - kappa) sum_x q(x | z_t, p) q(z_s | x),
        q(x | z_t, p) proportional to [ alpha_t 1(x = z_t) + (1 - alpha_t) / V ] p_x

    (Psi-samplers of "The Diffusion Duality, Chapter II", arXiv 2602.21185). Both terms have the marginal of time s, so
    the noise level stays that of the schedule, and a wrong token can be resampled at any time. No pass is added.

    Attributes:
      kappa: probability of the ancestral step; 1 is `UniformAncestral`, 0 the corrector alone.
      start: the corrector is off above this time.
      end: the corrector is off at this time and below. The last step is always ancestral.
    """

    kappa: float = 0.95
    start: float = 1.0
    end: float = 0.0

    mixes_noise = True

    def __post_init__(self):
        check_probability(self.kappa, "PredictorCorrector.kappa", "1.0 is ancestral sampling without a corrector.")
        require(
            0 <= self.end < self.start <= 1,
            f"start={self.start}, end={self.end}: must satisfy 0 <= end < start <= 1",
            where="PredictorCorrector.start",
            fix="start = 1.0, end = 0.0 corrects all the time; times fall from 1 to 0.",
        )

    def noise_rate(self, view: View) -> jax.Array:
        """Returns 1 - alpha_t."""
        return UniformAncestral().noise_rate(view)

    def transition(self, view: View) -> Noised:
        """Mixes the prediction with uniform noise, by the kind of step that each slot takes."""
        predicts, noises = self._kinds(view)
        signal = UniformAncestral().transition(view).signal_BT
        # A slot of the predictor draws from alpha_s p + noise, one of the corrector from p, or from noise.
        return Noised(jnp.where(predicts, signal, jnp.where(noises, 0.0, 1.0)), view.vocab_size)

    def decide(self, view: View) -> Decision:
        """Resamples the slots that change."""
        predicts, noises = self._kinds(view)
        t, s = view.times()
        alpha_t, alpha_s = (jnp.clip(view.process.alpha(time), 1e-30, 1.0) for time in (t, s))
        # The clean token of the corrector is the posterior at s = 0, so its coin is that of a step to alpha_s = 1.
        r = jnp.where(predicts, jnp.clip(alpha_t / alpha_s, 0.0, 1.0), alpha_t)
        stay = r * jnp.exp(view.stats.target_log_prob)
        change = (1.0 - r) / view.vocab_size
        resampled = view.uniform("change") * (stay + change) < change
        return Decision(view.open & jnp.where(predicts | ~noises, resampled, True))

    def _kinds(self, view: View) -> tuple[jax.Array, jax.Array]:
        """Returns bool[R,T] each: slots that take the ancestral step; of the others, those that are renoised."""
        t, s = view.times()
        # A slack of 0.0005 steps, so that a boundary on the grid is met in float32 too.
        slack = 5e-4 / view.steps[:, None]
        corrects = (t <= self.start + slack) & (t > self.end + slack) & ~view.is_last
        predicts = ~corrects | (view.uniform("kappa") < self.kappa)
        return predicts, view.uniform("noise") >= jnp.clip(view.process.alpha(s), 0.0, 1.0)
