"""Worlds of a few tokens in which every canvas can be enumerated, and networks that are tables over whole canvases."""

import dataclasses
import itertools
import types
from typing import Any

import jax.numpy as jnp
import numpy as np

from diffusion_lm.architectures.base import BoundModel, Hidden
from diffusion_lm.core.special import SpecialTokens
from diffusion_lm.core.types import Batch
from diffusion_lm.nn.head import Head


@dataclasses.dataclass(frozen=True, eq=False)
class CanvasArchitecture:
    """A network that sees everything: the logits of each slot are a table over the target's whole contents.

    Attributes:
      table: f32[V^L,L,V]; canvases are numbered with their first token as the highest digit.
    """

    table: np.ndarray

    @property
    def spec(self) -> Any:
        return types.SimpleNamespace(
            vocab_size=self.table.shape[-1], logits_chunk=4096, self_conditioning=False, time_conditioning=False
        )

    def hidden(self, params, inputs):
        V, L = self.table.shape[-1], self.table.shape[1]
        digits = V ** np.arange(L - 1, -1, -1)
        rows = jnp.asarray(self.table, jnp.float32)[inputs.tokens[:, 1:] @ digits]
        return Hidden(jnp.concatenate([jnp.zeros_like(rows[:, :1]), rows], axis=1))

    def head(self, params):
        return Head(jnp.eye(self.table.shape[-1]), vocab_size=self.table.shape[-1])


def canvas_model(vocab_size, length, seed=0, scale=1.0) -> BoundModel:
    table = scale * np.random.default_rng(seed).normal(size=(vocab_size**length, length, vocab_size))
    return BoundModel(CanvasArchitecture(table.astype(np.float32)), {})


def canvases(vocab_size, length) -> np.ndarray:
    """i32[V^L,L], all of them in the order of the table."""
    return np.array(list(itertools.product(range(vocab_size), repeat=length)), np.int32)


def batch_of(targets, special: SpecialTokens = SpecialTokens(64, mask_id=3)) -> Batch:
    """Rows [BOS, target], everything scored; MASK is token 3 unless `special` says otherwise."""
    targets = np.asarray(targets)
    rows, length = targets.shape
    slots = np.broadcast_to(np.arange(length + 1), (rows, length + 1))
    return Batch(
        tokens=jnp.asarray(np.concatenate([np.zeros((rows, 1)), targets], axis=1), jnp.int32),
        target_mask=jnp.asarray(slots > 0),
        loss_weights=jnp.asarray(slots > 0, jnp.float32),
        segment_ids=jnp.ones((rows, length + 1), jnp.int32),
        positions=jnp.asarray(slots, jnp.int32),
        example_ids=jnp.asarray(np.broadcast_to(np.arange(rows)[:, None], slots.shape), jnp.uint32),
        special=special,
    )


def log_softmax(logits, forbidden=()) -> np.ndarray:
    """In float64, with forbidden ids at a probability of 0."""
    logits = np.array(logits, np.float64)
    logits[..., list(forbidden)] = -np.inf
    logits = logits - logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
