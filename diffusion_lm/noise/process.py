"""Noise processes: the forward process q(z_t | x) that objectives, samplers and likelihood bounds all share.

    q(z_t | x) = alpha_t x + (noise of total mass 1 - alpha_t)

The noise is MASK (`Absorbing`), uniform tokens (`Uniform`), a mixture that changes with time (`Hybrid`, GIDD), or MASK
with some random and some intact tokens (`MaskAndReplace`). Only target tokens are corrupted, never conditioning.

The first three interpolate between data and noise at known rates: a token of any kind turns into token z at rate
r_t(z), so that

    d/dt q_t(z | x) = r_t(z) - (-alpha'/alpha) q_t(z | x),

from which the likelihood bounds in continuous time are made (`objectives/uniform_diffusion.py`,
`objectives/score_entropy.py`).
"""

import dataclasses
from typing import NamedTuple, Protocol, Self

import flax.struct
import jax
import jax.numpy as jnp

from diffusion_lm.core.errors import require
from diffusion_lm.core.rng import StreamKeys
from diffusion_lm.core.special import SpecialTokens
from diffusion_lm.core.types import Batch
from diffusion_lm.noise.choice import CHOICE_STREAM, Bernoulli, Choice, bernoulli
from diffusion_lm.noise.contract import HYBRID_NOISE, MASK_NOISE, UNIFORM_NOISE
from diffusion_lm.noise.schedules import Linear, Schedule

REPLACEMENT_STREAM = "noise/replacement"
KIND_STREAM = "noise/kind"

SMALLEST = 2.0**-24
"""Lower limit of alpha and 1 - t, so that rates stay finite in float32; the bounds' integrands vanish there."""


@flax.struct.dataclass
class Corrupted:
    """A noisy canvas.

    Attributes:
      tokens: i32[B,T], the batch's tokens with some target tokens replaced.
      replaced: bool[B,T], which tokens were chosen; the new token of a chosen one may equal the old one.
    """

    tokens: jax.Array
    replaced: jax.Array


class Marginal(NamedTuple):
    """q(z_t | x) and the rates of the process at time t; all fields are f32 in the shape of t.

    Attributes:
      signal: alpha_t, the probability that a token is intact.
      mask: probability of MASK.
      uniform: probability of an ordinary noise token, all of them together.
      mask_rate: rate at which a token turns into MASK.
      uniform_rate: rate at which a token turns into an ordinary noise token, all of them together.
    """

    signal: jax.Array
    mask: jax.Array
    uniform: jax.Array
    mask_rate: jax.Array
    uniform_rate: jax.Array


class NoiseProcess(Protocol):
    """A forward process. Implementations are frozen dataclasses and hold no token ids: `Batch.special` has them."""

    def __hash__(self) -> int: ...

    @property
    def kind(self) -> str:
        """One of `contract.NOISES`."""
        ...

    @property
    def has_mask(self) -> bool:
        """Whether noise contains MASK, so that the vocabulary must have it."""
        ...

    def alpha(self, t: jax.Array) -> jax.Array:
        """Returns the probability that a token is not chosen for replacement at time t."""
        ...

    def corrupt(self, keys: StreamKeys, batch: Batch, t_BT: jax.Array, *, vocab_size: int) -> Corrupted:
        """Draws z_t.

        Args:
          keys: the draws depend on these, on the example and on the position alone.
          batch: the clean batch.
          t_BT: f32[B,T] or broadcastable, times in [0, 1].
          vocab_size: number of tokens that the model knows; uniform noise is drawn from all of them.
        """
        ...


class InterpolatingProcess(NoiseProcess, Protocol):
    """A process whose marginal and rates are known in closed form."""

    def marginal(self, t: jax.Array) -> Marginal:
        """Returns the marginal at times in [0, 1]."""
        ...

    def whole_range(self) -> Self:
        """Returns the process from alpha = 1 to alpha = 0.

        Bounds do not depend on the schedule, and over the whole range they need no terms for its ends.
        """
        ...


