"""When a row may end before its last step."""

import dataclasses
import math
from typing import Protocol

import jax
import jax.numpy as jnp

from diffusion_lm.core.checks import check_count, check_non_negative
from diffusion_lm.core.errors import require
from diffusion_lm.core.special import SpecialTokens
from diffusion_lm.core.types import TokenStats
from diffusion_lm.samplers.view import View


def settled(
    canvas: jax.Array,
    proposed: jax.Array,
    stats: TokenStats,
    target_mask: jax.Array,
    *,
    temperature: float,
    steps_left: jax.Array,
    tolerance: float,
) -> jax.Array:
    """Returns which rows have reached a fixed point.

    An unchanged canvas alone does not show that: another draw may still change it. But the network is deterministic, so
    while the canvas stays the same its distributions do too, and the probability of any later change can be bounded. A
    token of probability p (temperature 1) changes, at temperature tau <= 1, with probability at most

        (1-p)^(1/tau) / (p^(1/tau) + (1-p)^(1/tau));

    top-k and top-p only lower it. A row is settled when the step left it unchanged and the expected number of changes
    in all remaining steps is at most `tolerance`. The law of the result is then within `tolerance` (total variation) of
    running every step. At temperature 0 the bound is zero: exact.

    Args:
      canvas: i32[B,T], input of the step.
      proposed: i32[B,T], its output.
      stats: statistics of the step, per token.
      target_mask: bool[B,T].
      temperature: static. Above 1 the bound does not hold and no row is ever settled.
      steps_left: i32[] or i32[B], the number of remaining steps.
      tolerance: the largest expected number of changes that is accepted.

    Returns:
      bool[B], which does not depend on other rows.
    """
    # Per row: the result must not depend on the other rows of the batch.
    unchanged = jnp.all((canvas == proposed) | ~target_mask, axis=1)
    if temperature == 0:
        return unchanged
    if temperature > 1:
        return jnp.zeros_like(unchanged)
    log_p = jnp.minimum(stats.sample_log_prob, 0.0)
    # log p - log(1 - p), with expm1 because p may be within rounding of 1.
    log_odds = log_p - jnp.log(-jnp.expm1(log_p))
    change = jax.nn.sigmoid(-log_odds / temperature)
    expected_changes = steps_left * jnp.sum(jnp.where(target_mask, change, 0.0), axis=1)
    return unchanged & (expected_changes <= tolerance)


class CanvasStop(Protocol):
    """Ends a block of a canvas sampler early. Implementations are frozen dataclasses."""

    def __hash__(self) -> int: ...

    @property
    def summaries(self) -> tuple[str, ...]:
        """The statistics that the rule reads (`BoundModel.token_stats`)."""
        ...

    def stops(self, view: View) -> jax.Array:
        """Returns bool[R], the rows whose block is finished; it becomes the argmax of the step."""
        ...


class TextStop(Protocol):
    """Ends a row of a masked sampler after a finished block. Implementations are frozen dataclasses."""

    def __hash__(self) -> int: ...

    def ends(self, canvas: jax.Array, text: jax.Array, target_mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns the rows that end, bool[R], and the target tokens that stay, bool[R,T].

        Args:
          canvas: i32[R,T].
          text: bool[R,T], the tokens of the conditioning and of the blocks up to the one that was just finished.
          target_mask: bool[R,T].
        """
        ...


@dataclasses.dataclass(frozen=True)
class StableAndSure:
    """The argmax equals the canvas everywhere in the block, and the mean entropy is low (DiffusionGemma).

    Attributes:
      max_entropy: highest mean entropy per token, in nats, of the distributions that the rule reads.
    """

    max_entropy: float = 0.005

    def __post_init__(self):
        check_non_negative(self.max_entropy, "StableAndSure.max_entropy", "DiffusionGemma uses 0.005.")

    @property
    def summaries(self) -> tuple[str, ...]:
        """The entropy; a rule that asks for the tempered one provides it."""
        return ("entropy",)

    def stops(self, view: View) -> jax.Array:
        """Returns bool[R]."""
        assert view.stats.entropy is not None
        same = jnp.all((view.stats.argmax == view.canvas) | ~view.active, axis=1)
        total = jnp.sum(jnp.where(view.active, view.stats.entropy, 0.0), axis=1)
        return same & (total <= self.max_entropy * view.active_count[:, 0])


@dataclasses.dataclass(frozen=True)
class LowEntropy:
    """Generation ends after a block when the text repeats itself (BD3-LM, arXiv 2503.09573, appendix).

    H is the unigram entropy of the last `window` tokens, prompt included, -sum_v c_v/n log(c_v/n). A row with more than
    `window` tokens and H < `min_entropy` ends, and the generated ones of these tokens are dropped, as in the released
    code's sampling of texts of any length.

    Attributes:
      min_entropy: in nats; 4.0 in the released code.
      window: tokens; 256 in the released code. A text of n tokens has at most log n nats, 5.5 for 256.
      drop: leave the tokens of the window out of the target; False keeps them.
    """

    min_entropy: float = 4.0
    window: int = 256
    drop: bool = True

    def __post_init__(self):
        check_count(self.window, "LowEntropy.window", "BD3-LM uses 256.", minimum=2)
        require(
            0 <= self.min_entropy <= math.log(self.window),
            f"min_entropy={self.min_entropy}: must be in [0, {math.log(self.window):.2f}], the range of the entropy of "
            f"{self.window} tokens",
            where="LowEntropy.min_entropy",
            fix="BD3-LM uses 4.0 with 256 tokens.",
        )

    def ends(self, canvas: jax.Array, text: jax.Array, target_mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        """See `TextStop.ends`."""
        count = jnp.sum(text, axis=1, keepdims=True)
        later = count - jnp.cumsum(text, axis=1)  # text tokens after each slot
        last = text & (later < self.window)
        is_long = count[:, 0] > self.window
        # -sum_v c_v/n log(c_v/n) is the mean over tokens of -log(c/n); ranks in sorted order give the counts.
        tokens = jnp.sort(jnp.where(last, canvas, -1), axis=1)
        first = jax.vmap(lambda row: jnp.searchsorted(row, row, side="left"))(tokens)
        after = jax.vmap(lambda row: jnp.searchsorted(row, row, side="right"))(tokens)
        log_share = jnp.log((after - first).astype(jnp.float32)) - math.log(self.window)
        entropy = -jnp.sum(jnp.where(tokens >= 0, log_share, 0.0), axis=1) / self.window
        return is_long & (entropy < self.min_entropy), target_mask & text & ~(last & self.drop)


def has_finished_text(canvas: jax.Array, target_mask: jax.Array, mask_id: int, special: SpecialTokens) -> jax.Array:
    """Returns bool[R], rows with an end (EOS or PAD) that has no MASK before it in the target (trap T48)."""
    is_end = target_mask & special.is_end(canvas)
    masked_before = jnp.cumsum(target_mask & (canvas == mask_id), axis=1)
    return jnp.any(is_end & (masked_before == 0), axis=1)
