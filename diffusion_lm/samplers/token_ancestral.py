"""Ancestral sampling with per-token masking schedules (GenMD4, arXiv 2406.04329, section 6)."""

import dataclasses

import jax
import jax.numpy as jnp

from diffusion_lm.core.checks import check_probability
from diffusion_lm.core.errors import ConfigError
from diffusion_lm.samplers.rule import MaskedRule
from diffusion_lm.samplers.view import Decision, View


@dataclasses.dataclass(frozen=True)
class TokenAncestral(MaskedRule):
    """Each MASK draws its token j, and is then revealed at that token's rate or stays MASK.

    From time t to s token j is revealed with probability (alpha_s - alpha_t) / (1 - alpha_t) = 1 - (s/t)^(w_j), where
    alpha = 1 - t^(w_j) and w_j is the network's exponent. The slot is then j with probability mu_j (1 - (s/t)^(w_j))
    and MASK with the rest, which is the reverse process. Deciding before the draw, as in `unmasking.Ancestral`, has
    another law as soon as exponents differ. But the uniform number of the decision does not depend on the token: slots
    whose number is above the highest rate of all tokens stay MASK without a forward pass.

    Attributes:
      last_time: end of the even grid of times; the last step unmasks what is still masked.
    """

    last_time: float = 0.0

    needs_token_schedules = True

    def __post_init__(self):
        check_probability(self.last_time, "TokenAncestral.last_time", "0.0 runs the whole process.", below_one=True)

    def noise_rate(self, view: View) -> jax.Array:
        """Returns t, on which `objectives.token_schedules` conditions the network."""
        return view.times(self.last_time)[0]

    def decide(self, view: View) -> Decision:
        """Reveals slots at the rate of their token.

        Raises:
          ConfigError: the network has no exponents.
        """
        return self._revealed(view, _exponents(view)[view.stats.sample])

    def largest_decision(self, view: View) -> Decision:
        """Reveals slots at the highest rate of all tokens."""
        return self._revealed(view, jnp.max(_exponents(view)))

    def _revealed(self, view: View, w: jax.Array) -> Decision:
        t, s = view.times(self.last_time)
        # In logarithms, so that the many small probabilities of a long grid keep their digits; s = 0 gives 1.
        reveal = -jnp.expm1(w * (jnp.log(s) - jnp.log(t)))
        return Decision(view.open & (view.uniform("reveal") < reveal))


def _exponents(view: View) -> jax.Array:
    if view.exponents is None:
        raise ConfigError(
            "the network has no exponents",
            where="MaskedSampler.unmask",
            fix="Train one with gin/runs/token_schedules.gin, or use unmasking.Ancestral, whose schedule is fixed.",
        )
    return view.exponents
