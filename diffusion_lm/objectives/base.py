"""The interface of objectives and what all of them share: one forward pass, scored sums, per-token reports."""

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from diffusion_lm.core.errors import near_names, require
from diffusion_lm.core.real_tokens import real_tokens
from diffusion_lm.core.rng import StreamKeys
from diffusion_lm.core.types import Batch, LossTerms, WeightedMean
from diffusion_lm.nn.masks import Visibility
from diffusion_lm.nn.named_masks import BLOCK_NAMES, VISIBILITY_NAMES, is_visibility, named_visibility
from diffusion_lm.nn.time_conditioning import time_input
from diffusion_lm.noise.process import Process
from diffusion_lm.noise.weighting import BoundKind

Model = Any
"""A `BoundModel` (architectures/base.py): an architecture with its parameters. Tests hand in tables instead."""


@dataclasses.dataclass(frozen=True)
class Needs:
    """What an objective asks of the model and of the run.

    Attributes:
      visibility: name of the attention visibility it trains under.
      passes: forward passes of the network per training step.
      frozen_passes: how many of them have no backward pass.
      mask_token: whether the vocabulary must have a MASK token.
      mask_id: the id that it takes for MASK; None where it does not say.
      one_example_a_row: whether rows must not be packed.
      self_conditioning: whether the network must be able to read its own previous prediction.
      token_schedules: whether the network must have an exponent per token (`architectures.exponents`).
      several_weights: whether its loss has parts that are divided by weights of their own (`LossTerms.others`).
      processes: what the network is trained for, which a sampler must undo (`noise.process.unlike_training`); none
        where the objective does not train the network.
      tail: the filler that is noised as a whole ("eos", "pad"), which the target window must have, or lengths leak.
    """

    visibility: str
    passes: int = 1
    frozen_passes: int = 0
    mask_token: bool = False
    mask_id: int | None = None
    one_example_a_row: bool = False
    self_conditioning: bool = False
    token_schedules: bool = False
    several_weights: bool = False
    processes: tuple[Process, ...] = ()
    tail: str | None = None

    @property
    def forward_passes_worth(self) -> float:
        """What a training step costs, in forward passes: a backward pass counts twice a forward pass."""
        return 3.0 * self.passes - 2.0 * self.frozen_passes


class Objective(Protocol):
    """A frozen dataclass, configured by one gin file."""

    def __hash__(self) -> int: ...

    @property
    def bound_kind(self) -> BoundKind:
        """What `bound` says about the likelihood: "exact", "nelbo" (a bound) or "pseudo" (neither)."""
        ...

    def needs(self) -> Needs:
        """Returns what it asks of the model and of the run."""
        ...

    def loss(self, model: Model, batch: Batch, keys: StreamKeys, *, train: bool = True) -> LossTerms:
        """Returns the sums to be differentiated; `train` turns dropout on (where the model has any)."""
        ...

    def bound(self, model: Model, batch: Batch, keys: StreamKeys) -> LossTerms:
        """Returns the evaluation sums: no dropout, and the same noise at every training step.

        One estimate: draws are averaged (`draws.mean_over_draws`), so that `loss_sum / weight` and `weight` do not
        depend on their number.
        """
        ...


def check_visibility(name: str, where: str) -> None:
    """Raises `ConfigError` unless `name` is a visibility."""
    require(
        is_visibility(name),
        f"there is no visibility {name!r}{near_names(str(name), VISIBILITY_NAMES)}",
        where=where,
        fix=f"Choose one of {', '.join((*VISIBILITY_NAMES, *BLOCK_NAMES))}.",
    )


def check_auxiliary(weight: float, where: str) -> None:
    """Raises `ConfigError` unless `weight` can weigh a loss."""
    require(weight >= 0, f"auxiliary = {weight} is negative", where=where, fix="0.0 leaves the second loss out.")


def frozen(keys: StreamKeys) -> StreamKeys:
    """Returns the keys of step 0, so that evaluations of the same weights agree whenever they are made (trap T31)."""
    return keys.replace(step=jnp.zeros((), jnp.int32))


