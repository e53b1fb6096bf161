"""Rematerialisation policies by name: what the backward pass keeps of each block and what it computes again."""

from collections.abc import Callable

import jax

POLICIES: dict[str, Callable | None] = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_saveable,
    "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
"""none: keep everything. full: keep only block inputs. dots: keep matmul outputs. dots_no_batch: keep the outputs of
weight matmuls but not the attention scores, whose size grows with the square of the length."""


def rematerialise(function: Callable, policy: str) -> Callable:
    """Wraps a block so that its backward pass follows the policy of that name; "none" returns it as it is."""
    if policy == "none":
        return function
    return jax.checkpoint(function, policy=POLICIES[policy], prevent_cse=False)
