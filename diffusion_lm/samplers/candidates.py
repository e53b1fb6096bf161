"""Several candidates per prompt, decoded as rows of one batch, and the choice among them."""

from typing import TypeVar

import jax
import jax.numpy as jnp

from diffusion_lm.core.rng import StreamKeys
from diffusion_lm.core.types import Batch
from diffusion_lm.noise.process import NoiseProcess, prior

Rows = TypeVar("Rows")
"""A pytree of [B,...] arrays."""


def repeat_rows(values: Rows, candidates: int) -> Rows:
    """Repeats each row of a pytree of [B,...] arrays: row b becomes rows b*C .. b*C + C-1."""
    return jax.tree.map(lambda x: jnp.repeat(x, candidates, axis=0), values)


def row_indices(rows: int, candidates: int) -> jax.Array:
    """Returns i32[B*C], the prompt of each candidate row; for `take_rows` of caches and encoder states."""
    return jnp.repeat(jnp.arange(rows), candidates)


def candidate_keys(keys: StreamKeys, stream: str, prompt: Batch, candidates: int) -> jax.Array:
    """Returns key[B*C,T], one per token, keyed by example, position and candidate; fold the step in to draw."""
    token_keys = keys.per_token(stream, prompt.example_ids, prompt.positions)
    fold = jax.vmap(jax.vmap(jax.random.fold_in, in_axes=(0, None)), in_axes=(None, 0))
    by_candidate = fold(token_keys.reshape(-1), jnp.arange(candidates))
    return _rows_first(by_candidate.reshape(candidates, *token_keys.shape))


def start_canvases(
    process: NoiseProcess, keys: StreamKeys, prompt: Batch, candidates: int, *, vocab_size: int
) -> jax.Array:
    """Returns i32[B*C,T]: draws of z_1 in the target window, independent for each candidate."""

    def one(candidate: jax.Array) -> jax.Array:
        own = keys.replace(root=jax.random.fold_in(keys.root, candidate))
        return prior(process, own, prompt, vocab_size=vocab_size)

    return _rows_first(jax.vmap(one)(jnp.arange(candidates)))


def best_candidate(scores: jax.Array, rows: int) -> jax.Array:
    """Returns i32[B], for each prompt the row of [B*C] with the highest score; the first of equal ones."""
    scores_BC = scores.reshape(rows, -1)
    return jnp.arange(rows) * scores_BC.shape[1] + jnp.argmax(scores_BC, axis=1)


def _rows_first(values_CBT: jax.Array) -> jax.Array:
    C, B, T = values_CBT.shape
    return jnp.swapaxes(values_CBT, 0, 1).reshape(B * C, T)
