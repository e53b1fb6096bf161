"""Block diffusion: autoregressive over blocks of tokens, masked diffusion inside each (BD3-LM and its descendants).

    -log p(x)  <=  sum over blocks b of  E_r E_mask [ sum over masked i in b of 1/r x -log p(x_i | x_b masked, x_<b) ]

with a mask rate r per block, uniform in (0, 1] (BD3-LM, arXiv 2503.09573). One pass over [noisy ; clean] trains all
blocks at once: the noisy tokens of a block attend to the block itself and to the clean copy of the blocks before it.
The value lies between the likelihood of an autoregressive model (blocks of one token) and the bound of masked diffusion
(one block).
"""

import dataclasses
from typing import Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from diffusion_lm.architectures.base import BoundModel
from diffusion_lm.core.alignment import Alignment, SamePosition, Shifted
from diffusion_lm.core.checks import check_choice, check_count, check_non_negative, check_positive
from diffusion_lm.core.errors import require
from diffusion_lm.core.real_tokens import is_real
from diffusion_lm.core.rng import StreamKeys
from diffusion_lm.core.types import Batch, LossTerms
from diffusion_lm.nn.masks import two_streams
from diffusion_lm.noise.contract import MASK_NOISE, NO_NOISE, Contract
from diffusion_lm.noise.weighting import BoundKind
from diffusion_lm.objectives.block_layout import (
    FIRST_BLOCKS,
    BlockLayout,
    blocks_of,
    later_rates,
    smallest_in_block,
    sum_by_run,
)
from diffusion_lm.objectives.draws import check_draws, mean_over_draws, shifted, spread
from diffusion_lm.objectives.forward_pass import ForwardPasses
from diffusion_lm.objectives.objective import Needs, evaluation_keys
from diffusion_lm.objectives.token_losses import weighted_mean, weighted_sum

LEVEL_STREAM = "block/level"
CHOICE_STREAM = "block/choice"
BLOCK_STARTS = ("clean_context", "seed")
WEIGHTINGS = ("nelbo", "flat")


class TokenLosses(NamedTuple):
    """Losses of one pass over [noisy ; clean], f32[B,T] in nats.

    Attributes:
      diffusion: cross-entropy of masked tokens times their weight, and of seeds; 0 on tokens that stayed clean.
      autoregressive: cross-entropy of every scored token from the clean copy; zeros without a `NextToken` loss.
    """

    diffusion: jax.Array
    autoregressive: jax.Array


