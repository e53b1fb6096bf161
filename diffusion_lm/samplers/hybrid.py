"""The reverse process of noise that holds MASK and wrong tokens, and GIDD's self-correction (arXiv 2503.04482)."""

import dataclasses

import jax
import jax.numpy as jnp

from diffusion_lm.core.checks import check_count
from diffusion_lm.core.errors import require
from diffusion_lm.nn.cross_entropy import Noised
from diffusion_lm.noise.process import Hybrid, Marginal, noise_at
from diffusion_lm.samplers.rule import CanvasRule
from diffusion_lm.samplers.view import Decision, View, ranks


@dataclasses.dataclass(frozen=True)
class HybridAncestral(CanvasRule):
    """Every slot draws from its posterior: MASK is filled in, and a token may change or turn back into MASK.

    From time t to s, with r = alpha_t / alpha_s, n(z) = noise_t(z) - r noise_s(z), the mass that the noise of the step
    puts on the slot's token z, and the noised prediction w = alpha_s p + noise_s,

        q(j | z) is proportional to [ r 1(j = z) + n(z) ] w_j    (GIDD, section 3; p has no MASK).

    So a slot keeps z with probability r w_z / (r w_z + n(z)) and otherwise draws from w, which may give MASK. In the
    last step of a block s is 0 and w = p, so no MASK is left. With guidance log w is guided.
    """

    processes = (Hybrid,)
    mixes_noise = True

    def noise_rate(self, view: View) -> jax.Array:
        """Returns 1 - alpha_t."""
        return 1.0 - _marginal(view, view.times()[0]).signal

    def transition(self, view: View) -> Noised:
        """Mixes the prediction with the noise of time s."""
        at_s = _marginal(view, view.times()[1])
        signal, mask, uniform = (jnp.broadcast_to(x, view.canvas.shape) for x in (at_s.signal, at_s.mask, at_s.uniform))
        return Noised(signal, view.vocab_size, mask, uniform, view.mask_id)

    def decide(self, view: View) -> Decision:
        """Resamples the slots that change."""
        t, s = view.times()
        at_t, at_s = _marginal(view, t), _marginal(view, s)
        r = at_t.signal / at_s.signal
        mask, uniform = at_t.mask - r * at_s.mask, at_t.uniform - r * at_s.uniform
        # n(z) is never negative, but the difference of two float32 numbers may be.
        change = jnp.maximum(noise_at(view.canvas, view.mask_id, mask, uniform, view.vocab_size), 0.0)
        stay = r * jnp.exp(view.stats.target_log_prob)  # r w_z
        # A token without probability, to which the step adds no noise, is impossible: it changes.
        impossible = stay + change <= 0
        return Decision(view.active & (impossible | (view.uniform("change") * (stay + change) < change)))


@dataclasses.dataclass(frozen=True)
class SelfCorrected(CanvasRule):
    """The last `corrections` steps of a block correct its text one token at a time (GIDD, section 5.3).

        draw z' from softmax(logits / temperature) at every slot;
        of the slots with z' != z the `tokens` ones whose draws are most probable take them

    The network reads the whole text as noise of time `time`. The released code also ends when no draw differs, or when
    the agreement of the text with the argmax has not increased for 32 steps; here all steps are run.

    Attributes:
      rule: fills the block in the steps before, `steps` minus `corrections` of them, at least one.
      corrections: number of correction steps; 128 in the released configuration.
      tokens: tokens that change per correction step.
      correction_temperature: of the draws of the correction; 0.1 in the paper.
      time: the time that the network is conditioned on, if it is; 0.01 in the released configuration.
    """

    rule: HybridAncestral = HybridAncestral()
    corrections: int = 128
    tokens: int = 1
    correction_temperature: float = 0.1
    time: float = 0.01

    processes = (Hybrid,)
    mixes_noise = True
    draws_tokens = True

    def __post_init__(self):
        for name in ("corrections", "tokens"):
            check_count(
                getattr(self, name),
                f"SelfCorrected.{name}",
                "The released configuration has corrections = 128, tokens = 1.",
            )
        require(
            self.correction_temperature > 0 and 0 < self.time < 1,
            f"correction_temperature={self.correction_temperature} must be > 0 and time={self.time} in (0, 1)",
            where="SelfCorrected",
            fix="The released configuration has 0.1 and 0.01.",
        )

    def noise_rate(self, view: View) -> jax.Array:
        """Returns the noise rate of `rule`, and in the correction that of `time`."""
        corrected = 1.0 - _marginal(view, jnp.float32(self.time)).signal
        return jnp.where(self._corrects(view), corrected, self.rule.noise_rate(self._filling(view)))

    def transition(self, view: View) -> Noised:
        """Mixes the prediction with noise as `rule` does; in the correction nothing is mixed in."""
        filling, corrects = self.rule.transition(self._filling(view)), self._corrects(view)
        assert filling.mask_BT is not None
        assert filling.uniform_BT is not None
        return filling.replace(
            signal_BT=jnp.where(corrects, 1.0, filling.signal_BT),
            mask_BT=jnp.where(corrects, 0.0, filling.mask_BT),
            uniform_BT=jnp.where(corrects, 0.0, filling.uniform_BT),
        )

    def temperature(self, view: View, temperature: float) -> jax.Array:
        """Returns f32[R]: `temperature`, and in the correction its own."""
        return jnp.where(self._corrects(view)[:, 0], self.correction_temperature, temperature)

    def decide(self, view: View) -> Decision:
        """Fills the block, then corrects it."""
        differs = view.active & (view.stats.sample != view.canvas)
        best = differs & (ranks(view.stats.sample_log_prob, differs) < self.tokens)
        return Decision(jnp.where(self._corrects(view), best, self.rule.decide(self._filling(view)).sample))

    def _steps(self, view: View) -> jax.Array:
        return jnp.maximum(view.steps - self.corrections, 1)

    def _corrects(self, view: View) -> jax.Array:
        """bool[R,1], rows that are past the steps of `rule`."""
        return (view.step >= self._steps(view))[:, None]

    def _filling(self, view: View) -> View:
        """Returns the view in which the block has the steps of `rule` alone."""
        steps = self._steps(view)
        return view.replace(steps=steps, step=jnp.minimum(view.step, steps - 1))


def _marginal(view: View, t: jax.Array) -> Marginal:
    assert isinstance(view.process, Hybrid)
    return view.process.marginal(t)
