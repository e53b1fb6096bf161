"""A weighted sum of objectives on the same batch, whose factors may change during training.

loss = sum_i w_i(step) S_i / W_i,      S_i, W_i: loss sum and weight of part i over the global batch
"""

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from diffusion_lm.core.errors import require
from diffusion_lm.core.rng import StreamKeys
from diffusion_lm.core.types import Batch, LossTerms, WeightedMean
from diffusion_lm.noise.weighting import BoundKind
from diffusion_lm.objectives.base import Model, Needs


class Weight(Protocol):
    """The factor of one part as a function of the training step."""

    def at(self, step: jax.Array) -> jax.Array:
        """Returns f32[] at i32[] steps."""
        ...


@dataclasses.dataclass(frozen=True)
class Constant:
    """The same weight at every step.

    Attributes:
      value: the weight.
    """

    value: float = 1.0

    def __post_init__(self):
        _not_negative(self, "value")

    def at(self, step: jax.Array) -> jax.Array:
        """Returns the value."""
        del step
        return jnp.asarray(self.value, jnp.float32)


@dataclasses.dataclass(frozen=True)
class Ramp:
    """A straight line between two steps, constant before and after.

    Attributes:
      start: weight up to step `first`.
      end: weight from step `last` on.
      first: where the line begins.
      last: where it ends.
    """

    start: float
    end: float
    first: int = 0
    last: int = 1000

    def __post_init__(self):
        _not_negative(self, "start")
        _not_negative(self, "end")
        require(
            0 <= self.first < self.last,
            f"a ramp from step {self.first} to step {self.last} has no length",
            where="Ramp.last",
            fix="Give 0 <= first < last.",
        )

    def at(self, step: jax.Array) -> jax.Array:
        """Returns the weight at a step."""
        share = jnp.clip((step - self.first) / (self.last - self.first), 0.0, 1.0)
        return jnp.asarray(self.start + (self.end - self.start) * share, jnp.float32)


@dataclasses.dataclass(frozen=True)
class Mixture:
    """sum_i w_i(step) loss_i, where loss_i is what part i would have as the only objective.

    Parts count scored tokens, replaced tokens (`Denoising.normaliser`) or examples. So every part has a weight of its
    own in what the training step gets (`LossTerms.others`); that of the primary part is `LossTerms.weight`.

    Parts draw noise of their own. Metrics keep their names behind that of their part; those of the primary part also
    appear under their own.

    Attributes:
      names: a name for each part, for the log.
      parts: the objectives.
      weights: their factors, `Constant` or `Ramp`.
      primary: name of the part whose bound is evaluated and reported.
    """

    names: tuple[str, ...]
    parts: tuple[Any, ...]
    weights: tuple[Any, ...]
    primary: str

    def __post_init__(self):
        for field in ("names", "parts", "weights"):
            object.__setattr__(self, field, tuple(getattr(self, field)))
        require(
            len(self.names) == len(self.parts) == len(self.weights) > 0 and len(set(self.names)) == len(self.names),
            f"{len(self.names)} names, {len(self.parts)} parts and {len(self.weights)} weights do not make a mixture",
            where="Mixture.parts",
            fix="Give every part one weight and a name of its own.",
        )
        require(
            self.primary in self.names,
            f"there is no part {self.primary!r}",
            where="Mixture.primary",
            fix=f"Choose one of {', '.join(self.names)}.",
        )
        masks = self._mask_ids()
        require(
            len(masks) < 2,
            f"the parts take different tokens for MASK: {', '.join(map(str, masks))}",
            where="Mixture.parts",
            fix="Set the macro MASK_ID, or the parts' mask_id, to the vocabulary's MASK.",
        )

    @property
    def alignment(self) -> Any:
        """That of the primary part."""
        return self._primary.alignment

    @property
    def bound_kind(self) -> BoundKind:
        """That of the primary part."""
        return self._primary.bound_kind

    def needs(self) -> Needs:
        """What any part needs; the passes add up."""
        needs = [part.needs() for part in self.parts]
        masks = self._mask_ids()
        return Needs(
            visibility=self._primary.needs().visibility,
            passes=sum(one.passes for one in needs),
            frozen_passes=sum(one.frozen_passes for one in needs),
            mask_token=any(one.mask_token for one in needs),
            mask_id=masks[0] if masks else None,
            one_example_a_row=any(one.one_example_a_row for one in needs),
            several_weights=len(self.parts) > 1 or any(one.several_weights for one in needs),
            self_conditioning=any(one.self_conditioning for one in needs),
            token_schedules=any(one.token_schedules for one in needs),
            processes=tuple(process for one in needs for process in one.processes),
            tail=next((one.tail for one in needs if one.tail is not None), None),
        )

    def loss(self, model: Model, batch: Batch, keys: StreamKeys, *, train: bool = True) -> LossTerms:
        """Returns the primary part's sum and weight, and the other parts in `others`, each times its factor."""
        terms = [part.loss(model, batch, _apart(keys, number), train=train) for number, part in enumerate(self.parts)]
        scaled = {
            name: [WeightedMean(factor.at(keys.step) * part.total, part.weight) for part in one.parts]
            for name, factor, one in zip(self.names, self.weights, terms, strict=True)
        }
        first, *others = scaled.pop(self.primary)
        others += [part for parts in scaled.values() for part in parts]
        return LossTerms(first.total, first.weight, self._metrics(terms), tuple(others))

    def bound(self, model: Model, batch: Batch, keys: StreamKeys) -> LossTerms:
        """Returns the primary part's bound with the metrics of all parts' bounds."""
        terms = [part.bound(model, batch, _apart(keys, number)) for number, part in enumerate(self.parts)]
        primary = self._named(terms)[self.primary]
        return dataclasses.replace(primary, metrics=self._metrics(terms))

    @property
    def _primary(self) -> Any:
        return self.parts[self.names.index(self.primary)]

    def _mask_ids(self) -> list[int]:
        """Returns the ids that parts take for MASK, each once."""
        return sorted({mask for part in self.parts if (mask := part.needs().mask_id) is not None})

    def _named(self, terms: list[LossTerms]) -> dict[str, LossTerms]:
        return dict(zip(self.names, terms, strict=True))

    def _metrics(self, terms: list[LossTerms]) -> dict[str, Any]:
        named = self._named(terms)
        metrics = {f"{name}/{metric}": value for name, one in named.items() for metric, value in one.metrics.items()}
        return {**metrics, **named[self.primary].metrics}


def _apart(keys: StreamKeys, number: int) -> StreamKeys:
    """Returns keys of one part, so that two parts of one class do not share their noise."""
    return keys.replace(root=jax.random.fold_in(keys.root, number))


def _not_negative(weight: Any, field: str) -> None:
    require(
        getattr(weight, field) >= 0,
        f"{field} = {getattr(weight, field)} is negative",
        where=f"{type(weight).__name__}.{field}",
        fix="Give 0 or more.",
    )
