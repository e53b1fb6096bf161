"""Score entropy's samplers (SEDD, arXiv 2310.16834, section 4): steps that read log ratios of noisy probabilities.

A network of `objectives.score_entropy.ScoreEntropy` predicts s_j = log p_t(j)/p_t(z) for every token j at a slot that
holds z, and its output at z itself is never trained (the ratio is 1). Its softmax is not a distribution of clean
tokens, so no other rule can read it. The rules here read r_j = exp(s_j):

    Euler     z -> j with probability (t - s) sigma'(t) R(j -> z) r_j                       (section 4.1)
    Tweedie   z -> j in proportion to [exp(-d Q) r]_j [exp(d Q)]_(j -> z),  d = sigma(t) - sigma(s)   (section 4.2)

where R is the rate of the noise: 1 from any token to MASK, or 1/V between any two tokens. Euler's is right to first
order in the step, Tweedie's is the posterior exactly, as far as slots are independent.
"""

import dataclasses

import jax
import jax.numpy as jnp

from diffusion_lm.core.errors import require
from diffusion_lm.nn.cross_entropy import Ratios
from diffusion_lm.noise.contract import RATIOS, SCALED_RATIOS
from diffusion_lm.noise.process import Absorbing, Marginal, Uniform, noise_tokens
from diffusion_lm.samplers.rule import CanvasRule, MaskedRule
from diffusion_lm.samplers.view import Decision, View


@dataclasses.dataclass(frozen=True)
class _RatioRule(MaskedRule, CanvasRule):
    scale_by_sigma: bool = False
    last_time: float = 1e-5

    processes = (Absorbing, Uniform)

    def __post_init__(self):
        require(
            0 < self.last_time < 1,
            f"last_time={self.last_time}: must be in (0, 1)",
            where=f"{type(self).__name__}.last_time",
            fix="The released sampler uses 1e-5; a last step leads from there to no noise.",
        )

    @property
    def output(self) -> str:
        """Ratios, with or without their scale."""
        return SCALED_RATIOS if self.scale_by_sigma else RATIOS

    def noise_rate(self, view: View) -> jax.Array:
        """Returns 1 - alpha_t."""
        return 1.0 - _marginal(view, self._times(view)[0]).signal

    def decide(self, view: View) -> Decision:
        """Changes open slots with the probability that the ratios give."""
        assert view.stats.change is not None
        return Decision(view.open & (view.uniform("change") < view.stats.change))

    def _times(self, view: View) -> tuple[jax.Array, jax.Array]:
        """Returns (t, s), f32[R,1]: the even grid from 1 to `last_time`, and from there the last step to 0."""
        before_last = jnp.maximum(view.steps - 1, 1)[:, None].astype(jnp.float32)
        step = view.step[:, None].astype(jnp.float32)
        per_step = (1.0 - self.last_time) / before_last
        t = jnp.maximum(1.0 - per_step * step, self.last_time)
        return t, jnp.where(view.is_last, 0.0, jnp.maximum(t - per_step, self.last_time))

    def _ratios(self, view: View, marginal: Marginal, **weights: jax.Array) -> Ratios:
        """Returns the law of the step; `weights` broadcast to [R,T]."""
        shape = view.canvas.shape
        scale = jnp.zeros_like(marginal.signal)
        if self.scale_by_sigma:
            # What the objective adds to the outputs: under MASK noise ratios are clean conditionals times this.
            rest = jnp.maximum(marginal.mask + marginal.uniform, 1e-30)
            tokens = float(noise_tokens(view.mask_id, view.vocab_size))
            scale = jnp.log(marginal.signal) - jnp.log(rest) - jnp.log(tokens)
        return Ratios(
            tokens_BT=view.canvas,
            log_scale_BT=jnp.broadcast_to(scale, shape),
            last_BT=jnp.broadcast_to(view.is_last, shape),
            **{f"{name}_BT": jnp.broadcast_to(value, shape) for name, value in weights.items()},
        )


def _marginal(view: View, t: jax.Array) -> Marginal:
    assert isinstance(view.process, Absorbing | Uniform)
    return view.process.marginal(t)


@dataclasses.dataclass(frozen=True)
class ScoreTweedie(_RatioRule):
    """The analytic sampler of SEDD (arXiv 2310.16834, section 4.2): the exact posterior of each slot, given its ratios.

    With E = exp(sigma(t) - sigma(s)) and S the sum of the ratios of other tokens, under MASK noise a MASK becomes j
    with probability (E - 1) r_j. Under uniform noise, with e = (1 - 1/E)/V,

        z -> j in proportion to e (r_j - e (1 + S)),    z stays in proportion to (1/E + e)(1 - e (1 + S)).

    The last step of a block leads from `last_time` to no noise and unmasks every MASK (the released code's
    `noise_removal`). `steps` counts it, while the released sampler runs one pass more than its `steps`.

    Attributes:
      scale_by_sigma: as in the objective: whether the network leaves out the scale of the ratios.
      last_time: where the grid from time 1 ends and the last step begins; 1e-5 in the released code.
    """

    def transition(self, view: View) -> Ratios:
        """Returns the law of the step, a function of the ratios."""
        t, s = self._times(view)
        now, before = _marginal(view, t), _marginal(view, s)
        # 1 / E. Schedules may begin with a little noise (`Geometric`), all of which the last step removes.
        kept = jnp.clip(now.signal / jnp.where(view.is_last, 1.0, before.signal), 1e-30, 1.0)
        zero, one = jnp.zeros_like(kept), jnp.ones_like(kept)
        if view.mask_id is not None:
            gain = 1.0 / kept - 1.0
            return self._ratios(view, now, gain=gain, loss=zero, own=one, own_loss=gain)
        moved = (1.0 - kept) / view.vocab_size
        stay = kept + moved
        return self._ratios(view, now, gain=moved, loss=moved**2, own=stay * (1.0 - moved), own_loss=stay * moved)


@dataclasses.dataclass(frozen=True)
class ScoreEuler(_RatioRule):
    """The Euler sampler of SEDD (arXiv 2310.16834, section 4.1): reverse rates that are constant during a step.

    A slot changes to j with probability (t - s) sigma'(t) r_j, under uniform noise divided by V; where these sum to
    more than 1, in proportion to them. The last step is that of `ScoreTweedie`, as in the released code.

    Attributes:
      scale_by_sigma: as in `ScoreTweedie`.
      last_time: as in `ScoreTweedie`.
    """

    def transition(self, view: View) -> Ratios:
        """Returns the law of the step, a function of the ratios."""
        t, s = self._times(view)
        level = _marginal(view, t)
        rate = level.uniform_rate / view.vocab_size if view.mask_id is None else level.mask_rate
        gain, zero = (t - s) * rate, jnp.zeros_like(t)
        euler = self._ratios(view, level, gain=gain, loss=zero, own=jnp.ones_like(t), own_loss=gain)
        last = ScoreTweedie(self.scale_by_sigma, self.last_time).transition(view)
        return jax.tree.map(lambda a, b: jnp.where(view.is_last, a, b), last, euler)
