"""Optimizers: frozen dataclasses with an update rule and a learning-rate schedule, which are independent.

`transformation` is the rule at learning rate 1. The compiled step multiplies its result by the current learning rate,
which the host computes from `schedule`. The parameters of all layers are stacked on a leading `layers` axis. That is
only a matter of storage, and no rule depends on it: for example, Adafactor reduces over the matrix of one layer.
"""

import dataclasses
import math
from typing import Any, Protocol

import jax
import optax
import optax.contrib

from diffusion_lm.core.axes import AxesTree
from diffusion_lm.core.errors import require
from diffusion_lm.parallel.shardings import is_axes
from diffusion_lm.training.schedules import Constant, InverseSqrt, Schedule

_NEVER_DECAYED = ("embed", "positions", "norm", "bias")


class Optimizer(Protocol):
    """An update rule and its schedule. Implementations are frozen dataclasses with the field `schedule`."""

    @property
    def schedule(self) -> Schedule:
        """The learning rate of each step."""

    def transformation(self, axes: AxesTree) -> optax.GradientTransformation:
        """Returns the rule at learning rate 1; the step subtracts the learning rate times its result.

        Args:
          axes: logical axes of the parameters (`Architecture.logical_axes()`).
        """


def decay_mask(axes: AxesTree) -> dict[str, Any]:
    """Returns a tree of booleans: True for parameters with weight decay, the matrices except embeddings.

    Norm scales, biases (including the relative position bias) and embeddings do not decay. A parameter is a matrix if
    it has at least two axes besides the stacked `layers`.
    """

    def decays(path, leaf_axes) -> bool:
        # By name too: the relative bias and learned positions have two axes but are not matrices.
        name = jax.tree_util.keystr(path, simple=True, separator="/").lower()
        dims = [axis for axis in leaf_axes if axis != "layers"]
        return len(dims) >= 2 and not any(part in name for part in _NEVER_DECAYED)

    return jax.tree_util.tree_map_with_path(decays, axes, is_leaf=is_axes)


def _clip(norm: float | None) -> list[optax.GradientTransformation]:
    return [] if norm is None else [optax.clip_by_global_norm(norm)]


def _check_number(optimizer: Optimizer, field: str, low: float, high: float = float("inf")) -> None:
    value = getattr(optimizer, field)
    require(
        isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high,
        f"{field}={value!r}: must be a number in [{low:g}, {high:g}]",
        where=f"{type(optimizer).__name__}.{field}",
        fix="Use a number in this range.",
    )


def _check_schedule(optimizer: Optimizer) -> None:
    require(
        callable(getattr(optimizer.schedule, "value", None)),
        f"schedule={optimizer.schedule!r}: is not a learning-rate schedule",
        where=f"{type(optimizer).__name__}.schedule",
        fix="Use one of training.schedules, e.g. @schedules.Cosine().",
    )


@dataclasses.dataclass(frozen=True)
class AdamW:
    """Adam with decoupled weight decay (arXiv 1711.05101).

    Attributes:
      schedule: the learning rate; it multiplies the weight decay too.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the square root of the second moment.
      weight_decay: decay per unit of learning rate, on matrices only (`decay_mask`).
      clip_norm: gradients are scaled down to this global norm; None = no clipping.
    """

    schedule: Schedule = Constant(1e-3)
    b1: float = 0.9
    b2: float = 0.98
    eps: float = 1e-8
    weight_decay: float = 0.01
    clip_norm: float | None = 1.0

    def __post_init__(self):
        _check_schedule(self)
        _check_number(self, "b1", 0, 1)
        _check_number(self, "b2", 0, 1)
        _check_number(self, "eps", 0)
        _check_number(self, "weight_decay", 0)
        if self.clip_norm is not None:
            _check_number(self, "clip_norm", 0)

    def transformation(self, axes: AxesTree) -> optax.GradientTransformation:
        """Returns clip, Adam, decay."""
        return optax.chain(
            *_clip(self.clip_norm),
            optax.scale_by_adam(self.b1, self.b2, self.eps),
            optax.add_decayed_weights(self.weight_decay, mask=decay_mask(axes)),
        )


