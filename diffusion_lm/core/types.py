"""The values that all layers exchange: `Batch`, `LossTerms`, `Decoded`. Dimension letters: `core/shapes.py`."""

import functools
from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from diffusion_lm.core.special import SpecialTokens

Params = Mapping[str, Any]
"""A plain nested dict of arrays; Flax modules and boxed parameters stay inside `architectures`."""


@flax.struct.dataclass
class EncoderInputs:
    """The encoder stream of an encoder-decoder.

    Attributes:
      tokens: i32[B,S].
      segment_ids: i32[B,S]; 0 = padding, >0 = the packed example, numbered as in the main stream.
      positions: i32[B,S], restarting in every packed example.
    """

    tokens: jax.Array
    segment_ids: jax.Array
    positions: jax.Array


class Batch(flax.struct.PyTreeNode):
    """One layout for all architectures; converters in `data/` produce it.

    Every example begins with a conditioning token (BOS), so `target_mask` is False at the first slot of each example.

    Attributes:
      tokens: i32[B,T]. Decoder-only: conditioning then target, contiguous. Encoder-decoder: BOS then target.
      target_mask: bool[B,T], True where a token is to be generated; the rest is conditioning and is never noised.
      loss_weights: f32[B,T], 0 on conditioning and on unscored filler.
      segment_ids: i32[B,T], 0 = padding, to which nothing attends, >0 = number of the packed example.
      positions: i32[B,T], restarting in every packed example.
      example_ids: u32[B,T], stable id of the source example of each token; its noise is keyed by this id.
      special: the special tokens of the data's vocabulary; static, not an array.
      encoder: the encoder stream, or None for single-stream architectures.
      strata: f32[B,T], place in [0, 1) of each token's example in the *global* batch. Stratified time sampling spreads
        times evenly over the batch with it, however the batch is split. None in evaluation and prompts.
    """

    tokens: jax.Array
    target_mask: jax.Array
    loss_weights: jax.Array
    segment_ids: jax.Array
    positions: jax.Array
    example_ids: jax.Array
    special: SpecialTokens = flax.struct.field(pytree_node=False)
    encoder: EncoderInputs | None = None
    strata: jax.Array | None = None

    @property
    def row_ids(self) -> jax.Array:
        """u32[B], the id of each row's first example, which keys draws made once per row (dropout, sampling)."""
        return self.example_ids[:, 0]


@flax.struct.dataclass
class WeightedMean:
    """A mean stored as sum and weight, so that merging over microbatches, hosts and batches is exact."""

    total: jax.Array
    weight: jax.Array

    def __add__(self, other: "WeightedMean") -> "WeightedMean":
        return WeightedMean(self.total + other.total, self.weight + other.weight)

    @property
    def value(self) -> jax.Array:
        """total / weight; 0 if the weight is 0."""
        return jnp.where(self.weight > 0, self.total / jnp.where(self.weight > 0, self.weight, 1), 0.0)


@flax.struct.dataclass
class LossTerms:
    """The loss of a batch as sums and weights, never as a mean. Additive over microbatches, hosts and devices.

    The differentiated loss is loss_sum / weight + sum over `others` of total / weight, with the weights of the global
    batch. Weights depend on the batch and its noise, never on the parameters.

    Attributes:
      loss_sum: f32[], numerator of the loss.
      weight: f32[], denominator of the loss; the training step divides once, by the global sum.
      metrics: named means for the log, also additive.
      others: further terms of the loss with separate global weights, for a mixture of objectives that count tokens,
        replaced tokens and examples. Objectives with such terms set `Needs.several_weights`.
      variance: f32[], the squared standard error of `loss_sum` over the Monte Carlo draws of a bound; NaN for a single
        draw, None for exact values and in training. Batches are independent, so it is additive.
    """

    loss_sum: jax.Array
    weight: jax.Array
    metrics: Mapping[str, WeightedMean] = flax.struct.field(default_factory=dict)
    others: tuple[WeightedMean, ...] = ()
    variance: jax.Array | None = None

    def __add__(self, other: "LossTerms") -> "LossTerms":
        return jax.tree.map(jnp.add, self, other)

    @property
    def parts(self) -> tuple[WeightedMean, ...]:
        """All terms of the loss as sum and weight; that of `loss_sum` is first."""
        return (WeightedMean(self.loss_sum, self.weight), *self.others)

    @property
    def weights(self) -> tuple[jax.Array, ...]:
        """The weight, f32[], of each of `parts`."""
        return tuple(part.weight for part in self.parts)

    @property
    def loss(self) -> jax.Array:
        """f32[], the sum of the means of `parts`; 0 for a batch without scored tokens."""
        return self.share_of(self.weights)

    def share_of(self, weights: tuple[jax.Array, ...]) -> jax.Array:
        """Returns f32[], the contribution of these sums to the loss of a batch whose parts have the given weights."""
        means = [WeightedMean(part.total, weight).value for part, weight in zip(self.parts, weights, strict=True)]
        return functools.reduce(jnp.add, means)

    @property
    def scored(self) -> jax.Array:
        """bool[], whether any of `parts` has a positive weight."""
        return jnp.any(jnp.stack(jnp.broadcast_arrays(*self.weights)) > 0)


@flax.struct.dataclass
class TokenStats:
    """Per-token summaries of the predicted distribution, computed without materialising logits [B,T,V].

    Attributes:
      argmax: i32[B,T], the most likely token.
      sample: i32[B,T], a sample with the temperature, top-k and top-p of the proposal (`argmax` at temperature 0).
      sample_log_prob: f32[B,T], log-probability of `sample` under the model at temperature 1 without filters.
      target_log_prob: f32[B,T], log-probability of given target tokens; 0 if none were given.
      entropy: f32[B,T] in nats, at temperature 1 without filters, or at the temperature of the proposal if requested;
        None if not requested.
      margin: f32[B,T], probability of the most likely token minus that of the second; None if not requested.
      expected: [B,T,P,D] in the compute dtype, expected embedding under each of the P passes (under guidance, the
        second pass is unconditional); None if not requested.
      change: f32[B,T], probability that the token changes, if logits are ratios (`nn.cross_entropy.Ratios`); else None.
      proposal_log_prob: f32[B,T], log-probability of `sample` under the proposal; None if not requested.
    """

    argmax: jax.Array
    sample: jax.Array
    sample_log_prob: jax.Array
    target_log_prob: jax.Array
    entropy: jax.Array | None = None
    margin: jax.Array | None = None
    expected: jax.Array | None = None
    change: jax.Array | None = None
    proposal_log_prob: jax.Array | None = None


@flax.struct.dataclass
class Trace:
    """The tokens after each forward pass, for visualisation.

    Attributes:
      tokens: i32[steps,B,T]; steps skipped by an early exit repeat the final tokens.
    """

    tokens: jax.Array


@flax.struct.dataclass
class Decoded:
    """The output of a sampler.

    Attributes:
      tokens: i32[B,T], the prompt with the target window filled in, and PAD after the end of the target.
      lengths: i32[B], number of generated tokens before EOS, PAD or the end of the window, not counting these.
      scores: f32[B], the score by which candidates are ranked (higher is better); each sampler documents its own.
      forward_passes: i32[B], forward passes made while the row was in the batch, one per candidate.
      trace: the tokens after each step; None unless requested.
    """

    tokens: jax.Array
    lengths: jax.Array
    scores: jax.Array
    forward_passes: jax.Array
    trace: Trace | None = None
