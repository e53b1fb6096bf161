"""Beam search over a KV cache."""

import dataclasses
from typing import Literal

import flax.struct
import jax
import jax.numpy as jnp

from diffusion_lm.architectures.base import BoundModel, Hidden
from diffusion_lm.core.alignment import Shifted
from diffusion_lm.core.checks import check_choice, check_count, check_non_negative
from diffusion_lm.core.rng import StreamKeys
from diffusion_lm.core.special import SpecialTokens
from diffusion_lm.core.types import Batch, Decoded
from diffusion_lm.nn.cache import KVCache
from diffusion_lm.noise.contract import NO_NOISE, Contract
from diffusion_lm.samplers.autoregressive import AUTOREGRESSIVE_VISIBILITIES, left_to_right_trace
from diffusion_lm.samplers.candidates import repeat_rows, row_indices
from diffusion_lm.samplers.decoding import Decoding, Role
from diffusion_lm.samplers.incremental import CachedNetwork
from diffusion_lm.samplers.window import Window, cut_at_end, target_lengths, without_target

NEVER = -1e9
"""Log-probability of a hypothesis that does not exist; finite, so that penalties and comparisons stay numbers."""


class _State(flax.struct.PyTreeNode):
    count: jax.Array  # i32[], number of target tokens generated so far
    live: jax.Array  # i32[B,K,T], unfinished hypotheses
    live_log_prob: jax.Array  # f32[B,K]
    finished: jax.Array  # i32[B,K,T]
    finished_score: jax.Array  # f32[B,K], with length penalty
    done: jax.Array  # bool[B]
    calls: jax.Array  # i32[]
    cache: KVCache


