"""Predictor-corrector sampling of uniform noise: posteriors mixed with fresh noise (arXiv 2602.21185)."""

import dataclasses

import jax
import jax.numpy as jnp

from diffusion_lm.core.errors import require
from diffusion_lm.nn.cross_entropy import Noised
from diffusion_lm.noise.schedules import Linear, Schedule
from diffusion_lm.samplers.commit import Rule
from diffusion_lm.samplers.revision import UniformAncestral
from diffusion_lm.samplers.view import Decision, View


@dataclasses.dataclass(frozen=True)
class PredictorCorrector(Rule):
    """With probability kappa a slot takes a step of `UniformAncestral`, else it is denoised and noised again.

        z_s  ~  kappa q(z_s | z_t, p) + (1 - kappa) sum_x q(x | z_t, p) q(z_s | x),
        q(x | z_t, p) proportional to [ alpha_t 1(x = z_t) + (1 - alpha_t) / V ] p_x

    (Psi-samplers of "The Diffusion Duality, Chapter II", arXiv 2602.21185). Both terms have the marginal of time s, so
    the noise level stays that of the schedule, and a wrong token can be drawn again at any time. No pass is added.

    Which of the two a slot takes, and whether it becomes noise, is drawn before the network runs; the share of the
    prediction in what a slot draws is then alpha_s, 1, or 0.

    Attributes:
      schedule: alpha, read on the even grid from 1 to 0.
      kappa: share of the ancestral step; 1 is `UniformAncestral`, 0 the corrector alone.
      start: the corrector is off above this time.
      end: and off from this time down. The last step is always ancestral.
    """

    schedule: Schedule = Linear()
    kappa: float = 0.95
    start: float = 1.0
    end: float = 0.0

    revises = True
    needs_uniform_noise = True

    def __post_init__(self):
        require(
            0 <= self.kappa <= 1,
            f"kappa={self.kappa}: must be in [0, 1]",
            where="PredictorCorrector.kappa",
            fix="1.0 is ancestral sampling without a corrector.",
        )
        require(
            0 <= self.end < self.start <= 1,
            f"start={self.start}, end={self.end}: must satisfy 0 <= end < start <= 1",
            where="PredictorCorrector.start",
            fix="start = 1.0, end = 0.0 corrects all the time; times fall from 1 to 0.",
        )

    def noise_rate(self, view: View) -> jax.Array:
        """Returns 1 - alpha_t."""
        return self._predictor.noise_rate(view)

    def transition(self, view: View) -> Noised:
        """Mixes the prediction with uniform noise, by the kind of step that each slot takes."""
        predicts, noises = self._coins(view)
        signal = self._predictor.transition(view).signal_BT
        return Noised(jnp.where(predicts, signal, jnp.where(noises, 0.0, 1.0)), view.noise_size)

    def decide(self, view: View) -> Decision:
        """Redraws the slots whose coin says so."""
        predicts, noises = self._coins(view)
        t, s = view.times()
        alpha_t, alpha_s = (jnp.clip(self.schedule.alpha(time), 1e-30, 1.0) for time in (t, s))
        # The clean token of the corrector is the posterior at s = 0, so its coin is that of a step to alpha_s = 1.
        kept = jnp.where(predicts, jnp.clip(alpha_t / alpha_s, 0.0, 1.0), alpha_t)
        stay = kept * jnp.exp(view.stats.target_log_prob)
        change = (1.0 - kept) / view.noise_size
        redrawn = view.uniform("change") * (stay + change) < change
        return Decision(view.open & jnp.where(predicts | ~noises, redrawn, True))

    @property
    def _predictor(self) -> UniformAncestral:
        return UniformAncestral(self.schedule)

    def _coins(self, view: View) -> tuple[jax.Array, jax.Array]:
        """Returns bool[R,T] each: slots that take the ancestral step; of the others, those that turn into noise."""
        t, s = view.times()
        # Half a thousandth of a step aside, so that a boundary on the grid is met in float32 too.
        slack = 5e-4 / view.steps[:, None]
        corrects = (t <= self.start + slack) & (t > self.end + slack) & ~view.is_last
        predicts = ~corrects | (view.uniform("kappa") < self.kappa)
        return predicts, view.uniform("noise") >= jnp.clip(self.schedule.alpha(s), 0.0, 1.0)
