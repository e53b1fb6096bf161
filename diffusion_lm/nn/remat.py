"""Rematerialisation policies by name: which values of each block are stored for the backward pass."""

from collections.abc import Callable

import jax

POLICIES: dict[str, Callable | None] = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_saveable,
    "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
"""none: store everything. full: store only block inputs. dots: store matmul outputs. dots_no_batch: store the outputs
of weight matmuls but not the attention scores, whose size grows with the square of the length."""


def rematerialise(function: Callable, policy: str) -> Callable:
    """Returns the block with the named policy for its backward pass; "none" returns it unchanged."""
    if policy == "none":
        return function
    return jax.checkpoint(function, policy=POLICIES[policy], prevent_cse=False)