@dataclasses.dataclass(frozen=True)
class BeamSearch:
    """Keeps the `beams` most probable hypotheses and returns the best finished one.

    A hypothesis finishes when its end is among the `beams` best continuations of a step, or when it fills the window. A
    prompt is done when `beams` hypotheses have finished or no live one can still win. Finished ones are ranked by
    log P / ((5 + length) / 6)^alpha (GNMT, arXiv 1609.08144, section 7), the length counting EOS.

    `Decoded.scores` is the winner's score, `Decoded.forward_passes` the prefill (one row per prompt) plus `beams` for
    every further call.

    Attributes:
      visibility: "causal" or "prefix", that of the training.
      beams: hypotheses per prompt; 1 is greedy decoding.
      length_penalty: alpha; 0 ranks by log P, 0.6 is GNMT's choice.
      forbidden: tokens that are never generated in addition to MASK, as in `decoding.Decoding`.
      keep_trace: return the winner token by token.
    """

    visibility: Literal["causal", "prefix"] = "causal"
    beams: int = 4
    length_penalty: float = 0.6
    forbidden: tuple[Role | int, ...] = ()
    keep_trace: bool = False

    def __post_init__(self):
        object.__setattr__(self, "forbidden", Decoding(forbidden=self.forbidden).forbidden)
        check_choice(self.visibility, AUTOREGRESSIVE_VISIBILITIES, "BeamSearch.visibility")
        check_count(self.beams, "BeamSearch.beams", "4 is usual in translation.")
        check_non_negative(self.length_penalty, "BeamSearch.length_penalty", "0.0 turns it off, 0.6 is GNMT's choice.")

    @property
    def contract(self) -> Contract:
        """Next tokens."""
        return Contract(NO_NOISE, self.visibility, Shifted())

    def without_early_end(self) -> "BeamSearch":
        """Returns the sampler that never ends a hypothesis before the window is full."""
        return dataclasses.replace(self, forbidden=Decoding(forbidden=self.forbidden).without_ends().forbidden)

    def generate(self, model: BoundModel, prompt: Batch, keys: StreamKeys) -> Decoded:
        """Fills the target windows; see `samplers.sampler.Sampler`. Beam search draws nothing: `keys` are unused."""
        del keys
        B, K = prompt.tokens.shape[0], self.beams
        window = Window.of(prompt)
        canvas = without_target(prompt)
        once = CachedNetwork(model, prompt, window, self.visibility)
        encoder = once.encode()
        hidden, cache = once.prefill(canvas, encoder)
        assert cache is not None

        to_beams = row_indices(B, K)
        network = CachedNetwork(
            model, repeat_rows(prompt.replace(encoder=None), K), repeat_rows(window, K), self.visibility
        )
        encoder = None if encoder is None else encoder.take_rows(to_beams)
        # All beams start from the same prompt, so only the first one counts at the beginning.
        beams = jnp.repeat(canvas[:, None], K, axis=1)
        state = _State(
            count=jnp.zeros((), jnp.int32),
            live=beams,
            live_log_prob=jnp.broadcast_to(jnp.where(jnp.arange(K) == 0, 0.0, NEVER), (B, K)),
            finished=beams,
            finished_score=jnp.full((B, K), NEVER, jnp.float32),
            done=window.sizes == 0,
            calls=jnp.ones((), jnp.int32),
            cache=cache.take_rows(to_beams),
        )
        state = self._extend(state, self._log_probs(model, repeat_rows(hidden, K), prompt), window, prompt.special)

        def step(state: _State) -> _State:
            newest = repeat_rows(window.starts + state.count - 1, K)
            hidden, cache = network.advance(
                state.live.reshape(B * K, -1), newest, ~repeat_rows(state.done, K), encoder, state.cache
            )
            state = state.replace(cache=cache, calls=state.calls + K)
            return self._extend(state, self._log_probs(model, hidden, prompt), window, prompt.special)

        state = jax.lax.while_loop(lambda state: ~jnp.all(state.done), step, state)
        best = jnp.argmax(state.finished_score, axis=1)
        winner = jnp.take_along_axis(state.finished, best[:, None, None], axis=1)[:, 0]
        score = jnp.take_along_axis(state.finished_score, best[:, None], axis=1)[:, 0]
        tokens = cut_at_end(winner, prompt.target_mask, prompt.special)
        return Decoded(
            tokens=tokens,
            lengths=target_lengths(tokens, prompt.target_mask, prompt.special),
            scores=jnp.where(window.sizes > 0, score, 0.0),
            forward_passes=jnp.broadcast_to(state.calls, (B,)),
            trace=left_to_right_trace(tokens, window, prompt.special.pad_id) if self.keep_trace else None,
        )

    def _penalty(self, length: jax.Array) -> jax.Array:
        return ((5.0 + length) / 6.0) ** self.length_penalty

    def _log_probs(self, model: BoundModel, hidden: Hidden, prompt: Batch) -> jax.Array:
        """Returns f32[B,K,V] from [B*K,1,D] states, without the forbidden ids."""
        logits = model.logits(hidden)[:, 0]
        forbidden = Decoding(forbidden=self.forbidden).never_drawn(prompt.special)
        if forbidden:
            logits = logits.at[:, jnp.asarray(forbidden)].set(NEVER)
        return jax.nn.log_softmax(logits, axis=-1).reshape(prompt.tokens.shape[0], self.beams, -1)

    def _extend(self, state: _State, log_probs_BKV: jax.Array, window: Window, special: SpecialTokens) -> _State:
        """Appends one token to every live hypothesis and splits the results into live and finished ones."""
        B, K, V = log_probs_BKV.shape
        # Each live hypothesis has E ends (every EOS, and PAD), so at least K of the (1 + E) K best do not end.
        most = (1 + len(special.end_ids)) * K
        # One ranking over all continuations of all live hypotheses of a prompt.
        totals = (state.live_log_prob[:, :, None] + log_probs_BKV).reshape(B, K * V)
        log_prob, index = jax.lax.top_k(totals, min(most, K * V))
        parent, token = index // V, index % V
        slots = jnp.where(state.done, state.live.shape[2], window.starts + state.count)
        grown = jnp.take_along_axis(state.live, parent[:, :, None], axis=1)
        grown = grown.at[jnp.arange(B)[:, None], jnp.arange(grown.shape[1]), slots[:, None]].set(token, mode="drop")

        count = state.count + 1
        full = (count >= window.sizes)[:, None]
        ended = special.is_end(token) | full
        # Only ends among the K best continuations finish, as in the definition of the search.
        counts = ended & (log_prob > NEVER / 2) & (jnp.arange(ended.shape[1]) < K)

        scores = jnp.where(counts, log_prob / self._penalty(count), NEVER)
        all_scores = jnp.concatenate([state.finished_score, scores], axis=1)
        all_finished = jnp.concatenate([state.finished, grown], axis=1)
        finished_score, kept = jax.lax.top_k(all_scores, K)
        finished = jnp.take_along_axis(all_finished, kept[:, :, None], axis=1)

        # Live hypotheses are compared without penalty: all have the same length.
        live_log_prob, alive = jax.lax.top_k(jnp.where(ended, NEVER, log_prob), K)
        live = jnp.take_along_axis(grown, alive[:, :, None], axis=1)
        parent = jnp.take_along_axis(parent, alive, axis=1)

        # The best score that a live hypothesis can still reach: no further loss of probability, the largest penalty.
        reachable = live_log_prob[:, 0] / self._penalty(window.sizes)
        decided = (reachable <= finished_score[:, 0]) | (finished_score[:, -1] > NEVER / 2)
        row = state.done[:, None]
        # The cache follows its hypothesis; rows that are done keep theirs.
        rows = (jnp.arange(B)[:, None] * K + jnp.where(row, jnp.arange(K), parent)).reshape(-1)
        return state.replace(
            count=count,
            live=jnp.where(row[:, :, None], state.live, live),
            live_log_prob=jnp.where(row, state.live_log_prob, live_log_prob),
            finished=jnp.where(row[:, :, None], state.finished, finished),
            finished_score=jnp.where(row, state.finished_score, finished_score),
            done=state.done | full[:, 0] | decided,
            cache=state.cache.take_rows(rows),
        )
