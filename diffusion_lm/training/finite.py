"""Networks whose parameters hold NaN or Inf: found before anything is computed, saved or published with them.

Such a network decodes to some text and its metrics are numbers, so nothing downstream would show it.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_lm.core.errors import ConfigError

_NAMED = 3


def require_finite(params: Any, what: str, *, where: str = "", fix: str = "") -> None:
    """Raises `ConfigError` where a tensor holds NaN or Inf: one sentence with the names of the first few.

    Args:
      params: tree of arrays. With several processes all of them must call this, and all of them raise.
      what: how the sentence begins, e.g. "the checkpoint of step 3 holds".
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


def not_finite(params: Any) -> tuple[str, ...]:
    """Returns the names of the arrays that hold NaN or Inf, `a/b/c`."""
    named = jax.tree_util.tree_leaves_with_path(params)
    leaves = [leaf for _, leaf in named]
    flags = on_host(leaves) if all(map(_is_on_host, leaves)) else np.asarray(on_devices(leaves)).tolist()
    return tuple(
        jax.tree_util.keystr(path, simple=True, separator="/")
        for (path, _), good in zip(named, flags, strict=True)
        if not good
    )


def on_host(leaves: Sequence[Any]) -> list[bool]:
    """Returns whether each array is finite; compiles nothing and copies nothing."""
    return [_extremes_are_finite(np.asarray(leaf)) for leaf in leaves]


@jax.jit
def on_devices(leaves: Sequence[jax.Array]) -> jax.Array:
    """Returns bool[len(leaves)]: whether each array is finite. Only this is moved to the host."""
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves])


def _is_on_host(leaf: Any) -> bool:
    if not isinstance(leaf, jax.Array):
        return True
    return leaf.is_fully_addressable and all(device.platform == "cpu" for device in leaf.devices())


def _extremes_are_finite(array: np.ndarray) -> bool:
    if array.size == 0 or not jnp.issubdtype(array.dtype, jnp.inexact):
        return True
    # `min` and `max` pass NaN on, and need no array of booleans as large as the weights.
    with np.errstate(invalid="ignore"):  # NaN is what is looked for
        return bool(np.isfinite(array.min()) and np.isfinite(array.max()))
