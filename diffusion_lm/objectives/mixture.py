"""A weighted sum of objectives on the same batch, with factors that may change during training.

L = sum_i w_i(step) S_i / W_i,      S_i, W_i: loss sum and weight of part i over the global batch
"""

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import jax
import jax.numpy as jnp

from diffusion_lm.architectures.base import BoundModel
from diffusion_lm.core.alignment import Alignment
from diffusion_lm.core.checks import check_choice, check_non_negative
from diffusion_lm.core.errors import require
from diffusion_lm.core.rng import StreamKeys
from diffusion_lm.core.types import Batch, LossTerms, WeightedMean
from diffusion_lm.noise.weighting import BoundKind
from diffusion_lm.objectives.objective import Needs, Objective


class LossFactor(Protocol):
    """The factor of one part as a function of the training step."""

    def at(self, step: jax.Array) -> jax.Array:
        """Returns f32[] at i32[] steps."""
        ...


@dataclasses.dataclass(frozen=True)
class ConstantFactor:
    """The same weight at every step.

    Attributes:
      value: the weight.
    """

    value: float = 1.0

    def __post_init__(self):
        check_non_negative(self.value, "ConstantFactor.value")

    def at(self, step: jax.Array) -> jax.Array:
        """Returns the value."""
        del step
        return jnp.asarray(self.value, jnp.float32)


@dataclasses.dataclass(frozen=True)
class RampFactor:
    """Linear between two steps, constant before and after.

    Attributes:
      start: weight up to step `first`.
      end: weight from step `last` on.
      first: last step at `start`.
      last: first step at `end`.
    """

    start: float
    end: float
    first: int = 0
    last: int = 1000

    def __post_init__(self):
        check_non_negative(self.start, "RampFactor.start")
        check_non_negative(self.end, "RampFactor.end")
        require(
            0 <= self.first < self.last,
            f"first={self.first}, last={self.last}: must satisfy 0 <= first < last",
            where="RampFactor.last",
            fix="The factor is constant before `first` and after `last`.",
        )

    def at(self, step: jax.Array) -> jax.Array:
        """Returns the weight at a step."""
        share = jnp.clip((step - self.first) / (self.last - self.first), 0.0, 1.0)
        return jnp.asarray(self.start + (self.end - self.start) * share, jnp.float32)


@dataclasses.dataclass(frozen=True)
class Mixture:
    """sum_i w_i(step) loss_i, where loss_i is what part i would have as the only objective.

    Parts may be divided by scored tokens, replaced tokens or examples, so the training step gets a weight for each
    part: `LossTerms.weight` is the primary part's, `LossTerms.others` has those of the others.

    Each part draws its own noise. A metric's name is prefixed with its part's name; metrics of the primary part also
    appear without the prefix.

    Attributes:
      names: a name per part, for the log.
      parts: the objectives.
      weights: their factors, `ConstantFactor` or `RampFactor`.
      primary: name of the part whose bound is evaluated and reported.
    """

    names: tuple[str, ...]
    parts: tuple[Objective, ...]
    weights: tuple[LossFactor, ...]
    primary: str

    def __post_init__(self):
        for field in ("names", "parts", "weights"):
            object.__setattr__(self, field, tuple(getattr(self, field)))
        require(
            len(self.names) == len(self.parts) == len(self.weights) > 0 and len(set(self.names)) == len(self.names),
            f"{len(self.names)} names, {len(self.parts)} parts, {len(self.weights)} weights: the numbers must agree",
            where="Mixture.parts",
            fix="Give every part one weight and a name that no other part has.",
        )
        check_choice(self.primary, self.names, "Mixture.primary")

    @property
    def alignment(self) -> Alignment:
        """That of the primary part."""
        return self._primary.alignment

    @property
    def bound_kind(self) -> BoundKind:
        """That of the primary part."""
        return self._primary.bound_kind

    def needs(self) -> Needs:
        """What any part needs; the passes add up."""
        needs = [part.needs() for part in self.parts]
        return Needs(
            visibility=self._primary.needs().visibility,
            passes=sum(one.passes for one in needs),
            frozen_passes=sum(one.frozen_passes for one in needs),
            mask_token=any(one.mask_token for one in needs),
            one_example_per_row=any(one.one_example_per_row for one in needs),
            several_weights=len(self.parts) > 1 or any(one.several_weights for one in needs),
            self_conditioning=any(one.self_conditioning for one in needs),
            token_schedules=any(one.token_schedules for one in needs),
            contracts=tuple(contract for one in needs for contract in one.contracts),
            tail=next((one.tail for one in needs if one.tail is not None), None),
        )

    def loss(self, model: BoundModel, batch: Batch, keys: StreamKeys, *, train: bool = True) -> LossTerms:
        """Returns the primary part's sum and weight, and the other parts in `others`, each times its factor."""
        terms = [part.loss(model, batch, _apart(keys, number), train=train) for number, part in enumerate(self.parts)]
        scaled = {
            name: [WeightedMean(factor.at(keys.step) * part.total, part.weight) for part in one.parts]
            for name, factor, one in zip(self.names, self.weights, terms, strict=True)
        }
        first, *others = scaled.pop(self.primary)
        others += [part for parts in scaled.values() for part in parts]
        return LossTerms(first.total, first.weight, self._metrics(terms), tuple(others))

    def bound(self, model: BoundModel, batch: Batch, keys: StreamKeys) -> LossTerms:
        """Returns the primary part's bound with the metrics of all parts' bounds."""
        terms = [part.bound(model, batch, _apart(keys, number)) for number, part in enumerate(self.parts)]
        primary = self._named(terms)[self.primary]
        return dataclasses.replace(primary, metrics=self._metrics(terms))

    @property
    def _primary(self) -> Objective:
        return self.parts[self.names.index(self.primary)]

    def _named(self, terms: Sequence[LossTerms]) -> dict[str, LossTerms]:
        return dict(zip(self.names, terms, strict=True))

    def _metrics(self, terms: Sequence[LossTerms]) -> dict[str, WeightedMean]:
        named = self._named(terms)
        metrics = {f"{name}/{metric}": value for name, one in named.items() for metric, value in one.metrics.items()}
        return {**metrics, **named[self.primary].metrics}


def _apart(keys: StreamKeys, number: int) -> StreamKeys:
    """Returns the keys of one part: two parts of the same class must not share their noise."""
    return keys.replace(root=jax.random.fold_in(keys.root, number))
