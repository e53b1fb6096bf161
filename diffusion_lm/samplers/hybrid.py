"""The reverse process of noise that holds MASK and wrong tokens, and GIDD's self-correction (arXiv 2503.04482)."""

import dataclasses

import jax
import jax.numpy as jnp

from diffusion_lm.core.errors import require
from diffusion_lm.nn.cross_entropy import Noised
from diffusion_lm.noise.contract import HYBRID_NOISE
from diffusion_lm.noise.interpolation import HybridNoise, noise_at
from diffusion_lm.samplers.commit import Rule
from diffusion_lm.samplers.view import Decision, View, places


@dataclasses.dataclass(frozen=True)
class HybridAncestral(Rule):
    """Every slot draws from its posterior: MASK is filled in, and a token may change or turn back into MASK.

    From time t to s, with r = alpha_t / alpha_s, n(z) = noise_t(z) - r noise_s(z), which is what the noise of the step
    holds of the slot's token z, and the noised prediction w = alpha_s p + noise_s,

        q(j | z) is proportional to [ r 1(j = z) + n(z) ] w_j    (GIDD, section 3; p has no MASK).

    So a slot keeps z with probability r w_z / (r w_z + n(z)) and draws from w otherwise, which may give MASK. In the
    last step of a block s is 0 and w = p, so no MASK is left. Under guidance log w is guided.

    Attributes:
      noise: the noise of the training.
    """

    noise: HybridNoise

    revises = True
    rewrites = True
    noise_kind = HYBRID_NOISE

    def noise_rate(self, view: View) -> jax.Array:
        """Returns 1 - alpha_t."""
        return 1.0 - self.noise.level(view.times()[0]).signal

    def transition(self, view: View) -> Noised:
        """Mixes the prediction with the noise of time s."""
        level = self.noise.level(view.times()[1])
        signal, mask, uniform = (
            jnp.broadcast_to(x, view.canvas.shape) for x in (level.signal, level.mask, level.uniform)
        )
        return Noised(signal, view.noise_size, mask, uniform, self.noise.mask_id)

    def decide(self, view: View) -> Decision:
        """Redraws the slots whose coin says so."""
        t, s = view.times()
        now, before = self.noise.level(t), self.noise.level(s)
        kept = now.signal / before.signal
        added = noise_at(
            view.canvas,
            self.noise.mask_id,
            now.mask - kept * before.mask,
            now.uniform - kept * before.uniform,
            view.noise_size,
        )
        stay = kept * jnp.exp(view.stats.target_log_prob)
        change = jnp.maximum(added, 0.0)
        # A token without probability, to which the step adds no noise, is impossible: it changes.
        impossible = stay + change <= 0
        return Decision(view.active & (impossible | (view.uniform("change") * (stay + change) < change)))


@dataclasses.dataclass(frozen=True)
class SelfCorrected(Rule):
    """The last `corrections` steps of a block correct its text one token at a time (GIDD, section 5.3).

        draw z' from softmax(logits / temperature) at every slot;
        of the slots with z' != z the `tokens` ones whose draws are most probable take them

    The network reads the whole text as noise of time `time`. The released code also ends when no draw differs, or when
    the agreement of the text with the argmax has not risen for 32 steps; here all steps are made.

    Attributes:
      rule: what fills the block in the steps before; those are `steps` less `corrections`, at least one.
      corrections: steps of correction; 128 in the released configuration.
      tokens: tokens that change in one of them.
      correction_temperature: of the draws of the correction; 0.1 in the paper.
      time: which the network is conditioned on, if it reads a time; 0.01 in the released configuration.
    """

    rule: HybridAncestral
    corrections: int = 128
    tokens: int = 1
    correction_temperature: float = 0.1
    time: float = 0.01

    revises = True
    rewrites = True
    needs_draws = True
    noise_kind = HYBRID_NOISE

    def __post_init__(self):
        for field in ("corrections", "tokens"):
            value = getattr(self, field)
            require(
                isinstance(value, int) and value >= 1,
                f"{field}={value!r}: must be a whole number >= 1",
                where=f"SelfCorrected.{field}",
                fix="The released configuration has corrections = 128, tokens = 1.",
            )
        require(
            self.correction_temperature > 0 and 0 < self.time < 1,
            f"correction_temperature={self.correction_temperature} must be > 0 and time={self.time} in (0, 1)",
            where="SelfCorrected",
            fix="The released configuration has 0.1 and 0.01.",
        )

    @property
    def noise(self) -> HybridNoise:
        """That of `rule`."""
        return self.rule.noise

    def noise_rate(self, view: View) -> jax.Array:
        """Returns that of `rule`, and in the correction that of `time`."""
        corrected = 1.0 - self.noise.level(jnp.float32(self.time)).signal
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

    def temperature(self, view: View, given: float | jax.Array) -> jax.Array:
        """Returns f32[R]: `given`, and in the correction its own."""
        return jnp.where(self._corrects(view)[:, 0], self.correction_temperature, given)

    def decide(self, view: View) -> Decision:
        """Fills the block, then corrects it."""
        differs = view.active & (view.stats.sample != view.canvas)
        best = differs & (places(view.stats.sample_log_prob, differs) < self.tokens)
        return Decision(jnp.where(self._corrects(view), best, self.rule.decide(self._filling(view)).write))

    def _steps(self, view: View) -> jax.Array:
        return jnp.maximum(view.steps - self.corrections, 1)

    def _corrects(self, view: View) -> jax.Array:
        """bool[R,1], rows that are past the steps of `rule`."""
        return (view.clock >= self._steps(view))[:, None]

    def _filling(self, view: View) -> View:
        """Returns the view in which the block has the steps of `rule` alone."""
        steps = self._steps(view)
        return view.replace(steps=steps, clock=jnp.minimum(view.clock, steps - 1))
