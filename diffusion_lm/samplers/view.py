"""What a rule reads of one denoising step, what it decides, and the order of slots."""

import flax.struct
import jax
import jax.numpy as jnp

from diffusion_lm.core.rng import fold_in_each, stream_number, uniform_each
from diffusion_lm.core.types import TokenStats
from diffusion_lm.noise.process import NoiseProcess


class View(flax.struct.PyTreeNode):
    """One denoising step of R rows (prompts x candidates).

    Attributes:
      canvas: i32[R,T], the input of the step.
      active: bool[R,T], the target slots of each row's current block; no others may change.
      open: bool[R,T], the active slots that may be sampled: those with MASK in a masked sampler, all in a canvas
        sampler.
      step: i32[R], number of steps done in the current block.
      steps: i32[R], number of steps of the block.
      log_prob: f32[R,T], log-probability of each slot's token when it was sampled.
      keys: key[R,T], the random keys of this step, one per token.
      process: the noise process that the sampler reverses; static.
      vocab_size: V, the number of tokens that uniform noise is drawn from; static.
      mask_id: the id of MASK, or None if the noise has none; static.
      draws: statistics of the network's prediction, for the slots where they were computed. Not set while a rule that
        ignores logits decides.
      logit_values: f32[R,T], what `Rule.from_logits` returned, or None.
      deferred: i32[R,1], number of noisy slots that are not open in this step; schedules count them, ranks do not.
      exponents: f32[V], the per-token schedules (`architectures.exponents`); None if the network has none.
    """

    canvas: jax.Array
    active: jax.Array
    open: jax.Array
    step: jax.Array
    steps: jax.Array
    log_prob: jax.Array
    keys: jax.Array
    process: NoiseProcess = flax.struct.field(pytree_node=False)
    vocab_size: int = flax.struct.field(pytree_node=False)
    mask_id: int | None = flax.struct.field(pytree_node=False)
    draws: TokenStats | None = None
    logit_values: jax.Array | None = None
    deferred: jax.Array | int = 0
    exponents: jax.Array | None = None

    @property
    def stats(self) -> TokenStats:
        """The statistics of the draws.

        Raises:
          ValueError: they are not computed yet, as for a rule that ignores logits.
        """
        if self.draws is None:
            raise ValueError("the rule reads `View.stats`, and says `ignores_logits`")
        return self.draws

    @property
    def active_count(self) -> jax.Array:
        """i32[R,1], number of slots of the block."""
        return jnp.sum(self.active, axis=1, keepdims=True, dtype=jnp.int32)

    @property
    def open_count(self) -> jax.Array:
        """i32[R,1], number of noisy slots of the block."""
        return jnp.sum(self.open, axis=1, keepdims=True, dtype=jnp.int32) + self.deferred

    @property
    def is_last(self) -> jax.Array:
        """bool[R,1], rows in the last step of their block."""
        return (self.step + 1 >= self.steps)[:, None]

    def times(self, last_time: float = 0.0) -> tuple[jax.Array, jax.Array]:
        """Returns (t, s), f32[R,1]: the step goes from time t down to s on an even grid from 1 to `last_time`."""
        per_step = (1.0 - last_time) / self.steps[:, None].astype(jnp.float32)
        step = self.step[:, None].astype(jnp.float32)
        return 1.0 - per_step * step, jnp.maximum(1.0 - per_step * (step + 1.0), last_time)

    def uniform(self, purpose: str) -> jax.Array:
        """Returns f32[R,T] uniforms in [0, 1), one stream per purpose."""
        return uniform_each(self._keys(purpose))

    def gumbel(self, purpose: str) -> jax.Array:
        """Returns f32[R,T] Gumbel noise with an accurate upper tail (traps T01, T05)."""
        keys = self._keys(purpose)
        draw = jax.vmap(lambda key: jax.random.gumbel(key, (), jnp.float32, mode="high"))
        return draw(keys.reshape(-1)).reshape(keys.shape)

    def _keys(self, purpose: str) -> jax.Array:
        return fold_in_each(self.keys, jnp.full(self.keys.shape, stream_number(purpose), jnp.uint32))


@flax.struct.dataclass
class Decision:
    """What a step does to the canvas; slots in neither set keep their token.

    Attributes:
      sample: bool[R,T], slots that are sampled: they are unmasked, or resampled.
      renoise: bool[R,T], active slots that are remasked (masked noise) or replaced by a fresh noise token (uniform
        noise). None if the rule never renoises.
    """

    sample: jax.Array
    renoise: jax.Array | None = None


def slot_order(key: jax.Array, among: jax.Array) -> jax.Array:
    """Returns i32[R,T], the slots of each row with those `among` first, by descending `key`, leftmost first in a tie.

    Membership is a sort key of its own and not -inf in `key`: a row with fewer candidates than requested would
    otherwise reach into the slots that are not candidates (trap T46).
    """
    return jnp.lexsort((-key, ~among), axis=-1).astype(jnp.int32)


def ranks(key: jax.Array, among: jax.Array) -> jax.Array:
    """Returns i32[R,T], each slot's rank in `slot_order`, 0 for the first."""
    return jnp.argsort(slot_order(key, among), axis=-1).astype(jnp.int32)
