"""Low-rank adaptation (LoRA, arXiv 2106.09685) of any network: frozen matrices plus trained products of low rank.

x W  ->  x W + (alpha / rank) (x A) B,     A random, B = 0: a fresh adapter adds zero
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from diffusion_lm.architectures import stream
from diffusion_lm.architectures.base import Hidden
from diffusion_lm.architectures.extended import Extended
from diffusion_lm.core.axes import AxesTree
from diffusion_lm.core.checks import check_count
from diffusion_lm.core.errors import ConfigError, near_names, require
from diffusion_lm.core.types import EncoderInputs, Params
from diffusion_lm.nn.constrain import Constrain, no_constraint
from diffusion_lm.nn.inputs import EncoderState, ForwardInputs
from diffusion_lm.nn.layers import ADAPTERS

PART = "lora"
"""Name of the adapters among the parameters, next to those of the network."""

TARGETS = ("query", "key", "value", "output", "mlp")
"""The matrices of the blocks that can be adapted: those of self-attention, cross-attention and MLP."""

_MLP = ("up", "gate", "down")
_STACKS = (("blocks",), ("encoder", "blocks"))
_Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class WithLoRA(Extended):
    """A network whose own arrays are frozen, with adapters that are trained instead.

    The adapters are under `lora/` in a tree like that of the adapted matrices, stacked on `layers` like them. They are
    always float32, because small updates are lost in bfloat16. A checkpoint of the plain network transfers completely;
    one of the adapted network transfers to the plain one with its adapters merged (`training/transfer.py`). Training
    has gradients and optimizer state of the trained arrays only, with any optimizer (`frozen_arrays`).

    Attributes:
      rank: r, columns of A and rows of B.
      alpha: fresh adapters are scaled by alpha / rank. The scale is stored with the adapters, so a trained adapter does
        not change if this value changes later.
      targets: the adapted matrices, some of `TARGETS`.
      trained_too: paths of the network's own arrays that are trained too, e.g. ("embed",) or ("blocks/mlp_norm",).
    """

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = TARGETS
    trained_too: tuple[str, ...] = ()

    def __post_init__(self):
        for field in ("targets", "trained_too"):
            object.__setattr__(self, field, tuple(getattr(self, field)))
        check_count(self.rank, "WithLoRA.rank", "Use 8 or 16.")
        require(
            isinstance(self.alpha, int | float) and math.isfinite(self.alpha) and self.alpha > 0,
            f"alpha={self.alpha!r}: must be a positive number",
            where="WithLoRA.alpha",
            fix="Use the rank, or twice the rank.",
        )
        unknown = [target for target in self.targets if target not in TARGETS]
        require(
            bool(self.targets) and not unknown,
            f"targets={self.targets!r}: {'there is no such matrix' if unknown else 'no matrix is named'}"
            f"{near_names(unknown[0], TARGETS) if unknown else ''}",
            where="WithLoRA.targets",
            fix=f"Use some of {', '.join(TARGETS)}.",
        )
        require(
            not self.backbone.frozen_arrays(),
            "the backbone already has adapters",
            where="WithLoRA.backbone",
            fix="Use one WithLoRA with more targets, or start from the merged network.",
        )
        own = self._own_axes()
        parts = {name.split("/")[0] for name in own}
        for path in self.trained_too:
            require(
                any(_under(name, path) for name in own),
                f"trained_too={path!r}: the network has no such array{near_names(path, parts)}",
                where="WithLoRA.trained_too",
                fix="Use the path of an array or of a part, as listed by `diffusion-lm explain`.",
            )

    def init(self, key: jax.Array) -> Params:
        """Returns the network's fresh parameters and fresh adapters, which add zero."""
        own = stream.named_key(key, PART)
        # Shapes only: no array of the network is allocated for this.
        shapes = self.backbone.abstract_params()
        adapters: dict[str, Any] = {"scale": jnp.asarray(self.alpha / self.rank, jnp.float32)}
        for path, axes in self._adapted():
            shape, inputs = _at(shapes, path).shape, _inputs(axes)
            layers, reads, writes = shape[0], shape[1 : 1 + inputs], shape[1 + inputs :]
            # A has variance 1 / fan_in; B = 0 makes the product 0.
            a = jax.random.normal(stream.named_key(own, _name(path)), (layers, *reads, self.rank), jnp.float32)
            b = jnp.zeros((layers, self.rank, *writes), jnp.float32)
            _put(adapters, path, {"a": a * math.prod(reads) ** -0.5, "b": b})
        return {**self.backbone.init(key), PART: adapters}

    def logical_axes(self) -> AxesTree:
        """Returns the logical axes of the parameters; adapters have those of their matrix, the rank is not split."""
        adapters: dict[str, Any] = {"scale": ()}
        for path, axes in self._adapted():
            split = 1 + _inputs(axes)
            _put(adapters, path, {"a": (*axes[:split], None), "b": (axes[0], None, *axes[split:])})
        return {**self.backbone.logical_axes(), PART: adapters}

    def frozen_arrays(self) -> frozenset[str]:
        """Returns the paths of the arrays that are not trained, such as `blocks/attention/query`."""
        frozen = {name for name in self._own_axes() if not any(_under(name, path) for path in self.trained_too)}
        return frozenset(frozen | {f"{PART}/scale"})

    def hidden(self, params: Params, inputs: ForwardInputs) -> Hidden:
        """Runs the adapted network up to its final norm."""
        return self.backbone.hidden(adapted(params), inputs)

    def encode(
        self,
        params: Params,
        inputs: EncoderInputs,
        *,
        dropout_keys: jax.Array | None = None,
        constrain: Constrain = no_constraint,
        project: bool = True,
    ) -> EncoderState:
        """Encodes the source with the adapted encoder."""
        keys, params = dropout_keys, adapted(params)
        return self.backbone.encode(params, inputs, dropout_keys=keys, constrain=constrain, project=project)

    def merge(self, params: Params) -> Params:
        """Returns parameters of the backbone with the same logits; see `merge`."""
        return merge(params)

    def flops_per_token(self, context_length: int, encoder_length: int | None = None) -> float:
        """Returns the forward FLOPs per token of the network and its adapters."""
        # The work of an encoder is divided by the tokens of the main stream.
        shapes, ratio = self.abstract_params()[PART], (encoder_length or context_length) / context_length
        flops = self.backbone.flops_per_token(context_length, encoder_length)
        for path, _ in self._adapted():
            per_token = 2.0 * sum(leaf.size for leaf in jax.tree.leaves(_at(shapes, path)))
            flops += per_token * (ratio if path[0] == "encoder" else 1.0)
        return flops

    def saved_flops_per_token(self, context_length: int, encoder_length: int | None = None) -> float:
        """Returns the FLOPs per token that a backward pass saves because frozen matrices need no gradient."""
        frozen, head = self.frozen_arrays(), "embed" if self.spec.tied_embeddings else "head"
        ratio = (encoder_length or context_length) / context_length
        flops = stream.logit_flops(self.spec) if f"{head}/tokens" in frozen else 0.0
        for path, shape in _leaves(self.backbone.abstract_params()):
            if any(path[: len(stack)] == stack for stack in _STACKS) and len(shape.shape) > 2 and _name(path) in frozen:
                flops += 2.0 * shape.size * (ratio if path[0] == "encoder" else 1.0)
        return flops

    def _own_axes(self) -> dict[str, Any]:
        return {_name(path): axes for path, axes in _leaves(self.backbone.logical_axes())}

    def _adapted(self) -> list[tuple[_Path, tuple[str | None, ...]]]:
        """Returns path and logical axes of every adapted matrix."""
        names = {name for target in self.targets for name in (_MLP if target == "mlp" else (target,))}
        return [
            (path, axes)
            for path, axes in _leaves(self.backbone.logical_axes())
            if any(path[: len(stack)] == stack for stack in _STACKS) and path[-1] in names
        ]