def mask_id_of(process: NoiseProcess, special: SpecialTokens) -> int | None:
    """Returns the id of MASK, or None where the noise consists of ordinary tokens only."""
    return special.mask if process.has_mask else None


def forbidden_ids(process: NoiseProcess, special: SpecialTokens) -> tuple[int, ...]:
    """Returns the ids that no clean token has under this process, and that therefore get no probability: MASK."""
    return (special.mask,) if process.has_mask else ()


def prior(process: NoiseProcess, keys: StreamKeys, batch: Batch, *, vocab_size: int) -> jax.Array:
    """Returns i32[B,T], noise in every target slot: the canvas from which samplers start.

    It is MASK where the process has it, because GIDD's random tokens are gone at t = 1, and random tokens otherwise.
    Schedules whose alpha ends above 0 (log-linear noise with eps) leave no clean token either.
    """
    if process.has_mask:
        _check_mask(batch.special, vocab_size)
        return jnp.where(batch.target_mask, batch.special.mask, batch.tokens)
    return jnp.where(batch.target_mask, random_tokens(keys, batch, vocab_size), batch.tokens)


def is_noise(process: NoiseProcess, canvas: jax.Array, target_mask: jax.Array, special: SpecialTokens) -> jax.Array:
    """Returns bool[B,T], the target slots that may hold noise: those with MASK, or all where the noise has no MASK."""
    return target_mask & (canvas == special.mask) if process.has_mask else target_mask


def noise_tokens(mask_id: int | None, vocab_size: int) -> int:
    """Returns the number of tokens that ordinary noise is drawn from: all, or all but MASK where there is one."""
    return vocab_size if mask_id is None else vocab_size - 1


def noise_at(tokens: jax.Array, mask_id: int | None, mask: jax.Array, uniform: jax.Array, vocab_size: int) -> jax.Array:
    """Returns the probability of `tokens` in noise with mass `mask` on MASK and `uniform` on ordinary tokens."""
    ordinary = uniform / noise_tokens(mask_id, vocab_size)
    return ordinary if mask_id is None else jnp.where(tokens == mask_id, mask, ordinary)


@dataclasses.dataclass(frozen=True)
class Absorbing:
    """alpha_t x + (1 - alpha_t) MASK (D3PM-absorbing; MDLM, MD4, LLaDA, DiffuLLaMA, Dream, SEDD-absorb).

    Attributes:
      schedule: alpha.
      choice: which tokens are replaced: independently (`Bernoulli`) or an exact number of them (`ExactCount`).
    """

    schedule: Schedule = Linear()
    choice: Choice = Bernoulli()

    kind = MASK_NOISE
    has_mask = True

    def alpha(self, t: jax.Array) -> jax.Array:
        """Returns alpha_t."""
        return self.schedule.alpha(t)

    def corrupt(self, keys: StreamKeys, batch: Batch, t_BT: jax.Array, *, vocab_size: int) -> Corrupted:
        """Draws z_t; see `NoiseProcess`."""
        _check_mask(batch.special, vocab_size)
        replaced = self.choice.choose(keys, batch, 1.0 - self.alpha(t_BT))
        return Corrupted(jnp.where(replaced, batch.special.mask, batch.tokens), replaced)

    def marginal(self, t: jax.Array) -> Marginal:
        """Returns the marginal at times in [0, 1]."""
        alpha, rate = _alpha_and_rate(self.schedule, t)
        return Marginal(alpha, 1.0 - alpha, jnp.zeros_like(alpha), rate, jnp.zeros_like(alpha))

    def whole_range(self) -> "Absorbing":
        """Returns the process with the linear schedule."""
        return Absorbing()


