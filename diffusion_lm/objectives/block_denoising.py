"""Block diffusion: autoregressive over blocks of tokens, masked diffusion inside each (BD3-LM and its descendants)."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffusion_lm.core.alignment import SamePosition, Shifted
from diffusion_lm.core.errors import require
from diffusion_lm.core.real_tokens import real_tokens
from diffusion_lm.core.rng import StreamKeys
from diffusion_lm.core.types import Batch, LossTerms
from diffusion_lm.nn.masks import two_streams
from diffusion_lm.nn.time_conditioning import time_input
from diffusion_lm.noise.process import MASK_NOISE, NO_NOISE, Process
from diffusion_lm.noise.weighting import BoundKind
from diffusion_lm.objectives.base import Model, Needs, frozen, weighted_mean, weighted_sum
from diffusion_lm.objectives.block_layout import (
    FIRST_BLOCKS,
    Blocks,
    blocks_of,
    later_rates,
    smallest_in_block,
    sum_by_run,
)
from diffusion_lm.objectives.draws import check_draws, mean_over_draws, shifted, spread

LEVEL_STREAM = "block/level"
CHOICE_STREAM = "block/choice"
BLOCK_STARTS = ("clean_context", "seed")
WEIGHTINGS = ("nelbo", "flat")


class TokenLosses(NamedTuple):
    """Losses of one doubled pass, f32[B,T] in nats.

    Attributes:
      diffusion: cross-entropy of masked tokens times their weight, and of seeds; 0 on tokens that stayed clean.
      autoregressive: cross-entropy of every scored token from the clean copy; zeros where that is not asked for.
    """

    diffusion: jax.Array
    autoregressive: jax.Array


@dataclasses.dataclass(frozen=True)
class BlockDenoising:
    """Masked diffusion of each block given the clean blocks before it, in one pass over [noisy ; clean].

    With rates r drawn uniformly for each block and the weight 1/r on masked tokens, the expected loss is the negative
    ELBO of BD3-LM (arXiv 2503.09573), which no noise schedule changes. It lies between the likelihood of an
    autoregressive model (blocks of one token) and the bound of masked diffusion (one block).

    Attributes:
      mask_id: id of MASK; it has no probability (SUBS), and it must not occur in the data.
      block_size: tokens per block.
      growth: block sizes of training phases (`annealing.BlockSizes`), the last of which is `block_size`; or None.
      first_block: where blocks are counted from, "target" or "example"; see `block_layout.blocks_of`. The sampler must
        count alike (`DenoisingSampler.first_block`).
      alignment: which state predicts which token. With `Shifted` the first token of a block has no noisy state before
        it in its block: `block_start` says what predicts it.
      block_start: "clean_context": the first token is masked like the others and predicted by the clean copy's last
        state before it, the state that a key-value cache of finished blocks holds. "seed": it is never masked, and
        scored by that state with weight 1 (decoding draws it autoregressively, as Fast-dLLM v2 does). `SamePosition`
        has no such case and masks every token.
      half_life: None masks all tokens of a block at one rate. A number masks later ones more (Efficient-DLM, arXiv
        2512.14067; `block_layout.later_rates`): the share of a block over which a token's weight doubles at low noise.
      low: smallest mask rate of training.
      high: largest mask rate of training; low = high = 1 always masks everything.
      weighting: "nelbo" is 1/rate at the drawn rate, also where `low` and `high` clip it (BD3-LM), "flat" is 1. With
        `half_life` the rate is the token's own, so that each token counts one in the mean (trap T11), and the training
        loss is no bound.
      complementary: a second pass masks exactly the tokens that the first left clean (Fast-dLLM v2). With "flat" both
        are summed, so that each token counts once; with "nelbo" they are averaged.
      stratified: spreads the rates of one example's blocks evenly; each by itself stays uniform.
      causal_noisy: noisy tokens see only those before them in their block (I-DLM).
      causal_clean: the clean copy is causal token by token instead of block by block.
      diffusion_weight: factor of the diffusion loss.
      autoregressive_weight: factor of next-token prediction on the clean copy, which needs `causal_clean`.
      balanced: scales the autoregressive loss of each example to the size of its diffusion loss, without gradient
        (I-DLM).
      evaluation_draws: draws a block of `bound`.
      pad_id: filler inside the scored window; left out of the loss per real token.
      eos_id: ends a target; further ones behind the first are filler too.
    """

    mask_id: int
    block_size: int = 16
    growth: Any = None
    first_block: str = "target"
    alignment: Any = SamePosition()
    block_start: str = "clean_context"
    half_life: float | None = None
    low: float = 0.0
    high: float = 1.0
    weighting: str = "nelbo"
    complementary: bool = False
    stratified: bool = True
    causal_noisy: bool = False
    causal_clean: bool = False
    diffusion_weight: float = 1.0
    autoregressive_weight: float = 0.0
    balanced: bool = False
    evaluation_draws: int = 4
    pad_id: int = 0
    eos_id: int = 1

    def __post_init__(self):
        _require_one_of(self, "first_block", FIRST_BLOCKS)
        _require_one_of(self, "block_start", BLOCK_STARTS)
        _require_one_of(self, "weighting", WEIGHTINGS)
        check_draws(self.evaluation_draws, "BlockDenoising.evaluation_draws")
        require(
            isinstance(self.block_size, int) and self.block_size > 0,
            f"block_size = {self.block_size} is no number of tokens",
            where="BlockDenoising.block_size",
            fix="Published models use 4 to 32.",
        )
        require(
            0.0 <= self.low <= self.high <= 1.0 and self.high > 0.0,
            f"mask rates must satisfy 0 <= low <= high <= 1 and high > 0, got low = {self.low}, high = {self.high}",
            where="BlockDenoising.low",
            fix="The full range is low = 0.0, high = 1.0.",
        )
        require(
            self.half_life is None or self.half_life > 0,
            f"half_life = {self.half_life} is no share of a block",
            where="BlockDenoising.half_life",
            fix="0.25 masks the end of a block up to 16 times as often as its beginning; None masks all alike.",
        )
        require(
            self.growth is None or self.growth.sizes[-1] == self.block_size,
            f"blocks of {self.block_size} are evaluated and decoded, but growth ends at another size",
            where="BlockDenoising.growth",
            fix="Let the last size be block_size.",
        )
        require(
            self.diffusion_weight >= 0 and self.autoregressive_weight >= 0,
            f"weights of losses are not negative, got {self.diffusion_weight} and {self.autoregressive_weight}",
            where="BlockDenoising.autoregressive_weight",
            fix="Nemotron-Labs-Diffusion uses diffusion_weight = 0.3, autoregressive_weight = 1.0.",
        )
        require(
            self.causal_clean or not self.autoregressive_weight,
            "next-token prediction on a clean copy that sees its whole block would read its own answer",
            where="BlockDenoising.autoregressive_weight",
            fix="Set causal_clean = True.",
        )

    @property
    def bound_kind(self) -> BoundKind:
        """`bound` is a negative ELBO whatever the training weights are."""
        return "nelbo"

    def needs(self) -> Needs:
        """Rows are twice as long, which costs what two passes do; a complementary mask doubles it again."""
        return Needs(
            visibility=self._processes[0].visibility,
            passes=4 if self.complementary else 2,
            mask_token=True,
            mask_id=self.mask_id,
            processes=self._processes,
        )

    @property
    def _processes(self) -> tuple[Process, ...]:
        """Blocks, as a canvas under their visibility shows them, and next tokens where the clean copy learns them."""
        # A network that is causal in its blocks and before them is causal.
        causal = self.causal_noisy and self.causal_clean
        blocks = f"{'example_' if self.first_block == 'example' else ''}blocks:{self.block_size}"
        noisy = Process(
            MASK_NOISE,
            "causal" if causal else blocks,
            self.alignment,
            self.mask_id,
            causal_context=self.causal_clean and not causal,
            seeds=self.block_start == "seed" and self.alignment.back > 0,
        )
        next_tokens = Process(NO_NOISE, "causal", Shifted())
        return (noisy, next_tokens) if self.autoregressive_weight else (noisy,)

    def loss(self, model: Model, batch: Batch, keys: StreamKeys, *, train: bool = True) -> LossTerms:
        """Returns the summed loss; `weight` counts each scored token once.

        Metrics: `nll_per_real_token`, the weighted diffusion loss per real token, and, with an autoregressive part,
        `autoregressive_nll_per_real_token`.
        """
        size = self.block_size if self.growth is None else self.growth.at(keys.step)
        blocks = blocks_of(batch, size, self.first_block)
        rate_BT = self.rates(keys, batch, blocks)
        if self.half_life is not None:
            rate_BT = later_rates(rate_BT, self.maskable(batch, blocks), blocks, self.half_life * size)
        uniform = keys.token_uniform(CHOICE_STREAM, batch.example_ids, batch.positions)
        maskable = self.maskable(batch, blocks)
        masked = (uniform < rate_BT) & maskable
        losses = self.token_losses(model, batch, blocks, masked, self._weight(rate_BT), keys if train else None)
        if self.complementary:
            other = self.token_losses(
                model, batch, blocks, maskable & ~masked, self._weight(1.0 - rate_BT), keys if train else None, 1
            )
            # Seeds are scored in both passes, and so is every token on average where weights are 1/rate.
            share = jnp.where(maskable, 1.0, 0.5) if self.weighting == "flat" else 0.5
            losses = TokenLosses(
                share * (losses.diffusion + other.diffusion), 0.5 * (losses.autoregressive + other.autoregressive)
            )
        return self._terms(batch, losses)

    def bound(self, model: Model, batch: Batch, keys: StreamKeys) -> LossTerms:
        """Returns an unbiased estimate of the negative ELBO, with frozen noise and without dropout.

        Each draw masks exactly k of the n maskable tokens of a block, k uniform in 1..n, with the weight n/k: the same
        expectation as Bernoulli masks at every rate, at less variance, and exact where a block has one token.
        """
        keys = frozen(keys)
        blocks = blocks_of(batch, self.block_size, self.first_block)
        uniform = self._level_uniform(keys, batch, blocks)

        def one(offset, draw_keys):
            masked, weights = self.exact_count(shifted(uniform, offset), draw_keys, batch, blocks)
            losses = self.token_losses(model, batch, blocks, masked, weights, None)
            return self._terms(batch, losses, evaluating=True)

        return mean_over_draws(keys, self.evaluation_draws, one)

    def maskable(self, batch: Batch, blocks: Blocks) -> jax.Array:
        """Returns bool[B,T]: the target without seeds."""
        return batch.target_mask & ~blocks.is_start if self._has_seeds else batch.target_mask

    def with_range(self, low: float, high: float) -> "BlockDenoising":
        """Returns the objective with another range of training rates; `bound` does not depend on it."""
        return dataclasses.replace(self, low=low, high=high)

    def rates(self, keys: StreamKeys, batch: Batch, blocks: Blocks) -> jax.Array:
        """Returns f32[B,T] mask rates in (low, high], one per block."""
        return self.low + (self.high - self.low) * (1.0 - self._level_uniform(keys, batch, blocks))

    def exact_count(
        self, uniform_BT: jax.Array, keys: StreamKeys, batch: Batch, blocks: Blocks
    ) -> tuple[jax.Array, jax.Array]:
        """Returns bool[B,T] masks of exactly k of n tokens a block and their weights n/k; `uniform` chooses k."""
        maskable = self.maskable(batch, blocks)
        total = sum_by_run(maskable.astype(jnp.float32), blocks.runs)
        count = jnp.clip(jnp.ceil((1.0 - uniform_BT) * total), 1.0, jnp.maximum(total, 1.0))
        choice = keys.token_uniform(CHOICE_STREAM, batch.example_ids, batch.positions)
        return smallest_in_block(choice, count, maskable, blocks), total / count

    def block_levels(self, uniform_BT: jax.Array, blocks: Blocks) -> jax.Array:
        """Returns f32[B,T] uniforms in [0, 1), one per block, from one uniform number per example."""
        return shifted(uniform_BT, spread(blocks.ids))

    def token_losses(
        self,
        model: Model,
        batch: Batch,
        blocks: Blocks,
        masked_BT: jax.Array,
        weights_BT: jax.Array,
        dropout: StreamKeys | None,
        pass_number: int = 0,
    ) -> TokenLosses:
        """Returns the losses of one pass over [noisy ; clean] with the given masks.

        Args:
          model: the network.
          batch: the clean batch.
          blocks: its blocks.
          masked_BT: bool[B,T], which tokens are MASK in the noisy copy.
          weights_BT: f32[B,T], their weights.
          dropout: keys of dropout, or None.
          pass_number: which of several passes it is, for dropout.
        """
        length = batch.tokens.shape[1]
        # Of all target tokens, seeds too: so samplers count (`nn.named_masks.noise_share`).
        total = sum_by_run(batch.target_mask.astype(jnp.float32), blocks.runs)
        share = sum_by_run(masked_BT.astype(jnp.float32), blocks.runs) / jnp.maximum(total, 1.0)
        noisy_side = jnp.concatenate([batch.target_mask, jnp.zeros_like(batch.target_mask)], axis=1)
        hidden = model(
            jnp.concatenate([jnp.where(masked_BT, self.mask_id, batch.tokens), batch.tokens], axis=1),
            visibility=two_streams(blocks.ids, causal_noisy=self.causal_noisy, causal_clean=self.causal_clean),
            positions=_twice(batch.positions),
            segment_ids=_twice(batch.segment_ids),
            encoder=batch.encoder,
            dropout_keys=None if dropout is None else dropout.per_example(f"dropout/{pass_number}", batch.row_ids),
            time=time_input(model.spec, _twice(share), noisy_side),
        )
        scored = batch.loss_weights != 0
        seeds = batch.target_mask & blocks.is_start if self._has_seeds else jnp.zeros_like(scored)
        by_clean = blocks.is_start if self._shifted else jnp.zeros_like(scored)
        wanted_noisy = scored & masked_BT & ~by_clean
        wanted_clean = scored & ((masked_BT & by_clean) | seeds | bool(self.autoregressive_weight))
        left, right = self.alignment, Shifted()
        nll = model.nll(
            hidden,
            jnp.concatenate([left.to_slots(batch.tokens), right.to_slots(batch.tokens)], axis=1),
            where=jnp.concatenate([left.to_slots(wanted_noisy), right.to_slots(wanted_clean)], axis=1),
            forbidden=(self.mask_id,),
        )
        noisy, clean = left.to_tokens(nll[:, :length]), right.to_tokens(nll[:, length:])
        predicted = jnp.where(by_clean, clean, noisy)
        diffusion = jnp.where(masked_BT, predicted * weights_BT, 0.0) + jnp.where(seeds, clean, 0.0)
        return TokenLosses(diffusion, clean if self.autoregressive_weight else jnp.zeros_like(clean))

    def _terms(self, batch: Batch, losses: TokenLosses, evaluating: bool = False) -> LossTerms:
        """Returns the sums; the bound is that of the diffusion part alone."""
        real = real_tokens(batch, self.pad_id, self.eos_id)
        diffusion = weighted_sum(losses.diffusion, batch.loss_weights)
        metrics = {"nll_per_real_token": weighted_mean(losses.diffusion, real)}
        if self.autoregressive_weight:
            metrics["autoregressive_nll_per_real_token"] = weighted_mean(losses.autoregressive, real)
        weight = jnp.sum(batch.loss_weights, dtype=jnp.float32)
        if evaluating:
            return LossTerms(diffusion, weight, metrics)
        loss_sum = self.diffusion_weight * diffusion
        if self.autoregressive_weight:
            scale = self.autoregressive_weight * (self._balance(batch, losses) if self.balanced else 1.0)
            loss_sum = loss_sum + weighted_sum(scale * losses.autoregressive, batch.loss_weights)
        return LossTerms(loss_sum, weight, metrics)

    def _balance(self, batch: Batch, losses: TokenLosses) -> jax.Array:
        """Returns f32[B,T]: diffusion loss over autoregressive loss of each example."""

        def per_example(values):
            return sum_by_run(jax.lax.stop_gradient(values) * batch.loss_weights, batch.segment_ids)

        below = per_example(losses.autoregressive)
        return jnp.where(below > 0, per_example(losses.diffusion) / jnp.where(below > 0, below, 1.0), 0.0)

    def _level_uniform(self, keys: StreamKeys, batch: Batch, blocks: Blocks) -> jax.Array:
        """Returns f32[B,T] uniforms in [0, 1), one per block of an example."""
        if not self.stratified:
            return keys.token_uniform(LEVEL_STREAM, batch.example_ids, blocks.ids)
        return self.block_levels(keys.example_uniform(LEVEL_STREAM, batch.example_ids), blocks)

    def _weight(self, rate_BT: jax.Array) -> jax.Array:
        return 1.0 / jnp.maximum(rate_BT, 1e-8) if self.weighting == "nelbo" else jnp.ones_like(rate_BT)

    @property
    def _shifted(self) -> bool:
        return self.alignment == Shifted()

    @property
    def _has_seeds(self) -> bool:
        return self._shifted and self.block_start == "seed"


def _twice(values_BT: jax.Array) -> jax.Array:
    return jnp.concatenate([values_BT, values_BT], axis=1)


def _require_one_of(objective: Any, field: str, known: tuple[str, ...]) -> None:
    require(
        getattr(objective, field) in known,
        f"{field} = {getattr(objective, field)!r} is unknown",
        where=f"{type(objective).__name__}.{field}",
        fix=f"Choose one of {', '.join(known)}.",
    )
