"""Training a part of a network, with the rest frozen.

Either the network determines the part (LoRA: `trained_part` and `rejoined`, with any optimizer), or the run does
(`PartialAdamW`: a head on a frozen network).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import optax

from diffusion_lm.core.axes import AxesTree
from diffusion_lm.core.errors import require
from diffusion_lm.training.optimizers import AdamW, decay_mask


def trained_part(tree: Mapping[str, Any], frozen: frozenset[str], path: str = "") -> Mapping[str, Any]:
    """Returns a nested dict without the leaves whose paths are in `frozen`, and without dicts that become empty.

    Args:
      tree: parameters, or a tree of the same structure (axes, shardings).
      frozen: paths such as `blocks/mlp/up`, from `Architecture.frozen_arrays`.
      path: of the tree itself.
    """
    if not frozen:
        return tree
    trained: dict[str, Any] = {}
    for name, node in tree.items():
        here = f"{path}/{name}" if path else name
        if isinstance(node, Mapping):
            part = trained_part(node, frozen, here)
            if part:
                trained[name] = part
        elif here not in frozen:
            trained[name] = node
    return trained


def rejoined(whole: Any, part: Any) -> Any:
    """Returns `whole` with the leaves that `part` has replaced by those of `part`; the inverse of `trained_part`."""
    if not isinstance(part, Mapping):  # a leaf
        return part
    return {name: rejoined(node, part[name]) if name in part else node for name, node in whole.items()}


@dataclasses.dataclass(frozen=True)
class PartialAdamW(AdamW):
    """AdamW on some parts of the network; the others are frozen, with neither updates nor decay nor moments.

    Attributes:
      trained: names of the top-level parts of the parameters that are trained, e.g. ("length_head",).
    """

    trained: tuple[str, ...] = ()

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "trained", tuple(self.trained))
        require(
            bool(self.trained),
            "trained=(): at least one part must be trained",
            where="PartialAdamW.trained",
            fix="Name one, e.g. ('length_head',).",
        )

    def transformation(self, axes: AxesTree) -> optax.GradientTransformation:
        """Returns clip, Adam on the trained parts, decay of their matrices; clipping uses the norm over all parts.

        Raises:
          ConfigError: the network has no such part.
        """
        missing = set(self.trained) - set(axes)
        require(
            not missing,
            f"trained={self.trained!r}: the network has no part {', '.join(sorted(missing))}",
            where="PartialAdamW.trained",
            fix=f"Its parts are {', '.join(axes)}.",
        )

        # Labels and masks have the structure of the parameters.
        def each(value: Any, frozen: Any) -> Any:
            return {
                part: jax.tree.map(lambda x, part=part: value(x) if part in self.trained else frozen, tree)
                for part, tree in decay_mask(axes).items()
            }

        return optax.chain(
            *([] if self.clip_norm is None else [optax.clip_by_global_norm(self.clip_norm)]),
            optax.partition(
                {"trained": optax.scale_by_adam(self.b1, self.b2, self.eps), "frozen": optax.set_to_zero()},
                each(lambda _: "trained", "frozen"),
            ),
            optax.add_decayed_weights(self.weight_decay, mask=each(lambda decays: decays, False)),
        )