@dataclasses.dataclass(frozen=True)
class Adafactor:
    """Adafactor as T5 and T5X use it (arXiv 1804.04235): factored, relative to the parameter's scale, no momentum.

    As in T5X, each layer of the stack is a separate parameter, and the two axes of attention heads count as one: the
    second moment of `[embed, heads, head_dim]` is factored like that of a matrix `[embed, heads * head_dim]`.

    Attributes:
      schedule: the learning rate, relative to each parameter's root mean square.
      decay_rate: exponent c of the second moment's decay `1 - step^-c`.
      clipping_threshold: largest root mean square of an update; None = no clipping.
      multiply_by_parameter_scale: updates are relative to the parameter's root mean square (at least 1e-3).
      min_dim_size_to_factor: matrices with a smaller side have a full second moment.
      clip_norm: gradients are scaled down to this global norm first; T5 does not.
    """

    schedule: Schedule = InverseSqrt()
    decay_rate: float = 0.8
    clipping_threshold: float | None = 1.0
    multiply_by_parameter_scale: bool = True
    min_dim_size_to_factor: int = 128
    clip_norm: float | None = None

    def __post_init__(self):
        _check_schedule(self)
        _check_number(self, "decay_rate", 0, 1)
        _check_number(self, "min_dim_size_to_factor", 1)
        if self.clipping_threshold is not None:
            _check_number(self, "clipping_threshold", 1)
        if self.clip_norm is not None:
            _check_number(self, "clip_norm", 0)

    def transformation(self, axes: AxesTree) -> optax.GradientTransformation:
        """Returns Adafactor at learning rate 1, layer by layer."""
        rule = optax.adafactor(
            learning_rate=None,
            min_dim_size_to_factor=self.min_dim_size_to_factor,
            decay_rate=self.decay_rate,
            multiply_by_parameter_scale=self.multiply_by_parameter_scale,
            clipping_threshold=self.clipping_threshold,
        )
        # optax's rule ends in a factor of -1; the step subtracts.
        return optax.chain(*_clip(self.clip_norm), per_matrix(optax.chain(rule, optax.scale(-1.0)), axes))


@dataclasses.dataclass(frozen=True)
class Muon:
    """Muon (Jordan et al. 2024): orthogonalised momentum for the matrices inside the blocks, Adam for all else.

    Updates are scaled to Adam's usual root mean square (arXiv 2502.16982), so both share one learning rate, and the
    schedule of AdamW can be reused. A matrix maps all its input axes to all its output axes; heads and head size are
    one axis.

    Attributes:
      schedule: the learning rate; it multiplies the decay too.
      momentum: decay of the average of gradients, with Nesterov momentum.
      newton_schulz_steps: iterations of the orthogonalisation.
      update_rms: root mean square of an orthogonalised update at learning rate 1.
      b1: Adam's, for embeddings, norms, biases and the head.
      b2: likewise.
      eps: likewise.
      weight_decay: decay per unit of learning rate, on matrices only (`decay_mask`).
      clip_norm: gradients are scaled down to this global norm; None = no clipping.
    """

    schedule: Schedule = Constant(1e-3)
    momentum: float = 0.95
    newton_schulz_steps: int = 5
    update_rms: float = 0.2
    b1: float = 0.9
    b2: float = 0.98
    eps: float = 1e-8
    weight_decay: float = 0.01
    clip_norm: float | None = 1.0

    def __post_init__(self):
        _check_schedule(self)
        for field in ("momentum", "b1", "b2"):
            _check_number(self, field, 0, 1)
        for field in ("update_rms", "eps", "weight_decay"):
            _check_number(self, field, 0)
        _check_number(self, "newton_schulz_steps", 1)
        if self.clip_norm is not None:
            _check_number(self, "clip_norm", 0)

    def transformation(self, axes: AxesTree) -> optax.GradientTransformation:
        """Returns clip, then Muon or Adam, then decay."""
        dimensions = jax.tree_util.tree_map_with_path(_muon_dimensions, axes, is_leaf=is_axes)
        labels = jax.tree.map(
            lambda dims: "adam" if isinstance(dims, optax.MaskedNode) else "muon", dimensions, is_leaf=_is_dimensions
        )

        def to_rms(direction: jax.Array, dims: optax.contrib.MuonDimensionNumbers) -> jax.Array:
            # Orthogonal updates have a root mean square of 1 / sqrt(larger side).
            sides = (math.prod(direction.shape[i] for i in side) for side in dims)
            return self.update_rms * math.sqrt(max(sides)) * direction

        muon = optax.chain(
            optax.contrib.scale_by_muon(
                ns_steps=self.newton_schulz_steps, beta=self.momentum, weight_dimension_numbers=lambda _: dimensions
            ),
            optax.stateless(lambda updates, _: jax.tree.map(to_rms, updates, dimensions)),
        )
        return optax.chain(
            *_clip(self.clip_norm),
            optax.partition({"muon": muon, "adam": optax.scale_by_adam(self.b1, self.b2, self.eps)}, labels),
            optax.add_decayed_weights(self.weight_decay, mask=decay_mask(axes)),
        )


