"""Worlds so small that the law of a sampler can be enumerated: tables of conditionals, indexed by the whole canvas."""

import dataclasses
import functools
import itertools
import types
from typing import Any

import jax.numpy as jnp
import model_stubs as stubs
import numpy as np
import sampler_stubs
import scipy.stats

from diffusion_lm.architectures.base import BoundModel, Hidden
from diffusion_lm.core.rng import StreamKeys
from diffusion_lm.core.types import Batch
from diffusion_lm.nn.head import Head


@dataclasses.dataclass(frozen=True, eq=False)
class World:
    """W networks over windows of L tokens 0..V-1 and MASK = V; the token at slot 0 says which network a row asks.

    Attributes:
      logits: f32[W,(V+1)^L,L,V+1], of each slot given the whole canvas; the logit of MASK is high, to no avail.
    """

    logits: np.ndarray

    @classmethod
    def random(cls, V: int, L: int, seed: int, scale: float = 1.2) -> "World":
        logits = np.random.default_rng(seed).normal(scale=scale, size=(1, (V + 1) ** L, L, V + 1))
        logits[..., V] = 3.0
        return cls(logits.astype(np.float32))

    @classmethod
    def of_joints(cls, joints: np.ndarray) -> "World":
        """The exact conditionals of W joint laws f[W,V,...,V], each over L tokens."""
        (W, V), L = joints.shape[:2], joints.ndim - 1
        logits = np.full((W, (V + 1) ** L, L, V + 1), 3.0)
        for k, canvas in enumerate(itertools.product(range(V + 1), repeat=L)):
            for slot in range(L):
                known = tuple(slice(None) if c == V or i == slot else c for i, c in enumerate(canvas))
                kept = joints[(slice(None), *known)]
                axis = 1 + sum(1 for c in canvas[:slot] if c == V)
                others = tuple(a for a in range(1, kept.ndim) if a != axis)
                logits[:, k, slot, :V] = np.log(kept.sum(axis=others) + 1e-30)
        return cls(logits.astype(np.float32))

    @property
    def V(self) -> int:
        return self.logits.shape[3] - 1

    @property
    def L(self) -> int:
        return self.logits.shape[2]

    @functools.cached_property
    def canvases(self) -> np.ndarray:
        """i[K,L], the canvas of each code."""
        return np.array(list(itertools.product(range(self.V + 1), repeat=self.L)))

    @functools.cached_property
    def probs(self) -> np.ndarray:
        """f64[W,K,L,V]."""
        logits = self.logits[..., : self.V].astype(np.float64)
        exp = np.exp(logits - logits.max(axis=-1, keepdims=True))
        return exp / exp.sum(axis=-1, keepdims=True)

    def code(self, tokens: np.ndarray) -> np.ndarray:
        return (np.asarray(tokens) * (self.V + 1) ** np.arange(self.L)[::-1]).sum(axis=-1)

    @functools.cached_property
    def model(self) -> BoundModel:
        return BoundModel(_WorldArchitecture(self), {})

    @functools.cached_property
    def model_without_mask(self) -> BoundModel:
        """The same networks with a vocabulary of the V ordinary tokens."""
        return BoundModel(_WorldArchitecture(self, has_mask=False), {})


@dataclasses.dataclass(frozen=True, eq=False)
class _WorldArchitecture:
    world: World
    has_mask: bool = True

    @property
    def spec(self) -> Any:
        V = self.world.V + self.has_mask
        return types.SimpleNamespace(
            vocab_size=V, logits_chunk=1 << 22, self_conditioning=False, time_conditioning=False
        )

    def hidden(self, params, inputs):
        world, tokens = self.world, inputs.tokens
        place = (world.V + 1) ** jnp.arange(world.L)[::-1]
        code = jnp.sum(tokens[:, 1:] * place, axis=1)
        network = jnp.minimum(tokens[:, 0], world.logits.shape[0] - 1)
        values = jnp.asarray(world.logits)[network, code, :, : self.spec.vocab_size]
        return Hidden(jnp.pad(values, ((0, 0), (1, 0), (0, 0))), inputs.cache)

    def head(self, params):
        return Head(jnp.eye(self.spec.vocab_size), vocab_size=self.spec.vocab_size)