def adapted(params: Params) -> Params:
    """Returns the network's own parameters with scaled adapters inside their stacks, where `nn.stack` applies them.

    Raises:
      ConfigError: there are no adapters, or an adapter is incomplete.
    """
    own, adapters = _apart(params)
    for stack in _STACKS:
        found = _find(adapters, stack)
        if found is not None:
            scaled: dict[str, Any] = {}
            for path, pair in _pairs(found):
                _put(scaled, path, {"a": pair["a"], "b": pair["b"] * adapters["scale"]})
            own = _with(own, (*stack, ADAPTERS), scaled)
    return own


def merge(params: Params) -> Params:
    """Returns the network's own parameters with every adapter added to its matrix, W + scale A B, in W's dtype.

    The result fits the plain network, whose logits are then those of the adapted one up to rounding.

    Raises:
      ConfigError: there are no adapters, an adapter is incomplete, or its matrix is missing.
    """
    own, adapters = _apart(params)
    for stack in _STACKS:
        for path, pair in _pairs(_find(adapters, stack) or {}):
            matrix = _find(own, (*stack, *path))
            if matrix is None:
                raise _broken(_name((*stack, *path)), "has no matrix in the network")
            added = jax.vmap(lambda a, b: jnp.tensordot(a, b, axes=1))(pair["a"], pair["b"] * adapters["scale"])
            own = _with(own, (*stack, *path), (matrix + added).astype(matrix.dtype))
    return own


