"""Worlds so small that every mask and every order can be written down: a table of logits for each canvas.

Tokens are 0..V-1, MASK is V, and the target of length L stands behind one conditioning token. The references are
numpy in float64 and know nothing of the library.
"""

import dataclasses
import functools
import itertools
import math
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_lm.architectures.base import BoundModel, Hidden
from diffusion_lm.core.rng import StreamKeys
from diffusion_lm.core.special import SpecialTokens
from diffusion_lm.core.types import Batch
from diffusion_lm.nn.head import Head
from diffusion_lm.noise.choice import Choice, ExactCount
from diffusion_lm.noise.process import Absorbing, Corrupted

KEYS = StreamKeys.create(0, 1)


@dataclasses.dataclass(frozen=True, eq=False)
class CanvasArchitecture:
    """Slot i of a canvas has the logits `params["table"][code of the canvas, i]`: any model at all of that size."""

    base: int

    @property
    def spec(self) -> Any:
        return types.SimpleNamespace(
            vocab_size=self.base, logits_chunk=1 << 20, self_conditioning=False, time_conditioning=False
        )

    def hidden(self, params, inputs):
        tokens = inputs.tokens
        digits = self.base ** jnp.arange(tokens.shape[1] - 1)
        return Hidden(params["table"][jnp.sum(tokens[:, 1:] * digits, axis=1)], inputs.cache)

    def head(self, params):
        return Head(jnp.eye(self.base), vocab_size=self.base)


@dataclasses.dataclass(frozen=True)
class Patterns(Absorbing):
    """A process that masks exactly the given tokens, to go through all masks one by one."""

    choice: Choice = ExactCount()
    rows: tuple[tuple[bool, ...], ...] = ()

    def corrupt(self, keys, batch, t_BT, *, vocab_size):
        replaced = jnp.asarray(self.rows) & batch.target_mask
        return Corrupted(jnp.where(replaced, batch.special.mask, batch.tokens), replaced)


@dataclasses.dataclass(frozen=True)
class GivenTimes:
    """The times that stand in `Batch.strata`."""

    steps: int | None = None

    def draw(self, keys, example_ids, *, strata=None):
        return strata


@dataclasses.dataclass(frozen=True)
class World:
    """A random model of L tokens out of V.

    Attributes:
      V: tokens without MASK.
      L: target tokens.
      shifted: whether slot i - 1 speaks about token i.
      seed: of the table.
    """

    V: int = 3
    L: int = 3
    shifted: bool = False
    seed: int = 0

    @property
    def mask_id(self) -> int:
        return self.V

    @functools.cached_property
    def table(self) -> np.ndarray:
        canvases = (self.V + 1) ** self.L
        return np.random.default_rng(self.seed).normal(size=(canvases, self.L + 1, self.V + 1)).astype(np.float32) * 1.5

    @property
    def model(self) -> BoundModel:
        return BoundModel(CanvasArchitecture(self.V + 1), {"table": jnp.asarray(self.table)})

    @property
    def masks(self) -> np.ndarray:
        """bool[2^L,L], every mask."""
        return np.array(list(itertools.product((False, True), repeat=self.L)))

    @property
    def targets(self) -> list[tuple[int, ...]]:
        """Every target."""
        return list(itertools.product(range(self.V), repeat=self.L))

    def batch(self, targets, *, weights=None, times=None, ids=None) -> Batch:
        """One target a row; `weights` and `times` are one number a row."""
        targets = np.asarray(targets)
        rows, T = len(targets), self.L + 1
        slots = np.broadcast_to(np.arange(T), (rows, T))
        scale = np.ones(rows) if weights is None else np.asarray(weights)
        return Batch(
            tokens=jnp.asarray(np.concatenate([np.zeros((rows, 1)), targets], axis=1), jnp.int32),
            target_mask=jnp.asarray(slots > 0),
            loss_weights=jnp.asarray((slots > 0) * scale[:, None], jnp.float32),
            segment_ids=jnp.ones((rows, T), jnp.int32),
            positions=jnp.asarray(slots, jnp.int32),
            example_ids=jnp.asarray(
                np.broadcast_to((np.arange(rows) if ids is None else np.asarray(ids))[:, None], (rows, T)), jnp.uint32
            ),
            special=SpecialTokens(self.V + 1, mask_id=self.mask_id),
            strata=None if times is None else jnp.asarray(np.broadcast_to(np.asarray(times)[:, None], (rows, T))),
        )

    # The references.

    def log_p(self, target, mask) -> np.ndarray:
        """f64[L], log-probability of each token given the canvas in which `mask` is hidden; MASK has none."""
        canvas = np.where(mask, self.mask_id, target)
        logits = self.table[np.sum(canvas * (self.V + 1) ** np.arange(self.L))].astype(np.float64)[:, : self.V]
        rows = logits[: self.L] if self.shifted else logits[1:]
        normal = rows - np.log(np.exp(rows).sum(axis=-1, keepdims=True))
        return normal[np.arange(self.L), np.asarray(target)]

    def masked_ce(self, target) -> np.ndarray:
        """f64[2^L], the summed cross-entropy of the masked tokens, mask by mask."""
        return np.array([-self.log_p(target, mask)[mask].sum() for mask in self.masks])

    def order_nlls(self, target) -> np.ndarray:
        """f64[L!], -log p of the target when it is written in each of the orders."""
        values = []
        for order in itertools.permutations(range(self.L)):
            hidden, total = np.ones(self.L, bool), 0.0
            for i in order:
                total -= self.log_p(target, hidden)[i]
                hidden[i] = False
            values.append(total)
        return np.array(values)

    def nelbo(self, target) -> float:
        """The mean over orders."""
        return float(self.order_nlls(target).mean())

    def nll(self, target) -> float:
        """-log p of the model that draws its order first."""
        nlls = self.order_nlls(target)
        return float(-np.log(np.exp(-nlls).mean()))

    def mask_probabilities(self, rate: float) -> np.ndarray:
        """f64[2^L], of each mask when tokens are hidden independently."""
        hidden = self.masks.sum(axis=1)
        return rate**hidden * (1 - rate) ** (self.L - hidden)


def gauss_legendre(points: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights on (0, 1), exact for polynomials up to degree 2 points - 1."""
    x, w = np.polynomial.legendre.leggauss(points)
    return 0.5 * (x + 1), 0.5 * w


def expected_loss(world: World, target, objective, schedule, nodes=None, *, steps=None) -> float:
    """The mean of `objective.loss` over all masks and over t, summed exactly: every mask at every node is a row."""
    t, w = gauss_legendre() if nodes is None else nodes
    rates = [float(1 - schedule.alpha(jnp.float32(one))) for one in t]
    probabilities = np.concatenate([w_one * world.mask_probabilities(r) for w_one, r in zip(w, rates, strict=True)])
    rows = len(world.masks)
    batch = world.batch([target] * (rows * len(t)), weights=probabilities, times=np.repeat(t, rows).astype(np.float32))
    patterns = np.tile(np.pad(world.masks, ((0, 0), (1, 0))), (len(t), 1))
    enumerated = dataclasses.replace(
        objective,
        process=Patterns(schedule, rows=tuple(map(tuple, patterns.tolist()))),
        time=GivenTimes(steps),
    )
    terms = jax.jit(lambda batch: enumerated.loss(world.model, batch, KEYS))(batch)
    assert math.isclose(float(terms.weight), world.L * probabilities.sum(), rel_tol=1e-4)
    return float(terms.loss_sum)