def prompts(world: World, rows: int, mask_id: int | None = -1) -> Batch:
    """Windows of L slots; row r asks network r mod W. `mask_id` is V if it is not given."""
    prompt = stubs.as_prompt(stubs.make_batch([1] * rows, [world.L] * rows, world.L + 1))
    prompt = sampler_stubs.without_ends(prompt, world.V if mask_id == -1 else mask_id)
    return prompt.replace(tokens=prompt.tokens.at[:, 0].set(jnp.arange(rows) % world.logits.shape[0]))


def decode(world: World, unmask: Any, rows: int, *, seed: int = 0, **fields) -> np.ndarray:
    """i[rows,L], what the masked sampler generated."""
    decoded = stubs.generate(
        sampler_stubs.masked(unmask, **fields), world.model, prompts(world, rows), StreamKeys.create(seed)
    )
    return np.asarray(decoded.tokens)[:, 1:]


def decode_canvas(world: World, update: Any, rows: int, *, seed: int = 0, **fields) -> np.ndarray:
    """i[rows,L], what the canvas sampler generated with uniform noise over the V ordinary tokens."""
    sampler = sampler_stubs.canvas(update, **fields)
    prompt = prompts(world, rows, mask_id=None)
    return np.asarray(stubs.generate(sampler, world.model_without_mask, prompt, StreamKeys.create(seed)).tokens)[:, 1:]


def histogram(world: World, tokens: np.ndarray) -> np.ndarray:
    return np.bincount(world.code(tokens), minlength=len(world.canvases))


def follows(counts: np.ndarray, law: np.ndarray, level: float = 1e-4) -> bool:
    """Chi-square test that `counts` are draws of `law`; cells expected fewer than five times are joined."""
    expected = law * counts.sum()
    assert counts[law < 1e-12].sum() == 0, "something impossible was drawn"
    rare = expected < 5
    observed = np.append(counts[~rare], counts[rare].sum())
    wanted = np.append(expected[~rare], expected[rare].sum())
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    statistic = ((observed - wanted) ** 2 / wanted).sum()
    return bool(statistic < scipy.stats.chi2.ppf(1 - level, max(len(wanted) - 1, 1)))


def all_masked(world: World) -> np.ndarray:
    """The law that starts from MASK everywhere."""
    return np.eye(len(world.canvases))[-1]


def coin_step(world: World, law: np.ndarray, reveal: float | np.ndarray, remask: float = 0.0) -> np.ndarray:
    """One step in which every slot goes its own way: MASK is revealed (token by token, if f[V]), tokens are masked."""
    V, after = world.V, np.zeros_like(law)
    for k in np.flatnonzero(law):
        joint = np.ones(())
        for slot, token in enumerate(world.canvases[k]):
            cell = np.zeros(V + 1)
            if token == V:
                cell[:V] = reveal * world.probs[0, k, slot]
                cell[V] = max(1 - cell[:V].sum(), 0.0)
            else:
                cell[token], cell[V] = 1 - remask, remask
            joint = np.multiply.outer(joint, cell)
        after += law[k] * joint.reshape(-1)
    return after


def draw_step(world: World, law: np.ndarray, move) -> np.ndarray:
    """One step that draws all slots and then decides: `move(canvas, draws, log_probs)` gives the next canvas.

    It may give several, as pairs (canvas, probability).
    """
    after = np.zeros_like(law)
    for k in np.flatnonzero(law):
        for draws in itertools.product(range(world.V), repeat=world.L):
            p = world.probs[0, k][np.arange(world.L), list(draws)]
            for canvas, share in move(world.canvases[k], np.array(draws), np.log(p)):
                after[world.code(canvas)] += law[k] * p.prod() * share
    return after


def one_at_random(world: World, law: np.ndarray) -> np.ndarray:
    """One step of first-hitting sampling."""

    def move(canvas, draws, log_p):
        masked = np.flatnonzero(canvas == world.V)
        for slot in masked:
            yield np.where(np.arange(world.L) == slot, draws, canvas), 1 / len(masked)
        if not len(masked):
            yield canvas, 1.0

    return draw_step(world, law, move)