@dataclasses.dataclass(frozen=True)
class Uniform:
    """alpha_t x + (1 - alpha_t) / V over the whole vocabulary (SUNDAE, AR2Diff; D3PM-uniform, UDLM, SEDD-uniform).

    Special tokens are part of the draw: AR2Diff does not exclude them, and PAD must be reachable because its models
    predict the length of a target by it. The replacement may equal the original token.

    Attributes:
      schedule: alpha.
      choice: which tokens are replaced: independently (`Bernoulli`) or an exact number of them (`ExactCount`).
    """

    schedule: Schedule = Linear()
    choice: Choice = Bernoulli()

    kind = UNIFORM_NOISE
    has_mask = False

    def alpha(self, t: jax.Array) -> jax.Array:
        """Returns alpha_t."""
        return self.schedule.alpha(t)

    def corrupt(self, keys: StreamKeys, batch: Batch, t_BT: jax.Array, *, vocab_size: int) -> Corrupted:
        """Draws z_t; see `NoiseProcess`."""
        replaced = self.choice.choose(keys, batch, 1.0 - self.alpha(t_BT))
        return Corrupted(jnp.where(replaced, random_tokens(keys, batch, vocab_size), batch.tokens), replaced)

    def marginal(self, t: jax.Array) -> Marginal:
        """Returns the marginal at times in [0, 1]."""
        alpha, rate = _alpha_and_rate(self.schedule, t)
        return Marginal(alpha, jnp.zeros_like(alpha), 1.0 - alpha, jnp.zeros_like(alpha), rate)

    def whole_range(self) -> "Uniform":
        """Returns the process with the linear schedule."""
        return Uniform()


@dataclasses.dataclass(frozen=True)
class Hybrid:
    """((1 - t) x + t MASK + c_t uniform) / (1 + c_t), c_t = B (t (1 - t))^(gamma/2) (GIDD, arXiv 2503.04482).

    The noise is all MASK at t = 1. In between a part of it, largest at t = 1/2, is ordinary tokens, from which the
    model learns to correct its own mistakes.

    Attributes:
      uniform_share: p_u, the share of ordinary tokens in the noise at t = 1/2; sets B = 2^gamma p_u / (1 - p_u).
      gamma: how fast the ordinary tokens come and go.
    """

    uniform_share: float = 0.1
    gamma: float = 1.0

    kind = HYBRID_NOISE
    has_mask = True

    def __post_init__(self):
        require(
            0.0 <= self.uniform_share < 1.0,
            f"uniform_share={self.uniform_share}: must be in [0, 1)",
            where="Hybrid.uniform_share",
            fix="The paper uses 0.0, 0.1 and 0.2.",
        )
        require(
            0.0 < self.gamma <= 2.0,
            f"gamma={self.gamma}: must be in (0, 2]; other values need negative rates",
            where="Hybrid.gamma",
            fix="The paper uses 1.0.",
        )

    @property
    def scale(self) -> float:
        """B, the factor of c_t."""
        return 2.0**self.gamma * self.uniform_share / (1.0 - self.uniform_share)

    def alpha(self, t: jax.Array) -> jax.Array:
        """Returns alpha_t."""
        return self.marginal(t).signal

    def corrupt(self, keys: StreamKeys, batch: Batch, t_BT: jax.Array, *, vocab_size: int) -> Corrupted:
        """Draws z_t; see `NoiseProcess`."""
        _check_mask(batch.special, vocab_size)
        marginal = self.marginal(t_BT)
        replacement = _random_but_mask(keys, batch, vocab_size)
        # One uniform number per token decides between MASK, an ordinary token, and no replacement.
        uniform = keys.token_uniform(CHOICE_STREAM, batch.example_ids, batch.positions)
        replacement = jnp.where(uniform < marginal.mask, batch.special.mask, replacement)
        replaced = bernoulli(keys, batch, marginal.mask + marginal.uniform)
        return Corrupted(jnp.where(replaced, replacement, batch.tokens), replaced)

    def marginal(self, t: jax.Array) -> Marginal:
        """Returns the marginal at times in [0, 1]."""
        rest = jnp.maximum(1.0 - t, SMALLEST)
        c = self.scale * (t * rest) ** (0.5 * self.gamma)
        total = 1.0 + c
        ordinary_rate = c / total * (0.5 * self.gamma / jnp.maximum(t, SMALLEST) + (1.0 - 0.5 * self.gamma) / rest)
        return Marginal(rest / total, t / total, c / total, 1.0 / (total * rest), ordinary_rate)

    def whole_range(self) -> "Hybrid":
        """Returns itself: it covers the whole range."""
        return self


