"""Greedy decoding and sampling from left to right over a key/value cache."""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from diffusion_lm.core.alignment import Shifted
from diffusion_lm.core.rng import StreamKeys
from diffusion_lm.core.types import Batch, Decoded, Trace
from diffusion_lm.noise.contract import NO_NOISE, Contract
from diffusion_lm.samplers.base import (
    Model,
    Window,
    check_choice,
    check_draw,
    cut_at_end,
    emptied,
    target_lengths,
)
from diffusion_lm.samplers.incremental import LeftToRight

AUTOREGRESSIVE_VISIBILITIES = ("causal", "prefix")


class _State(flax.struct.PyTreeNode):
    canvas: jax.Array  # i32[B,T]
    count: jax.Array  # i32[], target tokens written so far
    done: jax.Array  # bool[B]
    scores: jax.Array  # f32[B]
    calls: jax.Array  # i32[]
    cache: Any


@dataclasses.dataclass(frozen=True)
class AutoregressiveSampler:
    """Generates one token a step until EOS, PAD or the end of the window; stops when all rows have.

    The token is drawn from the softmax of the logits after, in this order, temperature, top-k and top-p
    (`nn.sampling.filter_logits`). Draws are keyed by row id and token number.

    `Decoded.scores` is the summed log-probability of the generated tokens, EOS included, under the unfiltered model at
    temperature 1. `Decoded.forward_passes` counts the prefill and one pass for every further token of the longest row
    (the encoder's single pass is not counted).

    Attributes:
      visibility: "causal" or "prefix"; the one that the model was trained under.
      temperature: 0 is greedy.
      top_k: draw among the k most likely tokens; 0 = all.
      top_p: draw from the smallest set of most likely tokens whose mass reaches p.
      eos_id: ends a target.
      pad_id: ends a target too (models that learned length by a PAD-filled window emit it).
      forbidden: ids that are never emitted, MASK for one.
      keep_trace: return the canvas after each forward pass.
      use_cache: False runs the whole canvas for each token: the same tokens at a higher price.
    """

    visibility: str = "causal"
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    eos_id: int = 1
    pad_id: int = 0
    forbidden: tuple[int, ...] = ()
    keep_trace: bool = False
    use_cache: bool = True

    def __post_init__(self):
        object.__setattr__(self, "forbidden", tuple(self.forbidden))
        check_choice(self.visibility, AUTOREGRESSIVE_VISIBILITIES, "AutoregressiveSampler.visibility")
        check_draw(self.temperature, self.top_k, self.top_p, "AutoregressiveSampler")

    @property
    def contract(self) -> Contract:
        """Next tokens."""
        return Contract(NO_NOISE, self.visibility, Shifted())

    def generate(self, model: Model, prompt: Batch, keys: StreamKeys) -> Decoded:
        """Fills the target windows; see `samplers.base.Sampler`."""
        window = Window.of(prompt)
        network = LeftToRight(model, prompt, window, self.visibility, self.use_cache)
        encoder = network.encode()
        canvas = emptied(prompt, self.pad_id)
        hidden, cache = network.prefill(canvas, encoder)
        state = _State(
            canvas=canvas,
            count=jnp.zeros((), jnp.int32),
            done=window.sizes == 0,
            scores=jnp.zeros(canvas.shape[0], jnp.float32),
            calls=jnp.ones((), jnp.int32),
            cache=cache,
        )
        state = self._append(model, prompt, window, keys, state, hidden)

        def step(state: _State) -> _State:
            newest = window.starts + state.count - 1
            hidden, cache = network.advance(state.canvas, newest, ~state.done, encoder, state.cache)
            state = state.replace(cache=cache, calls=state.calls + 1)
            return self._append(model, prompt, window, keys, state, hidden)

        state = jax.lax.while_loop(lambda state: ~jnp.all(state.done), step, state)
        tokens = cut_at_end(state.canvas, prompt.target_mask, self.eos_id, self.pad_id)
        return Decoded(
            tokens=tokens,
            lengths=target_lengths(tokens, prompt.target_mask, self.eos_id, self.pad_id),
            scores=state.scores,
            forward_passes=jnp.broadcast_to(state.calls, window.sizes.shape),
            trace=left_to_right_trace(tokens, window, self.pad_id) if self.keep_trace else None,
        )

    def _append(
        self, model: Model, prompt: Batch, window: Window, keys: StreamKeys, state: _State, hidden: Any
    ) -> _State:
        """Draws the next token of each row from [B,1,D] states and writes it."""
        row_ids = prompt.row_ids[:, None]
        token_keys = None
        if self.temperature > 0:
            token_keys = keys.per_token("sampler/token", row_ids, jnp.broadcast_to(state.count, row_ids.shape))
        stats = model.token_stats(
            hidden,
            keys_BT=token_keys,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            forbidden=self.forbidden,
        )
        token = jnp.where(state.done, self.pad_id, stats.sample[:, 0])
        slots = jnp.where(state.done, state.canvas.shape[1], window.starts + state.count)
        count = state.count + 1
        return state.replace(
            canvas=state.canvas.at[jnp.arange(slots.shape[0]), slots].set(token, mode="drop"),
            count=count,
            done=state.done | (token == self.eos_id) | (token == self.pad_id) | (count >= window.sizes),
            scores=state.scores + jnp.where(state.done, 0.0, stats.sample_log_prob[:, 0]),
        )


def left_to_right_trace(tokens: jax.Array, window: Window, pad_id: int) -> Trace:
    """Returns the trace of a left-to-right decode: after pass i, i + 1 tokens of the final i32[B,T] stand.

    T - 1 steps, the longest window there can be. It costs nothing inside the loop: no token changes once written.
    """
    length = tokens.shape[1]
    slots, passes = jnp.arange(length), jnp.arange(max(length - 1, 1))
    unwritten = slots[None, None, :] > (window.starts[None, :] + passes[:, None])[:, :, None]
    in_window = slots[None, :] < (window.starts + window.sizes)[:, None]
    return Trace(tokens=jnp.where(unwritten & in_window[None], pad_id, tokens[None]))
