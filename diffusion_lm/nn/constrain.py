"""The sharding of activations as layers see it: logical axes only, no meshes."""

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import jax

from diffusion_lm.core.axes import Axes

Shared = TypeVar("Shared")
Tokens = TypeVar("Tokens")
Tree = TypeVar("Tree")
Result = TypeVar("Result")


class Constrain(Protocol):
    """The placement of activations; `parallel.shardings.Placement` on several devices."""

    def __call__(self, x: jax.Array, axes: Axes) -> jax.Array:
        """Pins an activation to the mesh by its logical axes."""

    def per_device(self, function: Callable[[Shared, Tokens], Result], shared: Shared, tokens: Tokens) -> Result:
        """Returns `function(shared, tokens)`, each device running it on its own part of the tokens."""

    def split(
        self, function: Callable[..., Result], arguments: tuple[Any, ...], axes: tuple[Axes, ...], out_axes: Axes
    ) -> Result:
        """Returns `function(*arguments)`, each device computing its own part: for kernels that XLA cannot divide.

        Args:
          function: must not need the parts of other devices.
          arguments: arrays, or trees of them.
          axes: the logical axes of each argument; an array with fewer dimensions has the first of them.
          out_axes: the logical axes of the result, which has the size of the first argument along them.
        """

    def __hash__(self) -> int:
        """Equal placements have equal hashes: they are keys of the caches of compiled programs."""

    def rows(self, batch: Tree) -> Tree:
        """Returns a tree of host arrays [B,T,...] on the devices; every process passes all rows."""

    def whole(self, tree: Tree) -> Tree:
        """Inside a compiled function, replicates a result on every device, so that the host can read it."""


class Unconstrained:
    """The `Constrain` of a single device."""

    def __call__(self, x: jax.Array, axes: Axes) -> jax.Array:
        """Returns `x`."""
        del axes
        return x

    def per_device(self, function: Callable[[Shared, Tokens], Result], shared: Shared, tokens: Tokens) -> Result:
        """Returns `function(shared, tokens)`."""
        return function(shared, tokens)

    def split(
        self, function: Callable[..., Result], arguments: tuple[Any, ...], axes: tuple[Axes, ...], out_axes: Axes
    ) -> Result:
        """Returns `function(*arguments)`."""
        del axes, out_axes
        return function(*arguments)

    def rows(self, batch: Tree) -> Tree:
        """Returns `batch`."""
        return batch

    def whole(self, tree: Tree) -> Tree:
        """Returns `tree`."""
        return tree


no_constraint = Unconstrained()