class Forward:
    """The forward passes of one loss over one batch: same visibility, one encoder pass, dropout keyed per row and pass.

    Dropout is a function of (seed, step, pass, row id), so it is invariant to microbatches and to the mesh.
    """

    def __init__(
        self,
        model: Model,
        batch: Batch,
        keys: StreamKeys,
        *,
        visibility: str | Visibility,
        train: bool,
        passes: int = 1,
    ):
        self._model, self._batch = model, batch
        self._keys = keys if train else None
        if isinstance(visibility, str):
            visibility = named_visibility(visibility, batch.target_mask)
        self._visibility = visibility
        self._encoder = batch.encoder
        if batch.encoder is not None and passes > 1:
            self._encoder = model.encode(batch.encoder, dropout_keys=self._dropout_keys("encoder"))

    def __call__(
        self,
        tokens: jax.Array,
        pass_number: int = 0,
        *,
        self_condition: jax.Array | None = None,
        rate: jax.Array | None = None,
        has_gradient: bool = True,
    ):
        """Returns the `Hidden` of i32[B,T] tokens standing in for the batch's own.

        Args:
          tokens: what the network reads.
          pass_number: number of the pass, for its dropout.
          self_condition: [B,T,D], see `Architecture.hidden`.
          rate: f32[B,T], 1 - alpha at each target token, of which a network with `spec.time_conditioning` is told.
          has_gradient: False for a pass whose result is only looked at; the backward pass keeps nothing of it.
        """
        model, encoder = self._model, self._encoder
        if not has_gradient:
            model = dataclasses.replace(model, params=jax.lax.stop_gradient(model.params))
            encoder = jax.lax.stop_gradient(encoder)
        with jax.named_scope(f"objective/pass_{pass_number}"):
            return model(
                tokens,
                visibility=self._visibility,
                positions=self._batch.positions,
                segment_ids=self._batch.segment_ids,
                encoder=encoder,
                self_condition=self_condition,
                time=time_input(model.spec, rate, self._batch.target_mask),
                dropout_keys=self._dropout_keys(f"decoder/{pass_number}"),
            )

    def _dropout_keys(self, site: str) -> jax.Array | None:
        return None if self._keys is None else self._keys.per_example(f"dropout/{site}", self._batch.row_ids)


def weighted_sum(values: jax.Array, weights: jax.Array) -> jax.Array:
    """Returns f32[], the sum of values x weights in which unweighted values take no part, not even as NaN."""
    scored = weights != 0
    return jnp.sum(jnp.where(scored, values, 0.0) * jnp.where(scored, weights, 0.0), dtype=jnp.float32)


def weighted_mean(values: jax.Array, weights: jax.Array) -> WeightedMean:
    """Returns the mean of `values` under `weights` as its two sums."""
    return WeightedMean(total=weighted_sum(values, weights), weight=jnp.sum(weights, dtype=jnp.float32))


def mapped_losses(
    model: Model, hidden: Any, alignment: Any, batch: Batch, fn: Any, *values: jax.Array, mask_id: int | None
):
    """Returns f32[B,T], `fn(logits, *values)` at every scored token, without ever holding [B,T,V].

    Args:
      model: the bound network.
      hidden: its states.
      alignment: which state predicts which token.
      batch: says which tokens are scored.
      fn: `(logits [...,V], *values [...]) -> [...]`.
      *values: [B,T] at the tokens they speak about.
      mask_id: MASK, which gets no probability, or None.
    """
    losses = model.map_logits(
        fn,
        hidden,
        tuple(alignment.to_slots(value) for value in values),
        where=alignment.to_slots(batch.loss_weights != 0),
        forbidden=() if mask_id is None else (mask_id,),
    )
    return alignment.to_tokens(losses)


def per_token_terms(losses_BT: jax.Array, batch: Batch, pad_id: int, eos_id: int) -> LossTerms:
    """Returns the sums of per-token losses that are their own report: each scored token counts once."""
    return LossTerms(
        weighted_sum(losses_BT, batch.loss_weights),
        jnp.sum(batch.loss_weights, dtype=jnp.float32),
        {"nll_per_real_token": weighted_mean(losses_BT, real_tokens(batch, pad_id, eos_id))},
    )
