"""When a row may be called finished before its last step."""

import dataclasses
import math
from typing import Protocol

import jax
import jax.numpy as jnp

from diffusion_lm.core.errors import require
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
    """Says which rows have reached a fixed point.

    A canvas that a step left unchanged is no proof under fresh noise: another draw may still change it. But the network
    is deterministic, so while the canvas stands the distributions stand too, and the chance of any later change can be
    bounded. A token of probability p (temperature 1) is redrawn, at temperature tau <= 1, with probability at least
    p^(1/tau) / (p^(1/tau) + (1-p)^(1/tau)); top-k and top-p only raise it. A row is settled when the step left it
    unchanged and the expected number of changes in all remaining steps is at most `tolerance`, so the law of the result
    is within `tolerance` (total variation) of running every step. At temperature 0 the bound is zero: exact.

    Args:
      canvas: i32[B,T], input of the step.
      proposed: i32[B,T], its output.
      stats: statistics of the step at the tokens they speak about.
      target_mask: bool[B,T].
      temperature: static. Above 1 the bound does not hold and no row is ever settled.
      steps_left: i32[] or i32[B], the steps that would follow.
      tolerance: largest expected number of changes that is given up.

    Returns:
      bool[B], of each row alone, so neighbours do not matter.
    """
    unchanged = jnp.all((canvas == proposed) | ~target_mask, axis=1)
    if temperature == 0:
        return unchanged
    if temperature > 1:
        return jnp.zeros_like(unchanged)
    log_p = jnp.minimum(stats.sample_log_prob, 0.0)
    log_odds = log_p - jnp.log(-jnp.expm1(log_p))
    change = jax.nn.sigmoid(-log_odds / temperature)
    expected_changes = steps_left * jnp.sum(jnp.where(target_mask, change, 0.0), axis=1)
    return unchanged & (expected_changes <= tolerance)


class StopRule(Protocol):
    """Ends a row before its steps are used up."""

    @property
    def summaries(self) -> tuple[str, ...]:
        """What `token_stats` must compute for the rule."""
        ...

    @property
    def looks_at_text(self) -> bool:
        """Whether the rule looks at finished blocks alone, and not at the network's predictions in a step."""
        ...

    def stops(self, view: View) -> jax.Array:
        """Returns bool[R], the rows whose block is finished; it becomes the step's argmax."""
        ...

    def ends(self, canvas: jax.Array, written: jax.Array, target_mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns which rows end although blocks are left, bool[R], and what of their target is kept, bool[R,T].

        Args:
          canvas: i32[R,T].
          written: bool[R,T], the tokens of the conditioning and of the blocks up to the one that was just finished.
          target_mask: bool[R,T].
        """
        ...


@dataclasses.dataclass(frozen=True)
class StableAndSure:
    """The argmax is the canvas, everywhere in the block, and the network is sure of it (DiffusionGemma).

    Attributes:
      max_entropy: highest mean entropy per token, in nats, of the distributions that the rule reads.
    """

    max_entropy: float = 0.005

    looks_at_text = False

    def __post_init__(self):
        require(
            self.max_entropy >= 0,
            f"max_entropy = {self.max_entropy} is negative",
            where="StableAndSure.max_entropy",
            fix="DiffusionGemma uses 0.005.",
        )

    @property
    def summaries(self) -> tuple[str, ...]:
        """The entropy; a rule that asks for the tempered one provides it."""
        return ("entropy",)

    def stops(self, view: View) -> jax.Array:
        """Returns bool[R]."""
        same = jnp.all((view.stats.argmax == view.canvas) | ~view.active, axis=1)
        total = jnp.sum(jnp.where(view.active, view.stats.entropy, 0.0), axis=1)
        return same & (total <= self.max_entropy * view.active_count[:, 0])

    def ends(self, canvas: jax.Array, written: jax.Array, target_mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        """No row ends before its last block."""
        return jnp.zeros(canvas.shape[0], bool), target_mask & written


@dataclasses.dataclass(frozen=True)
class LowEntropy:
    """Generation ends after a block when the text has begun to repeat itself (BD3-LM, arXiv 2503.09573, appendix).

    H is the unigram entropy of the last `window` tokens, prompt included, -sum_v c_v/n log(c_v/n). Where a row has more
    than `window` tokens and H < `min_entropy`, it ends, and these tokens are dropped, as far as they are generated
    ones, as in the released code's sampling of texts of any length.

    Attributes:
      min_entropy: in nats; 4.0 in the released code.
      window: tokens; 256 in the released code. A text of n tokens has at most log n nats, 5.5 for 256.
      drop: leave the tokens of the window out of the target; False keeps them.
    """

    min_entropy: float = 4.0
    window: int = 256
    drop: bool = True

    looks_at_text = True

    def __post_init__(self):
        require(
            isinstance(self.window, int) and self.window >= 2,
            f"window={self.window!r}: must be a whole number >= 2",
            where="LowEntropy.window",
            fix="BD3-LM uses 256.",
        )
        require(
            0 <= self.min_entropy <= math.log(self.window),
            f"min_entropy={self.min_entropy}: must be in [0, {math.log(self.window):.2f}], the range of the entropy of "
            f"{self.window} tokens",
            where="LowEntropy.min_entropy",
            fix="BD3-LM uses 4.0 with 256 tokens.",
        )

    @property
    def summaries(self) -> tuple[str, ...]:
        """Nothing: it reads tokens."""
        return ()

    def stops(self, view: View) -> jax.Array:
        """False: a block is decoded to its end."""
        return jnp.zeros(view.canvas.shape[0], bool)

    def ends(self, canvas: jax.Array, written: jax.Array, target_mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        """See `StopRule.ends`."""
        count = jnp.sum(written, axis=1, keepdims=True)
        behind = count - jnp.cumsum(written, axis=1)
        last = written & (behind < self.window)
        repeats = count[:, 0] > self.window
        # -sum_v c_v/n log(c_v/n) is the mean over tokens of -log(c/n); ranks in sorted order give the counts.
        tokens = jnp.sort(jnp.where(last, canvas, -1), axis=1)
        first = jax.vmap(lambda row: jnp.searchsorted(row, row, side="left"))(tokens)
        after = jax.vmap(lambda row: jnp.searchsorted(row, row, side="right"))(tokens)
        log_share = jnp.log((after - first).astype(jnp.float32)) - math.log(self.window)
        entropy = -jnp.sum(jnp.where(tokens >= 0, log_share, 0.0), axis=1) / self.window
        over = repeats & (entropy < self.min_entropy)
        kept = target_mask & written & ~(last & self.drop)
        return over, kept


def ended(canvas: jax.Array, target_mask: jax.Array, mask_id: int, eos_id: int, pad_id: int) -> jax.Array:
    """Returns bool[R], rows that hold an end (EOS or PAD) with no MASK to the left of it in the target (trap T48)."""
    is_end = target_mask & ((canvas == eos_id) | (canvas == pad_id))
    holes = jnp.cumsum(target_mask & (canvas == mask_id), axis=1)
    return jnp.any(is_end & (holes == 0), axis=1)
