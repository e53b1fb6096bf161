"""Where activations lie, as the layers see it: nothing of meshes, logical axes only."""

from collections.abc import Callable
from typing import Any, Protocol

import jax

Axes = tuple[str | None, ...]


class Constrain(Protocol):
    """Where activations lie; `parallel.shardings.Placement` on several devices."""

    def __call__(self, x: jax.Array, axes: Axes) -> jax.Array:
        """Pins an activation to the mesh by its logical axes."""

    def per_device(self, function: Callable[[Any, Any], Any], shared: Any, tokens: Any) -> Any:
        """Returns `function(shared, tokens)`, each device running it on its own part of the tokens."""

    def split(
        self, function: Callable[..., Any], arguments: tuple[Any, ...], axes: tuple[Axes, ...], out_axes: Axes
    ) -> Any:
        """Returns `function(*arguments)`, each device computing its own part: for kernels that XLA cannot divide.

        Args:
          function: needs nothing of the parts of other devices.
          arguments: arrays, or trees of them.
          axes: the logical axes of each argument; an array of fewer dimensions has the first of them.
          out_axes: those of the result, an array as large in them as the first argument.
        """

    def __hash__(self) -> int:
        """Equal placements hash equally: compiled programs are kept by them."""

    def rows(self, batch: Any) -> Any:
        """Returns a tree of [B,T,...] arrays of the host on the devices; every process gives all rows."""

    def whole(self, tree: Any) -> Any:
        """Inside of a compiled function, pins a result to be whole on every device, where the host can read it."""


class Unconstrained:
    """The `Constrain` of a single device."""

    def __call__(self, x: jax.Array, axes: Axes) -> jax.Array:
        """Returns `x`."""
        del axes
        return x

    def per_device(self, function: Callable[[Any, Any], Any], shared: Any, tokens: Any) -> Any:
        """Returns `function(shared, tokens)`."""
        return function(shared, tokens)

    def split(
        self, function: Callable[..., Any], arguments: tuple[Any, ...], axes: tuple[Axes, ...], out_axes: Axes
    ) -> Any:
        """Returns `function(*arguments)`."""
        del axes, out_axes
        return function(*arguments)

    def rows(self, batch: Any) -> Any:
        """Returns `batch`."""
        return batch

    def whole(self, tree: Any) -> Any:
        """Returns `tree`."""
        return tree


no_constraint = Unconstrained()
