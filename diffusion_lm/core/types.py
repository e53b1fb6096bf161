"""The values that travel between floors. Dimension letters: `core/shapes.py`."""

import functools
from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from diffusion_lm.core.special import SpecialTokens

Params = Mapping[str, Any]
"""A plain nested dict of arrays; no module and no box crosses the floor of the architectures."""


@flax.struct.dataclass
class EncoderInputs:
    """The encoder's stream of an encoder-decoder.

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

    Every example opens with a conditioning token (BOS), so `target_mask` is False at the first slot of each example.

    Attributes:
      tokens: i32[B,T]. Decoder-only: conditioning then target, contiguous. Encoder-decoder: BOS then target.
      target_mask: bool[B,T], True where a token is to be generated; the rest is conditioning and is never noised.
      loss_weights: f32[B,T], 0 on conditioning and on unscored filler.
      segment_ids: i32[B,T], 0 = padding that nothing may see, >0 = number of the packed example.
      positions: i32[B,T], restarting in every packed example.
      example_ids: u32[B,T], stable id of the source example of each token: the root of its noise.
      special: the special tokens of the data's vocabulary; static, not an array.
      encoder: the encoder's stream, or None for single-stream architectures.
      strata: f32[B,T], place in [0, 1) of each token's example in its *global* batch, for times that are spread evenly
        over the batch however it is split; None where nothing says so (evaluation, prompts).
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
        """u32[B], the id of each row's first example: the root of what is drawn once per row (dropout, sampling)."""
        return self.example_ids[:, 0]


@flax.struct.dataclass
class WeightedMean:
    """A mean kept as its two sums, so that merging over microbatches, hosts and batches is exact."""

    total: jax.Array
    weight: jax.Array

    def __add__(self, other: "WeightedMean") -> "WeightedMean":
        return WeightedMean(self.total + other.total, self.weight + other.weight)

    @property
    def value(self) -> jax.Array:
        """total / weight, and 0 where nothing was weighed."""
        return jnp.where(self.weight > 0, self.total / jnp.where(self.weight > 0, self.weight, 1), 0.0)


@flax.struct.dataclass
class LossTerms:
    """What an objective returns: sums and weights, never a mean. Additive over microbatches, hosts and devices.

    The loss that is differentiated is loss_sum / weight + sum over `others` of total / weight, with the weights of the
    global batch. Weights depend on the batch and its noise, never on the parameters.

    Attributes:
      loss_sum: f32[], the sum whose quotient by the global `weight` is differentiated.
      weight: f32[], what the training step divides by, once, globally.
      metrics: named means for the log; all additive too.
      others: further parts of the loss, each divided by a global weight of its own: a mixture of objectives that count
        tokens, replaced tokens and examples. An objective that has any says so (`Needs.several_weights`).
      variance: f32[], the squared standard error of `loss_sum` over the Monte-Carlo draws of a bound; NaN where one
        draw was taken, None for exact values and in training. Batches are independent, so it is additive.
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
        """Every part of the loss as sum and weight, that of `loss_sum` first."""
        return (WeightedMean(self.loss_sum, self.weight), *self.others)

    @property
    def weights(self) -> tuple[jax.Array, ...]:
        """f32[] of every part, in the order of `parts`."""
        return tuple(part.weight for part in self.parts)

    @property
    def loss(self) -> jax.Array:
        """The sum of the parts' means, and 0 for a batch in which nothing is scored."""
        return self.share_of(self.weights)

    def share_of(self, weights: tuple[jax.Array, ...]) -> jax.Array:
        """Returns f32[], what these sums add to the loss of a batch whose parts have the given weights."""
        means = [WeightedMean(part.total, weight).value for part, weight in zip(self.parts, weights, strict=True)]
        return functools.reduce(jnp.add, means)

    @property
    def scored(self) -> jax.Array:
        """bool[], whether any part scores anything."""
        return jnp.any(jnp.stack(jnp.broadcast_arrays(*self.weights)) > 0)


@flax.struct.dataclass
class TokenStats:
    """Per-token summaries of the next-token distribution, computed without ever holding [B,T,V].

    Attributes:
      argmax: i32[B,T], the most likely token.
      sample: i32[B,T], a draw under the proposal's temperature, top-k and top-p (equal to `argmax` at temperature 0).
      sample_log_prob: f32[B,T], log-probability of `sample` under the model at temperature 1 without filters.
      target_log_prob: f32[B,T], log-probability of the tokens that were asked about (0 where none were).
      entropy: f32[B,T] in nats, of the model at temperature 1 without filters, or at the proposal's temperature where
        that was asked for; None where neither was.
      margin: f32[B,T], probability of the most likely token minus that of the second; None where not asked for.
      expected: [B,T,P,D] in the compute dtype, mean embedding of the next token under each of the P passes (the second
        is that without conditioning, under guidance); None where not asked for.
      change: f32[B,T], the probability that the token changes, where logits are ratios (`nn.cross_entropy.Ratios`).
      proposal_log_prob: f32[B,T], log-probability of `sample` under the proposal itself; None where not asked for.
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
    """The canvas after each forward pass, for playback.

    Attributes:
      tokens: i32[steps,B,T]; steps that an early exit skipped repeat the final canvas.
    """

    tokens: jax.Array


@flax.struct.dataclass
class Decoded:
    """What a sampler returns.

    Attributes:
      tokens: i32[B,T], the prompt's canvas with the target window filled in; after the end of a target comes PAD.
      lengths: i32[B], generated tokens before EOS, PAD or the end of the window (none of these is counted).
      scores: f32[B], the score by which candidates were ranked (higher is better); each sampler documents its own.
      forward_passes: i32[B], network calls made while the row was in the batch, candidates counted one each.
      trace: the canvas step by step where the sampler was asked to keep it.
    """

    tokens: jax.Array
    lengths: jax.Array
    scores: jax.Array
    forward_passes: jax.Array
    trace: Trace | None = None
