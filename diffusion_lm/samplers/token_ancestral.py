"""Ancestral sampling under masking schedules that are the tokens' own (GenMD4, arXiv 2406.04329, section 6)."""

import dataclasses

import jax
import jax.numpy as jnp

from diffusion_lm.core.errors import ConfigError, require
from diffusion_lm.samplers.commit import Rule
from diffusion_lm.samplers.view import Decision, View


@dataclasses.dataclass(frozen=True)
class TokenAncestral(Rule):
    """Each open slot draws its token j, and then reveals it at that token's rate or stays MASK.

    From time t to s token j is revealed with probability (alpha_s - alpha_t) / (1 - alpha_t) = 1 - (s/t)^(w_j), where
    alpha = 1 - t^(w_j) and w_j is the network's exponent. The slot is then j with probability mu_j (1 - (s/t)^(w_j))
    and MASK with the rest, which is the reverse process; a coin before the draw, as in `commit.Ancestral`, has another
    law as soon as exponents differ. The uniform number of the coin does not depend on the token, though: slots whose
    number is above the highest rate of all tokens stay MASK without the network.

    Attributes:
      last_time: end of the even grid of times; what is open then is written in the last step.
    """

    last_time: float = 0.0

    needs_token_schedules = True

    def __post_init__(self):
        require(
            0 <= self.last_time < 1,
            f"last_time = {self.last_time} is no time below 1",
            where="TokenAncestral.last_time",
            fix="0.0 runs the whole process.",
        )

    def noise_rate(self, view: View) -> jax.Array:
        """Returns t, of which `objectives.token_schedules` tells the network."""
        return view.times(self.last_time)[0]

    def decide(self, view: View) -> Decision:
        """Reveals what its token's coin says.

        Raises:
          ConfigError: the network has no exponents.
        """
        return self._revealed(view, _exponents(view)[view.stats.sample])

    def at_most(self, view: View) -> Decision:
        """Reveals what any token's coin would."""
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
            where="DenoisingSampler.commit",
            fix="Train one with gin/runs/token_schedules.gin, or use commit.Ancestral, whose schedule is fixed.",
        )
    return view.exponents