def _apart(params: Params) -> tuple[Params, Any]:
    if PART not in params:
        raise _broken(PART, "is not among the parameters")
    if "scale" not in params[PART]:
        raise _broken(f"{PART}/scale", "is not among the parameters")
    return {part: tree for part, tree in params.items() if part != PART}, params[PART]


def _pairs(tree: Any, path: _Path = ()) -> Iterator[tuple[_Path, Any]]:
    """Yields path and arrays of every adapter; raises `ConfigError` for one without `a` or `b`."""
    for name, node in tree.items():
        here = (*path, name)
        if not isinstance(node, dict) or (set(node) & {"a", "b"} and set(node) != {"a", "b"}):
            raise _broken(_name(here), "does not have exactly the two arrays 'a' and 'b'")
        if "a" in node:
            yield here, node
        else:
            yield from _pairs(node, here)


def _broken(name: str, what: str) -> ConfigError:
    return ConfigError(
        f"the adapter {name} {what}",
        where="TrainRun.model",
        fix="Use the complete parameters of a run with WithLoRA, with their names unchanged.",
    )


def _inputs(axes: tuple[str | None, ...]) -> int:
    """Returns the number of input axes of a stacked matrix: two for [layers, heads, head_dim, embed], else one."""
    return 2 if axes[2] == "head_dim" else 1


def _name(path: _Path) -> str:
    return "/".join(path)


def _under(name: str, path: str) -> bool:
    return name == path or name.startswith(f"{path}/")


def _leaves(tree: Any, path: _Path = ()) -> Iterator[tuple[_Path, Any]]:
    for name, node in tree.items():
        if isinstance(node, dict):
            yield from _leaves(node, (*path, name))
        else:
            yield (*path, name), node


def _at(tree: Any, path: _Path) -> Any:
    for name in path:
        tree = tree[name]
    return tree


def _find(tree: Any, path: _Path) -> Any:
    for name in path:
        if not isinstance(tree, dict) or name not in tree:
            return None
        tree = tree[name]
    return tree


def _put(tree: dict[str, Any], path: _Path, value: Any) -> None:
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
    tree[path[-1]] = value


def _with(tree: Any, path: _Path, value: Any) -> Any:
    """Returns a copy of the nested dict with `value` at `path`."""
    if not path:
        return value
    return {**tree, path[0]: _with(tree.get(path[0], {}), path[1:], value)}