def _is_dimensions(leaf: object) -> bool:
    return isinstance(leaf, optax.contrib.MuonDimensionNumbers | optax.MaskedNode)


def _muon_dimensions(path, leaf_axes) -> optax.contrib.MuonDimensionNumbers | optax.MaskedNode:
    """Returns the input and output axes of a matrix inside a block; a masked node for any other array."""
    name = jax.tree_util.keystr(path, simple=True, separator="/").lower()
    axes = [axis for axis in leaf_axes if axis != "layers"]
    if "layers" not in leaf_axes or len(axes) < 2 or any(part in name for part in _NEVER_DECAYED):
        return optax.MaskedNode()
    first = leaf_axes.index("layers") + 1
    # The axes of the stacked arrays: `layers` comes first and is mapped over.
    inputs = 2 if axes[1] == "head_dim" else 1  # [heads, head_dim, embed] reads heads, [embed, heads, head_dim] writes
    numbers = range(first, first + len(axes))
    return optax.contrib.MuonDimensionNumbers(tuple(numbers[:inputs]), tuple(numbers[inputs:]))


def per_matrix(rule: optax.GradientTransformation, axes: AxesTree) -> optax.GradientTransformation:
    """Applies a leaf-wise `rule` to each layer's matrix instead of the stacked arrays with more axes.

    Args:
      rule: a transformation that treats every array separately.
      axes: logical axes; a leading `layers` is mapped over, `heads, head_dim` are joined.
    """

    def matrix(leaf_axes, array):
        shape: list[int] = []
        for i, (axis, size) in enumerate(zip(leaf_axes, array.shape, strict=True)):
            if axis == "head_dim" and i and leaf_axes[i - 1] in ("heads", "kv_heads"):
                shape[-1] *= size
            else:
                shape.append(size)
        return array.reshape(shape)

    def mapped(function, leaf_axes):
        return jax.vmap(function) if leaf_axes[:1] == ("layers",) else function

    def init(params):
        return jax.tree.map(lambda a, p: mapped(rule.init, a)(matrix(a, p)), axes, params, is_leaf=is_axes)

    def update(gradients, states, params):
        def one(leaf_axes, gradient, state, param):
            new, state = mapped(rule.update, leaf_axes)(matrix(leaf_axes, gradient), state, matrix(leaf_axes, param))
            return new.reshape(gradient.shape), state

        # `states` has a state per leaf, so the map stops at the leaves of `axes`.
        pairs = jax.tree.map(one, axes, gradients, states, params, is_leaf=is_axes)
        updates, new_states = (jax.tree.map(lambda _, pair, i=i: pair[i], axes, pairs, is_leaf=is_axes) for i in (0, 1))
        return updates, new_states

    return optax.GradientTransformation(init, update)