class BlockGrowth(Protocol):
    """Block sizes of training phases (`annealing.BlockSizes`)."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """The sizes, in the order of the phases."""
        ...

    def at(self, step: jax.Array) -> jax.Array:
        """Returns i32[], the block size at a training step."""
        ...


@dataclasses.dataclass(frozen=True)
class MaskRates:
    """The law of the mask rates in training; `bound` does not depend on it.

    Attributes:
      low: smallest mask rate.
      high: largest mask rate; low = high = 1 always masks every token.
      half_life: None masks all tokens of a block at one rate. A number masks later tokens more (Efficient-DLM, arXiv
        2512.14067; `block_layout.later_rates`): the share of a block over which a token's weight doubles at low noise.
      stratified: spreads the rates of one example's blocks evenly; each by itself stays uniform.
    """

    low: float = 0.0
    high: float = 1.0
    half_life: float | None = None
    stratified: bool = True

    def __post_init__(self):
        require(
            0.0 <= self.low <= self.high <= 1.0 and self.high > 0.0,
            f"low={self.low}, high={self.high}: mask rates must satisfy 0 <= low <= high <= 1 and high > 0",
            where="MaskRates.low",
            fix="The full range is low = 0.0, high = 1.0.",
        )
        if self.half_life is not None:
            check_positive(
                self.half_life, "MaskRates.half_life", "0.25 is Efficient-DLM's; None masks all tokens alike."
            )


@dataclasses.dataclass(frozen=True)
class NextToken:
    """Next-token prediction on the clean copy, added to the diffusion loss.

    Attributes:
      weight: factor of the next-token loss.
      diffusion_weight: factor of the diffusion loss (Nemotron-Labs-Diffusion: 0.3 with weight 1.0).
      balanced: scales the next-token loss of each example to the size of its diffusion loss, without gradient (I-DLM).
    """

    weight: float = 1.0
    diffusion_weight: float = 1.0
    balanced: bool = False

    def __post_init__(self):
        check_positive(self.weight, "NextToken.weight", "Set BlockDiffusion.next_token to None to leave the loss out.")
        check_non_negative(self.diffusion_weight, "NextToken.diffusion_weight")


@dataclasses.dataclass(frozen=True)
class BlockDiffusion:
    """Masked diffusion of each block given the clean blocks before it, in one pass over [noisy ; clean].

    Attributes:
      block_size: tokens per block.
      growth: block sizes of training phases (`annealing.BlockSizes`), the last of which is `block_size`; or None.
      first_block: where blocks are counted from, "target" or "example"; see `block_layout.blocks_of`. The sampler must
        count in the same way.
      alignment: which state predicts which token. With `Shifted` the first token of a block has no noisy state before
        it in its block: `block_start` says what predicts it.
      block_start: "clean_context": the first token is masked like the others and predicted by the clean copy's last
        state before it, the state that a KV cache of finished blocks holds. "seed": it is never masked, and that state
        predicts it with weight 1; decoding samples it autoregressively (Fast-dLLM v2). `SamePosition` has no such case
        and masks every token.
      rates: the law of the mask rates.
      weighting: "nelbo" is 1/rate at the drawn rate, also where `MaskRates` clips it (BD3-LM); "flat" is 1. With
        `MaskRates.half_life` the rate is the token's own, so each token counts one in the mean (trap T11), and the
        training loss is not a bound.
      complementary: a second pass masks exactly the tokens that the first left clean (Fast-dLLM v2). With "flat" both
        are summed, so that each token counts once; with "nelbo" they are averaged.
      causal_noisy: noisy tokens attend only to those before them in their block (I-DLM).
      causal_clean: the clean copy is causal token by token instead of block by block.
      next_token: a next-token loss on the clean copy, which needs `causal_clean`; or None.
      evaluation_draws: draws per block of `bound`.
    """

    block_size: int = 16
    growth: BlockGrowth | None = None
    first_block: Literal["target", "example"] = "target"
    alignment: Alignment = SamePosition()
    block_start: Literal["clean_context", "seed"] = "clean_context"
    rates: MaskRates = MaskRates()
    weighting: Literal["nelbo", "flat"] = "nelbo"
    complementary: bool = False
    causal_noisy: bool = False
    causal_clean: bool = False
    next_token: NextToken | None = None
    evaluation_draws: int = 4

    def __post_init__(self):
        check_choice(self.first_block, FIRST_BLOCKS, "BlockDiffusion.first_block")
        check_choice(self.block_start, BLOCK_STARTS, "BlockDiffusion.block_start")
        check_choice(self.weighting, WEIGHTINGS, "BlockDiffusion.weighting")
        check_draws(self.evaluation_draws, "BlockDiffusion.evaluation_draws")
        check_count(self.block_size, "BlockDiffusion.block_size", "Published models use 4 to 32.")
        require(
            self.growth is None or self.growth.sizes[-1] == self.block_size,
            f"block_size={self.block_size}: growth must end at the block size that is evaluated and decoded",
            where="BlockDiffusion.growth",
            fix="Let the last of BlockSizes.sizes be block_size.",
        )
        require(
            self.causal_clean or self.next_token is None,
            "next_token without causal_clean: a clean copy that sees its whole block would read its own answer",
            where="BlockDiffusion.next_token",
            fix="Set causal_clean = True, or next_token = None.",
        )

    @property
    def bound_kind(self) -> BoundKind:
        """`bound` is a negative ELBO, whatever the training weights are."""
        return "nelbo"

    def needs(self) -> Needs:
        """MASK, and rows of twice the length, which cost two passes; a complementary mask doubles that again."""
        return Needs(
            visibility=self._contracts[0].visibility,
            passes=4 if self.complementary else 2,
            mask_token=True,
            contracts=self._contracts,
        )

    @property
    def _contracts(self) -> tuple[Contract, ...]:
        """Decoding block by block, and next tokens where the clean copy learns them."""
        # A network that is causal inside its blocks and before them is causal.
        causal = self.causal_noisy and self.causal_clean
        blocks = f"{'example_' if self.first_block == 'example' else ''}blocks:{self.block_size}"
        noisy = Contract(
            MASK_NOISE,
            "causal" if causal else blocks,
            self.alignment,
            causal_context=self.causal_clean and not causal,
            seeds=self.block_start == "seed" and self.alignment.back > 0,
        )
        next_tokens = Contract(NO_NOISE, "causal", Shifted())
        return (noisy,) if self.next_token is None else (noisy, next_tokens)

    def loss(self, model: BoundModel, batch: Batch, keys: StreamKeys, *, train: bool = True) -> LossTerms:
        """Returns the summed loss; `weight` counts each scored token once.

        Metrics: `nll_per_real_token`, the weighted diffusion loss per real token; with `next_token` also
        `autoregressive_nll_per_real_token`.
        """
        # The size may be traced: it changes with the step, and one program serves all phases.
        size = self.block_size if self.growth is None else self.growth.at(keys.step)
        blocks = blocks_of(batch, size, self.first_block)
        maskable = self.maskable(batch, blocks)
        rate_BT = self.block_rates(keys, batch, blocks)
        if self.rates.half_life is not None:
            rate_BT = later_rates(rate_BT, maskable, blocks, self.rates.half_life * size)
        # The tokens masked at one rate are among those masked at a higher one.
        uniform = keys.token_uniform(CHOICE_STREAM, batch.example_ids, batch.positions)
        masked = (uniform < rate_BT) & maskable
        forward = self.passes(model, batch, blocks, keys, train)
        losses = self.token_losses(model, batch, blocks, masked, self._weight(rate_BT), forward)
        if self.complementary:
            # The second canvas masks exactly the tokens that the first one shows.
            rest = maskable & ~masked
            other = self.token_losses(model, batch, blocks, rest, self._weight(1.0 - rate_BT), forward, 1)
            # Every token is noise in one of the two passes, and seeds are scored in both.
            share = jnp.where(maskable, 1.0, 0.5) if self.weighting == "flat" else 0.5
            losses = TokenLosses(
                share * (losses.diffusion + other.diffusion), 0.5 * (losses.autoregressive + other.autoregressive)
            )
        return self._terms(batch, losses)

    def bound(self, model: BoundModel, batch: Batch, keys: StreamKeys) -> LossTerms:
        """Returns an unbiased estimate of the negative ELBO, with fixed noise and without dropout.

        Each draw masks exactly k of the n maskable tokens of a block, k uniform in 1..n, with the weight n/k: the same
        expectation as Bernoulli masks at every rate, with less variance, and exact where a block has one token.
        """
        keys = evaluation_keys(keys)
        blocks = blocks_of(batch, self.block_size, self.first_block)
        uniform = self._level_uniform(keys, batch, blocks)
        forward = self.passes(model, batch, blocks, keys, train=False)

        def one(offset: jax.Array, draw_keys: StreamKeys) -> LossTerms:
            masked, weights = self.exact_count(shifted(uniform, offset), draw_keys, batch, blocks)
            losses = self.token_losses(model, batch, blocks, masked, weights, forward)
            return self._terms(batch, losses, evaluating=True)

        return mean_over_draws(keys, self.evaluation_draws, one)

    def maskable(self, batch: Batch, blocks: BlockLayout) -> jax.Array:
        """Returns bool[B,T]: the target without seeds."""
        return batch.target_mask & ~blocks.is_start if self._has_seeds else batch.target_mask

    def with_range(self, low: float, high: float) -> "BlockDiffusion":
        """Returns the objective with another range of training rates; `bound` does not depend on it."""
        return dataclasses.replace(self, rates=dataclasses.replace(self.rates, low=low, high=high))

    def block_rates(self, keys: StreamKeys, batch: Batch, blocks: BlockLayout) -> jax.Array:
        """Returns f32[B,T] mask rates in (low, high], one per block."""
        low, high = self.rates.low, self.rates.high
        return low + (high - low) * (1.0 - self._level_uniform(keys, batch, blocks))

    def exact_count(
        self, uniform_BT: jax.Array, keys: StreamKeys, batch: Batch, blocks: BlockLayout
    ) -> tuple[jax.Array, jax.Array]:
        """Returns bool[B,T] masks of exactly k of n tokens per block and their weights n/k; `uniform_BT` chooses k."""
        maskable = self.maskable(batch, blocks)
        # k = ceil(n (1 - u)) with u in [0, 1) is uniform in 1..n.
        total = sum_by_run(maskable.astype(jnp.float32), blocks.runs)
        count = jnp.clip(jnp.ceil((1.0 - uniform_BT) * total), 1.0, jnp.maximum(total, 1.0))
        choice = keys.token_uniform(CHOICE_STREAM, batch.example_ids, batch.positions)
        return smallest_in_block(choice, count, maskable, blocks), total / count

    def block_levels(self, uniform_BT: jax.Array, blocks: BlockLayout) -> jax.Array:
        """Returns f32[B,T] uniforms in [0, 1), one per block, from one uniform number per example."""
        return shifted(uniform_BT, spread(blocks.ids))

    def passes(
        self, model: BoundModel, batch: Batch, blocks: BlockLayout, keys: StreamKeys, train: bool
    ) -> ForwardPasses:
        """Returns the forward passes over [noisy ; clean]."""
        doubled = batch.replace(
            tokens=_twice(batch.tokens),
            # Only the noisy copy has a noise level.
            target_mask=jnp.concatenate([batch.target_mask, jnp.zeros_like(batch.target_mask)], axis=1),
            loss_weights=_twice(batch.loss_weights),
            segment_ids=_twice(batch.segment_ids),
            positions=_twice(batch.positions),
            example_ids=_twice(batch.example_ids),
            strata=None,
        )
        # A noisy block attends to itself and to the clean copies of earlier blocks.
        visibility = two_streams(blocks.ids, causal_noisy=self.causal_noisy, causal_clean=self.causal_clean)
        # Complementary masks are two passes in training; `bound` runs one pass per draw.
        number = 2 if self.complementary and train else 1
        return ForwardPasses(model, doubled, keys, visibility=visibility, train=train, passes=number)

    def token_losses(
        self,
        model: BoundModel,
        batch: Batch,
        blocks: BlockLayout,
        masked_BT: jax.Array,
        weights_BT: jax.Array,
        forward: ForwardPasses,
        number: int = 0,
    ) -> TokenLosses:
        """Returns the losses of one pass over [noisy ; clean] with the given masks.

        Args:
          model: the network.
          batch: the clean batch.
          blocks: its blocks.
          masked_BT: bool[B,T], which tokens are MASK in the noisy copy.
          weights_BT: f32[B,T], their weights.
          forward: from `passes`.
          number: which pass this is, for its dropout.
        """
        length, mask_id = batch.tokens.shape[1], batch.special.mask
        # The noise level of a block is its share of MASK among all target tokens, seeds included: samplers compute it
        # in the same way (`nn.named_masks.noise_share`).
        total = sum_by_run(batch.target_mask.astype(jnp.float32), blocks.runs)
        share = sum_by_run(masked_BT.astype(jnp.float32), blocks.runs) / jnp.maximum(total, 1.0)
        # [noisy ; clean] in one row: both copies have the same positions and differ by visibility.
        noisy = jnp.where(masked_BT, mask_id, batch.tokens)
        hidden = forward(jnp.concatenate([noisy, batch.tokens], axis=1), number, rate=_twice(share))

        scored = batch.loss_weights != 0
        seeds = batch.target_mask & blocks.is_start if self._has_seeds else jnp.zeros_like(scored)
        # Under the shift, the first token of a block is predicted by the clean copy.
        by_clean = blocks.is_start if self._shifted else jnp.zeros_like(scored)
        # Logits are computed only where a loss is.
        wanted_noisy = scored & masked_BT & ~by_clean
        wanted_clean = scored & ((masked_BT & by_clean) | seeds | (self.next_token is not None))
        # The clean copy always predicts the next token, whatever the noisy copy predicts.
        left, right = self.alignment, Shifted()
        nll = model.nll(
            hidden,
            jnp.concatenate([left.to_slots(batch.tokens), right.to_slots(batch.tokens)], axis=1),
            where=jnp.concatenate([left.to_slots(wanted_noisy), right.to_slots(wanted_clean)], axis=1),
            forbidden=(mask_id,),
        )
        by_noisy, clean = left.to_tokens(nll[:, :length]), right.to_tokens(nll[:, length:])
        predicted = jnp.where(by_clean, clean, by_noisy)
        # A seed is a next token and has the weight 1.
        diffusion = jnp.where(masked_BT, predicted * weights_BT, 0.0) + jnp.where(seeds, clean, 0.0)
        return TokenLosses(diffusion, jnp.zeros_like(clean) if self.next_token is None else clean)

    def _terms(self, batch: Batch, losses: TokenLosses, evaluating: bool = False) -> LossTerms:
        """Returns the sums; the bound is that of the diffusion part alone."""
        real = is_real(batch)
        diffusion = weighted_sum(losses.diffusion, batch.loss_weights)
        metrics = {"nll_per_real_token": weighted_mean(losses.diffusion, real)}
        weight = jnp.sum(batch.loss_weights, dtype=jnp.float32)
        added = self.next_token
        if added is not None:
            metrics["autoregressive_nll_per_real_token"] = weighted_mean(losses.autoregressive, real)
        # The bound of the diffusion model does not contain the autoregressive loss.
        if evaluating or added is None:
            return LossTerms(diffusion, weight, metrics)
        scale = added.weight * (_balance(batch, losses) if added.balanced else 1.0)
        next_tokens = weighted_sum(scale * losses.autoregressive, batch.loss_weights)
        return LossTerms(added.diffusion_weight * diffusion + next_tokens, weight, metrics)

    def _level_uniform(self, keys: StreamKeys, batch: Batch, blocks: BlockLayout) -> jax.Array:
        """Returns f32[B,T] uniforms in [0, 1), one per block of an example."""
        if not self.rates.stratified:
            return keys.token_uniform(LEVEL_STREAM, batch.example_ids, blocks.ids)
        return self.block_levels(keys.example_uniform(LEVEL_STREAM, batch.example_ids), blocks)

    def _weight(self, rate_BT: jax.Array) -> jax.Array:
        return 1.0 / jnp.maximum(rate_BT, 1e-8) if self.weighting == "nelbo" else jnp.ones_like(rate_BT)

    @property
    def _shifted(self) -> bool:
        return self.alignment.back > 0

    @property
    def _has_seeds(self) -> bool:
        return self._shifted and self.block_start == "seed"


def _balance(batch: Batch, losses: TokenLosses) -> jax.Array:
    """Returns f32[B,T]: diffusion loss over next-token loss of each example, without gradient."""

    def per_example(values: jax.Array) -> jax.Array:
        return sum_by_run(jax.lax.stop_gradient(values) * batch.loss_weights, batch.segment_ids)

    # Examples without a next-token loss keep a scale of 0 instead of 0/0.
    below = per_example(losses.autoregressive)
    return jnp.where(below > 0, per_example(losses.diffusion) / jnp.where(below > 0, below, 1.0), 0.0)


def _twice(values_BT: jax.Array) -> jax.Array:
    return jnp.concatenate([values_BT, values_BT], axis=1)