@dataclasses.dataclass(frozen=True)
class MaskAndReplace:
    """MASK, and instead of some of it a random token or the token itself (LLaDA2.1; BERT's 80/10/10).

    A model of this noise fills in and corrects. No bound is made from it.

    Attributes:
      schedule: alpha; a token is chosen with probability 1 - alpha_t.
      p_uniform: probability that a chosen token becomes a uniform draw from the vocabulary without MASK.
      p_keep: probability that a chosen token stays as it is; it is scored like the other chosen ones (BERT, arXiv
        1810.04805: p_uniform = p_keep = 0.1).
      choice: which tokens are chosen: independently (`Bernoulli`) or an exact number of them (`ExactCount`).
    """

    schedule: Schedule = Linear()
    p_uniform: float = 0.1
    p_keep: float = 0.0
    choice: Choice = Bernoulli()

    kind = HYBRID_NOISE
    has_mask = True

    def __post_init__(self):
        require(
            0 <= self.p_uniform <= 1,
            f"p_uniform={self.p_uniform}: must be in [0, 1]",
            where="MaskAndReplace.p_uniform",
            fix="Use Absorbing for p_uniform = 0 and Uniform for p_uniform = 1.",
        )
        require(
            0 <= self.p_keep <= 1 - self.p_uniform,
            f"p_keep={self.p_keep} with p_uniform={self.p_uniform}: their sum must be in [0, 1]",
            where="MaskAndReplace.p_keep",
            fix="What is left of 1 is the probability of MASK.",
        )

    def alpha(self, t: jax.Array) -> jax.Array:
        """Returns alpha_t."""
        return self.schedule.alpha(t)

    def corrupt(self, keys: StreamKeys, batch: Batch, t_BT: jax.Array, *, vocab_size: int) -> Corrupted:
        """Draws z_t; see `NoiseProcess`."""
        _check_mask(batch.special, vocab_size)
        replaced = self.choice.choose(keys, batch, 1.0 - self.alpha(t_BT))
        kind = keys.token_uniform(KIND_STREAM, batch.example_ids, batch.positions)
        noise = jnp.where(kind < self.p_uniform, _random_but_mask(keys, batch, vocab_size), batch.special.mask)
        noise = jnp.where(kind >= 1.0 - self.p_keep, batch.tokens, noise)
        return Corrupted(jnp.where(replaced, noise, batch.tokens), replaced)


def random_tokens(keys: StreamKeys, batch: Batch, size: int) -> jax.Array:
    """Returns i32[B,T], uniform in [0, size), keyed by example and position."""
    token_keys = keys.per_token(REPLACEMENT_STREAM, batch.example_ids, batch.positions)
    draw = jax.vmap(lambda key: jax.random.randint(key, (), 0, size, jnp.int32))
    return draw(token_keys.reshape(-1)).reshape(token_keys.shape)


def _random_but_mask(keys: StreamKeys, batch: Batch, vocab_size: int) -> jax.Array:
    """Returns i32[B,T], uniform over the vocab_size - 1 tokens that are not MASK."""
    random = random_tokens(keys, batch, vocab_size - 1)
    # Draws from MASK's id upwards stand for the token after it.
    return random + (random >= batch.special.mask)


def _alpha_and_rate(schedule: Schedule, t: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns alpha, limited from below, and -alpha'/alpha."""
    alpha, fall = schedule.alpha(t), -schedule.alpha_derivative(t)
    return jnp.clip(alpha, SMALLEST, 1.0), fall / jnp.where(alpha > 0, alpha, SMALLEST)


def _check_mask(special: SpecialTokens, vocab_size: int) -> None:
    require(
        special.mask < vocab_size,
        f"MASK is token {special.mask}, and the model has {vocab_size} tokens",
        where="TransformerSpec.vocab_size",
        fix="Use the vocabulary that the model was made for, or a model with a row for MASK.",
    )
