"""Low-rank adaptation (LoRA, arXiv 2106.09685) of any network: frozen matrices with a trained product of two thin ones.

x W  ->  x W + (alpha / rank) (x A) B,     A random, B = 0: a fresh adapter changes nothing
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from diffusion_lm.architectures import parts
from diffusion_lm.architectures.base import Hidden
from diffusion_lm.architectures.extended import Extended, frozen_arrays
from diffusion_lm.core.axes import AxesTree
from diffusion_lm.core.errors import ConfigError, near_names, require
from diffusion_lm.core.types import EncoderInputs, Params
from diffusion_lm.nn.inputs import EncoderState, ForwardInputs
from diffusion_lm.nn.layers import ADAPTERS

PART = "lora"
"""The adapters' place among the parameters; what stands beside it are the network's own."""

TARGETS = ("query", "key", "value", "output", "mlp")
"""Which matrices of the blocks can be adapted: those of every attention (the cross-attention's too) and the MLP's."""

_MLP = ("up", "gate", "down")
_STACKS = (("blocks",), ("encoder", "blocks"))
_Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class WithLoRA(Extended):
    """A network whose own arrays are frozen, with adapters that are trained in their place.

    The adapters stand under `lora/` in a tree like that of the adapted matrices, stacked on `layers` like them and
    float32 whatever the network's dtype is, since small updates are lost in bfloat16. A checkpoint of the plain network
    transfers whole, and one of the adapted network to the plain one with its adapters merged (`training/transfer.py`).
    Training keeps gradients and optimizer state of what is trained only, under any optimizer (`frozen_arrays`).

    Attributes:
      rank: r, columns of A and rows of B.
      alpha: fresh adapters are scaled by alpha / rank. The scale is stored with them and goes where they go, so an
        adapter computes what it was trained to compute whatever stands here later.
      targets: which matrices: some of `TARGETS`.
      trained_too: paths of the network's own arrays that are trained along, e.g. ("embed",) or ("blocks/mlp_norm",).
    """

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = TARGETS
    trained_too: tuple[str, ...] = ()

    def __post_init__(self):
        for field in ("targets", "trained_too"):
            object.__setattr__(self, field, tuple(getattr(self, field)))
        require(
            isinstance(self.rank, int) and not isinstance(self.rank, bool) and self.rank > 0,
            f"rank = {self.rank!r} is not a positive whole number",
            where="WithLoRA.rank",
            fix="Give 8 or 16.",
        )
        require(
            isinstance(self.alpha, int | float) and math.isfinite(self.alpha) and self.alpha > 0,
            f"alpha = {self.alpha!r} is not a positive number",
            where="WithLoRA.alpha",
            fix="Give once or twice the rank.",
        )
        unknown = [target for target in self.targets if target not in TARGETS]
        require(
            bool(self.targets) and not unknown,
            f"targets = {self.targets!r} names {'an unknown matrix' if unknown else 'no matrix'}"
            f"{near_names(unknown[0], TARGETS) if unknown else ''}",
            where="WithLoRA.targets",
            fix=f"Name some of {', '.join(TARGETS)}.",
        )
        require(
            not frozen_arrays(self.backbone),
            "the network is adapted already",
            where="WithLoRA.backbone",
            fix="Name more targets in one WithLoRA, or start from the merged network.",
        )
        own = self._own_axes()
        for path in self.trained_too:
            require(
                any(_under(name, path) for name in own),
                f"the network has no array {path!r}{near_names(path, {name.split('/')[0] for name in own})}",
                where="WithLoRA.trained_too",
                fix="Give the path of an array or of a part, as `explain` lists them.",
            )

    def init(self, key: jax.Array) -> Params:
        """Returns the network's fresh parameters and fresh adapters, which change nothing."""
        own = parts.named_key(key, PART)
        shapes = self.backbone.abstract_params()
        adapters: dict[str, Any] = {"scale": jnp.asarray(self.alpha / self.rank, jnp.float32)}
        for path, axes in self._adapted():
            shape, inputs = _at(shapes, path).shape, _inputs(axes)
            layers, reads, writes = shape[0], shape[1 : 1 + inputs], shape[1 + inputs :]
            a = jax.random.normal(parts.named_key(own, _name(path)), (layers, *reads, self.rank), jnp.float32)
            b = jnp.zeros((layers, self.rank, *writes), jnp.float32)
            _put(adapters, path, {"a": a * math.prod(reads) ** -0.5, "b": b})
        return {**self.backbone.init(key), PART: adapters}

    def logical_axes(self) -> AxesTree:
        """Returns the logical axes of the parameters: an adapter has those of the matrix, and its rank is whole."""
        adapters: dict[str, Any] = {"scale": ()}
        for path, axes in self._adapted():
            split = 1 + _inputs(axes)
            _put(adapters, path, {"a": (*axes[:split], None), "b": (axes[0], None, *axes[split:])})
        return {**self.backbone.logical_axes(), PART: adapters}

    def frozen_arrays(self) -> frozenset[str]:
        """Returns the paths of the arrays that are not trained, such as `blocks/attention/query`."""
        kept = {name for name in self._own_axes() if not any(_under(name, path) for path in self.trained_too)}
        return frozenset(kept | {f"{PART}/scale"})

    def hidden(self, params: Params, inputs: ForwardInputs) -> Hidden:
        """Runs the adapted network up to its final norm."""
        return self.backbone.hidden(adapted(params), inputs)

    def encode(self, params: Params, inputs: EncoderInputs, **options: Any) -> EncoderState:
        """Encodes the source with the adapted encoder."""
        return self.backbone.encode(adapted(params), inputs, **options)

    def merge(self, params: Params) -> Params:
        """Returns parameters of the backbone with equal logits; see `merge`."""
        return merge(params)

    def flops_per_token(self, context_length: int, **lengths: Any) -> float:
        """Returns the network's forward FLOPs per token and those of its adapters; an encoder's are shared out."""
        shapes, ratio = self.abstract_params()[PART], (lengths.get("encoder_length") or context_length) / context_length
        flops = self.backbone.flops_per_token(context_length, **lengths)
        for path, _ in self._adapted():
            per_token = 2.0 * sum(leaf.size for leaf in jax.tree.leaves(_at(shapes, path)))
            flops += per_token * (ratio if path[0] == "encoder" else 1.0)
        return flops

    def saved_flops_per_token(self, context_length: int, **lengths: Any) -> float:
        """Returns the FLOPs per token that a backward pass saves: frozen matrices need no gradient of their own."""
        frozen, head = self.frozen_arrays(), "embed" if self.spec.tied_embeddings else "head"
        ratio = (lengths.get("encoder_length") or context_length) / context_length
        flops = parts.logit_flops(self.spec) if f"{head}/tokens" in frozen else 0.0
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
      ConfigError: there are no adapters, or an adapter is not whole.
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

    The result is what the plain network takes: its logits are those of the adapted one, up to rounding.

    Raises:
      ConfigError: there are no adapters, an adapter is not whole, or its matrix is missing.
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
            raise _broken(_name(here), "is no adapter of two arrays 'a' and 'b'")
        if "a" in node:
            yield here, node
        else:
            yield from _pairs(node, here)


def _broken(name: str, what: str) -> ConfigError:
    return ConfigError(
        f"the adapter {name} {what}",
        where="TrainRun.model",
        fix="Use the parameters that a run with WithLoRA wrote, whole and under their names.",
    )


def _inputs(axes: tuple[str | None, ...]) -> int:
    """Returns how many axes a stacked matrix reads: [layers, heads, head_dim, embed] reads two, all others one."""
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
