"""Checks for parameters with NaN or Inf, before anything is computed, saved or published with them.

Such a network still decodes to some text, and its metrics are numbers, so nothing downstream would show the error.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from diffusion_lm.core.errors import ConfigError
from diffusion_lm.core.types import Params

_NAMED = 3


def require_finite(params: Params | None, what: str, *, where: str = "", fix: str = "") -> None:
    """Raises `ConfigError` if a tensor has NaN or Inf; the message has the names of the first few.

    Args:
      params: tree of arrays. With several processes all of them must call this, and all of them raise.
      what: the beginning of the message, e.g. "the checkpoint of step 3 holds".
      where: as for `ConfigError`.
      fix: as for `ConfigError`.
    """
    found = not_finite(params)
    if not found:
        return
    more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    count = len(jax.tree.leaves(params))
    raise ConfigError(
        f"{what} NaN or Inf in {len(found)} of {count} tensors: {', '.join(found[:_NAMED])}{more}",
        where=where,
        fix=fix,
    )


def not_finite(params: Params | None) -> tuple[str, ...]:
    """Returns the paths `a/b/c` of the arrays with NaN or Inf."""
    named = jax.tree_util.tree_leaves_with_path(params)
    leaves = [leaf for _, leaf in named]
    # On CPUs the arrays are already in host memory; elsewhere only the flags are copied from the devices.
    flags = on_host(leaves) if all(map(_is_on_host, leaves)) else np.asarray(on_devices(leaves)).tolist()
    return tuple(
        jax.tree_util.keystr(path, simple=True, separator="/")
        for (path, _), good in zip(named, flags, strict=True)
        if not good
    )


def on_host(leaves: Sequence[ArrayLike]) -> list[bool]:
    """Returns whether each array is finite; compiles nothing and copies nothing."""
    return [_extremes_are_finite(np.asarray(leaf)) for leaf in leaves]


@jax.jit
def on_devices(leaves: Sequence[jax.Array]) -> jax.Array:
    """Returns bool[len(leaves)], whether each array is finite."""
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves])


def _is_on_host(leaf: object) -> bool:
    if not isinstance(leaf, jax.Array):
        return True
    return leaf.is_fully_addressable and all(device.platform == "cpu" for device in leaf.devices())


def _extremes_are_finite(array: np.ndarray) -> bool:
    if array.size == 0 or not jnp.issubdtype(array.dtype, jnp.inexact):
        return True
    # `min` and `max` propagate NaN, and need no array of booleans of the size of the weights.
    with np.errstate(invalid="ignore"):  # no warning: NaN is expected here
        return bool(np.isfinite(array.min()) and np.isfinite(array.max()))
