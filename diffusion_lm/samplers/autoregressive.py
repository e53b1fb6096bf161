"""Greedy decoding and sampling from left to right over a KV cache."""

import dataclasses
from typing import Literal

import flax.struct
import jax
import jax.numpy as jnp

from diffusion_lm.architectures.base import BoundModel, Hidden
from diffusion_lm.core.alignment import Shifted
from diffusion_lm.core.checks import check_choice
from diffusion_lm.core.rng import StreamKeys
from diffusion_lm.core.types import Batch, Decoded, Trace
from diffusion_lm.nn.cache import KVCache
from diffusion_lm.noise.contract import NO_NOISE, Contract
from diffusion_lm.samplers.decoding import Decoding
from diffusion_lm.samplers.incremental import CachedNetwork
from diffusion_lm.samplers.window import Window, cut_at_end, target_lengths, without_target

AUTOREGRESSIVE_VISIBILITIES = ("causal", "prefix")


class _State(flax.struct.PyTreeNode):
    canvas: jax.Array  # i32[B,T]
    count: jax.Array  # i32[], number of target tokens generated so far
    done: jax.Array  # bool[B]
    scores: jax.Array  # f32[B]
    calls: jax.Array  # i32[]
    cache: KVCache | None


@dataclasses.dataclass(frozen=True)
class AutoregressiveSampler:
    """Generates one token per step, in each row until EOS, PAD or the end of the window.

    Draws are keyed by row id and token number.

    `Decoded.scores` is the summed log-probability of the generated tokens, EOS included, under the unfiltered model at
    temperature 1. `Decoded.forward_passes` counts the prefill and one pass for every further token of the longest row
    (the encoder's single pass is not counted).

    Attributes:
      visibility: "causal" or "prefix", that of the training.
      decoding: temperature (0 is greedy), top-k, top-p and forbidden tokens.
      keep_trace: return the canvas after each forward pass.
      use_cache: False runs the whole canvas for each token: the same tokens at a higher cost.
    """

    visibility: Literal["causal", "prefix"] = "causal"
    decoding: Decoding = Decoding()
    keep_trace: bool = False
    use_cache: bool = True

    def __post_init__(self):
        check_choice(self.visibility, AUTOREGRESSIVE_VISIBILITIES, "AutoregressiveSampler.visibility")

    @property
    def contract(self) -> Contract:
        """Next tokens."""
        return Contract(NO_NOISE, self.visibility, Shifted())

    def without_early_end(self) -> "AutoregressiveSampler":
        """Returns the sampler that never ends a target before the window is full."""
        return dataclasses.replace(self, decoding=self.decoding.without_ends())

    def generate(self, model: BoundModel, prompt: Batch, keys: StreamKeys) -> Decoded:
        """Fills the target windows; see `samplers.sampler.Sampler`."""
        window = Window.of(prompt)
        network = CachedNetwork(model, prompt, window, self.visibility, self.use_cache)
        encoder = network.encode()
        canvas = without_target(prompt)
        hidden, cache = network.prefill(canvas, encoder)
        state = _State(
            canvas=canvas,
            count=jnp.zeros((), jnp.int32),
            done=window.sizes == 0,
            scores=jnp.zeros(canvas.shape[0], jnp.float32),
            calls=jnp.ones((), jnp.int32),
            cache=cache,
        )
        # The prefill predicts the first token, so the loop starts at the second.
        state = self._append(model, prompt, window, keys, state, hidden)

        def step(state: _State) -> _State:
            newest = window.starts + state.count - 1
            hidden, cache = network.advance(state.canvas, newest, ~state.done, encoder, state.cache)
            state = state.replace(cache=cache, calls=state.calls + 1)
            return self._append(model, prompt, window, keys, state, hidden)

        state = jax.lax.while_loop(lambda state: ~jnp.all(state.done), step, state)
        tokens = cut_at_end(state.canvas, prompt.target_mask, prompt.special)
        return Decoded(
            tokens=tokens,
            lengths=target_lengths(tokens, prompt.target_mask, prompt.special),
            scores=state.scores,
            forward_passes=jnp.broadcast_to(state.calls, window.sizes.shape),
            trace=left_to_right_trace(tokens, window, prompt.special.pad_id) if self.keep_trace else None,
        )

    def _append(
        self, model: BoundModel, prompt: Batch, window: Window, keys: StreamKeys, state: _State, hidden: Hidden
    ) -> _State:
        """Draws the next token of each row from [B,1,D] states and appends it."""
        special = prompt.special
        row_ids = prompt.row_ids[:, None]
        token_keys = None
        if self.decoding.temperature > 0:
            # Keyed by token number and not by slot: the draw does not depend on the length of the prompt.
            token_keys = keys.per_token("sampler/token", row_ids, jnp.broadcast_to(state.count, row_ids.shape))
        stats = model.token_stats(
            hidden,
            keys_BT=token_keys,
            temperature=self.decoding.temperature,
            top_k=self.decoding.top_k,
            top_p=self.decoding.top_p,
            forbidden=self.decoding.never_drawn(special),
        )
        token = jnp.where(state.done, special.pad_id, stats.sample[:, 0])
        # Rows that are done write to slot T, which mode="drop" ignores.
        slots = jnp.where(state.done, state.canvas.shape[1], window.starts + state.count)
        count = state.count + 1
        return state.replace(
            canvas=state.canvas.at[jnp.arange(slots.shape[0]), slots].set(token, mode="drop"),
            count=count,
            done=state.done | special.is_end(token) | (count >= window.sizes),
            # EOS is part of the generated sequence and of its probability.
            scores=state.scores + jnp.where(state.done, 0.0, stats.sample_log_prob[:, 0]),
        )


def left_to_right_trace(tokens: jax.Array, window: Window, pad_id: int) -> Trace:
    """Returns the trace of a left-to-right decode: after pass i, the first i + 1 tokens of the final i32[B,T].

    It has T - 1 steps, for the longest possible window. It costs nothing in the loop, because tokens never change.
    """
    length = tokens.shape[1]
    slots, passes = jnp.arange(length), jnp.arange(max(length - 1, 1))
    later = slots[None, None, :] > (window.starts[None, :] + passes[:, None])[:, :, None]
    in_window = slots[None, :] < (window.starts + window.sizes)[:, None]
    return Trace(tokens=jnp.where(later & in_window[None], pad_id, tokens[None]))
