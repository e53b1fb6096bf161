"""Self-speculation: one network drafts a few tokens by diffusion and verifies them as an autoregressive model."""

import dataclasses
from typing import Literal

import flax.struct
import jax
import jax.numpy as jnp

from diffusion_lm.architectures.base import BoundModel, EncoderState, Hidden
from diffusion_lm.core.alignment import Alignment, SamePosition, Shifted
from diffusion_lm.core.checks import check_choice, check_count
from diffusion_lm.core.errors import require
from diffusion_lm.core.rng import StreamKeys
from diffusion_lm.core.types import Batch, Decoded, TokenStats, Trace
from diffusion_lm.nn.cache import KVCache
from diffusion_lm.nn.masks import Causal, Conditioning, Queries, Visibility
from diffusion_lm.noise.contract import NO_NOISE, Contract
from diffusion_lm.samplers.decoding import Decoding
from diffusion_lm.samplers.incremental import CachedNetwork
from diffusion_lm.samplers.window import Window, cut_at_end, target_lengths, without_target

DRAFTS = ("bidirectional", "causal")


class _State(flax.struct.PyTreeNode):
    canvas: jax.Array  # i32[B,T]
    count: jax.Array  # i32[B], target tokens generated so far; the newest one is not in the cache yet
    drafts: jax.Array  # i32[B,K-1], proposals for the tokens after the next one
    drafted: jax.Array  # bool[B], whether there are any
    done: jax.Array  # bool[B]
    scores: jax.Array  # f32[B]
    calls: jax.Array  # i32[]
    cache: KVCache
    trace: jax.Array | None  # i32[T,B,T]


@dataclasses.dataclass(frozen=True)
class SelfSpeculation:
    """Generates what `AutoregressiveSampler` generates under causal visibility, in fewer forward passes.

    For networks whose clean copy was trained to predict the next token (`BlockDiffusion.causal_clean` with
    `next_token`). A draft is accepted if it is the token that the autoregressive model generates at its position; the
    first one that is not is replaced by that token. At temperature 0 this is greedy decoding. Above 0, the
    autoregressive token is drawn with the key of `AutoregressiveSampler`, and drafts with the same keys, so that both
    are the same token as often as one uniform number per token allows. Every temperature gives the tokens of the
    autoregressive sampler, not only its law. (Accepting with min(1, p/q), as I-DLM does, has the same law and accepts
    at least as often.)

    Two passes per cycle (Nemotron-Labs-Diffusion, linear self-speculation): the first runs the newest token and `draft`
    MASK after it, the second runs the drafts causally. The newest token's state is causal in the first pass as well, so
    the first draft is exact and a cycle generates 2 to `draft` + 1 tokens, at least one per pass.

    One pass per cycle (`strided`; introspective strided decoding of I-DLM, arXiv 2604.11035): the newest token, the
    drafts of the pass before and `draft` MASK after them. It generates the accepted drafts and one more token. If all
    were accepted, the MASK slots have drafted what follows; otherwise the next pass verifies nothing. 1 to `draft`
    tokens per pass.

    The KV cache holds verified tokens: entries of MASK and rejected drafts are overwritten before any token can attend
    to them. `Decoded.scores` and the end of a target are those of `AutoregressiveSampler`; `forward_passes` counts the
    prefill and all passes until the longest row is done.

    Attributes:
      draft: number of MASK tokens of a draft, the block size of the training; the first one gives an exact token.
      drafts: what a MASK attends to in its draft: "bidirectional", all of it, or "causal", the tokens before it
        (`BlockDiffusion.causal_noisy`).
      alignment: which state of a draft predicts which token; verification always reads the state before a token.
      strided: one pass per cycle instead of two.
      decoding: temperature (0 is greedy), top-k, top-p and forbidden tokens.
      keep_trace: return the canvas after each cycle.
    """

    draft: int = 16
    drafts: Literal["bidirectional", "causal"] = "bidirectional"
    alignment: Alignment = SamePosition()
    strided: bool = False
    decoding: Decoding = Decoding()
    keep_trace: bool = False

    def __post_init__(self):
        check_choice(self.drafts, DRAFTS, "SelfSpeculation.drafts")
        # The first token of a draft is exact, so a draft of 1 drafts nothing.
        check_count(self.draft, "SelfSpeculation.draft", "Use the block size of the training, 2 or more.", minimum=2)

    @property
    def contract(self) -> Contract:
        """Next tokens: wrong drafts cost forward passes and never change the text."""
        return Contract(NO_NOISE, "causal", Shifted())

    def without_early_end(self) -> "SelfSpeculation":
        """Returns the sampler that never ends a target before the window is full."""
        return dataclasses.replace(self, decoding=self.decoding.without_ends())

    def generate(self, model: BoundModel, prompt: Batch, keys: StreamKeys) -> Decoded:
        """Fills the target windows; see `samplers.sampler.Sampler`."""
        require(
            not model.spec.time_conditioning,
            "time_conditioning=True: drafting and verifying in one pass is not defined for a time-conditioned network",
            where="TransformerSpec.time_conditioning",
            fix="Set it to False, or decode with MaskedSampler.",
        )
        window = Window.of(prompt)
        network = CachedNetwork(model, prompt, window, "causal")
        encoder = network.encode()
        canvas = without_target(prompt)
        B, T = canvas.shape
        hidden, cache = network.prefill(canvas, encoder)
        assert cache is not None
        state = _State(
            canvas=canvas,
            count=jnp.zeros(B, jnp.int32),
            drafts=jnp.zeros((B, self.draft - 1), jnp.int32),
            drafted=jnp.zeros(B, bool),
            done=window.sizes == 0,
            scores=jnp.zeros(B, jnp.float32),
            calls=jnp.ones((), jnp.int32),
            cache=cache,
            trace=jnp.broadcast_to(canvas, (T, B, T)) if self.keep_trace else None,
        )
        cycle = _Cycle(self, model, prompt, window, keys, encoder)
        # Every cycle starts from a newest token, and the prefill generates the first one.
        first = cycle.stats(hidden, jnp.zeros((B, 1), jnp.int32))
        state = cycle.written(state, first.sample, first.sample_log_prob, jnp.ones(B, jnp.int32))
        step = cycle.strided if self.strided else cycle.draft_and_verify
        state = jax.lax.while_loop(lambda state: ~jnp.all(state.done), step, state)
        tokens = cut_at_end(state.canvas, prompt.target_mask, prompt.special)
        return Decoded(
            tokens=tokens,
            lengths=target_lengths(tokens, prompt.target_mask, prompt.special),
            scores=state.scores,
            forward_passes=jnp.broadcast_to(state.calls, window.sizes.shape),
            trace=None if state.trace is None else Trace(state.trace),
        )


@dataclasses.dataclass(frozen=True, eq=False)
class _Cycle:
    """The two forms of a cycle. K is `draft`; token numbers count from the first target token."""

    settings: SelfSpeculation
    model: BoundModel
    prompt: Batch
    window: Window
    keys: StreamKeys
    encoder: EncoderState | None

    def draft_and_verify(self, state: _State) -> _State:
        """Returns the state after one pass over [newest, MASK x K] and one over the drafts."""
        K, B = self.settings.draft, state.count.shape[0]
        masks = jnp.full((B, K), self.prompt.special.mask, jnp.int32)
        hidden, cache = self._run(
            jnp.concatenate([self._newest(state), masks], axis=1), state.count - 1, state, jnp.zeros(B, jnp.int32)
        )
        # States: 0 is the newest token, 1..K are MASK. The exact token comes first, then the drafts after it.
        states = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.arange(K - 1) + self._first_draft])
        numbers = state.count[:, None] + jnp.arange(K)
        proposed = self.stats(_states(hidden, jnp.broadcast_to(states, (B, K))), numbers)
        state = state.replace(cache=cache)
        hidden, cache = self._run(proposed.sample, state.count, state, None)
        verified = self.stats(hidden, numbers + 1)
        # Token i + 1 of the draft is checked against the prediction after token i.
        accepted = _leading(proposed.sample[:, 1:] == verified.sample[:, :-1])
        state = state.replace(cache=cache, calls=state.calls + 2)
        return self.written(
            state,
            jnp.concatenate([proposed.sample[:, :1], verified.sample], axis=1),
            jnp.concatenate([proposed.sample_log_prob[:, :1], verified.sample_log_prob], axis=1),
            accepted + 2,
        )

    def strided(self, state: _State) -> _State:
        """Returns the state after one pass over [newest, K - 1 drafts where there are any, MASK x K]."""
        K, B = self.settings.draft, state.count.shape[0]
        drafts = jnp.where(state.drafted, K - 1, 0)
        places = jnp.arange(2 * K - 1)
        padded = jnp.pad(state.drafts, ((0, 0), (0, K)), constant_values=self.prompt.special.mask)
        # Rows without drafts run MASK there, so that all rows have the same shape.
        following = jnp.where(places < drafts[:, None], padded, self.prompt.special.mask)
        hidden, cache = self._run(
            jnp.concatenate([self._newest(state), following], axis=1), state.count - 1, state, drafts
        )
        # States 0..K-1 verify what follows the newest token; those of MASK begin at drafts + 1.
        states = drafts[:, None] + self._first_draft + jnp.arange(K - 1)
        numbers = state.count[:, None] + jnp.arange(K)
        further = state.count[:, None] + drafts[:, None] + 1 + jnp.arange(K - 1)
        stats = self.stats(
            _states(hidden, jnp.concatenate([jnp.broadcast_to(jnp.arange(K), (B, K)), states], axis=1)),
            jnp.concatenate([numbers, further], axis=1),
        )
        # Places after a row's drafts hold MASK and verify nothing.
        hits = (state.drafts == stats.sample[:, : K - 1]) & (jnp.arange(K - 1) < drafts[:, None])
        accepted = _leading(hits)
        state = state.replace(
            cache=cache, calls=state.calls + 1, drafts=stats.sample[:, K:], drafted=accepted == drafts
        )
        return self.written(state, stats.sample[:, :K], stats.sample_log_prob[:, :K], accepted + 1)

    def stats(self, hidden: Hidden, numbers: jax.Array) -> TokenStats:
        """Returns the tokens of number i32[B,Q] drawn from [B,Q,D] states; drafts and verified tokens share keys."""
        decoding, keys_BQ = self.settings.decoding, None
        if decoding.temperature > 0:
            row_ids = jnp.broadcast_to(self.prompt.row_ids[:, None], numbers.shape)
            keys_BQ = self.keys.per_token("sampler/token", row_ids, numbers)
        return self.model.token_stats(
            hidden,
            keys_BT=keys_BQ,
            temperature=decoding.temperature,
            top_k=decoding.top_k,
            top_p=decoding.top_p,
            forbidden=decoding.never_drawn(self.prompt.special),
        )

    def written(self, state: _State, tokens: jax.Array, log_probs: jax.Array, valid: jax.Array) -> _State:
        """Appends the first i32[B] `valid` of i32[B,Q] tokens to each row, up to its end."""
        window = self.window
        length = state.canvas.shape[1]
        places = jnp.arange(tokens.shape[1])[None]
        is_end = self.prompt.special.is_end(tokens)
        # Exclusive: the end itself is generated, what follows it is not.
        after_end = jnp.cumsum(is_end, axis=1) - is_end > 0
        fits = state.count[:, None] + places < window.sizes[:, None]
        stays = (places < valid[:, None]) & fits & ~after_end & ~state.done[:, None]
        # Tokens that are not generated go to slot T, which is dropped.
        slots = jnp.where(stays, (window.starts + state.count)[:, None] + places, length)
        canvas = state.canvas.at[jnp.arange(slots.shape[0])[:, None], slots].set(tokens, mode="drop")
        count = state.count + jnp.sum(stays, axis=1, dtype=jnp.int32)
        trace = state.trace
        if trace is not None:
            trace = jnp.where((jnp.arange(length) >= state.calls - 1)[:, None, None], canvas[None], trace)
        return state.replace(
            canvas=canvas,
            count=count,
            done=state.done | jnp.any(stays & is_end, axis=1) | (count >= window.sizes),
            scores=state.scores + jnp.sum(jnp.where(stays, log_probs, 0.0), axis=1),
            trace=trace,
        )

    @property
    def _first_draft(self) -> int:
        """The index, from the state before the first MASK on, of the state that predicts the second token after it.

        The first token is predicted exactly, by the state before it.
        """
        return 1 if self.settings.alignment == Shifted() else 2

    def _newest(self, state: _State) -> jax.Array:
        """Returns i32[B,1], each row's newest token."""
        slots = jnp.clip(self.window.starts + state.count - 1, 0, state.canvas.shape[1] - 1)
        return jnp.take_along_axis(state.canvas, slots[:, None], axis=1)

    def _run(
        self, tokens: jax.Array, number: jax.Array, state: _State, drafts: jax.Array | None
    ) -> tuple[Hidden, KVCache]:
        """Runs i32[B,Q] tokens, the first of which has the given number; returns hidden states and the cache.

        Args:
          tokens: i32[B,Q].
          number: i32[B].
          state: has the cache; rows that are done store nothing in it.
          drafts: i32[B], number of tokens between the first one and the MASK slots; None if there is no MASK.
        """
        length = state.canvas.shape[1]
        first = self.window.starts + number
        slots = first[:, None] + jnp.arange(tokens.shape[1])
        visibility: Visibility = Causal()
        if drafts is not None and self.settings.drafts == "bidirectional":
            place = jnp.arange(length)[None] - (first + drafts + 1)[:, None]
            draft = (place >= 0) & (place < self.settings.draft)
            visibility = visibility | (Queries(draft) & Conditioning(draft))
        hidden = self.model(
            tokens,
            visibility=visibility,
            positions=jnp.where(state.done[:, None], length, slots),
            segment_ids=self.prompt.segment_ids,
            encoder=self.encoder,
            cache=state.cache,
        )
        assert hidden.cache is not None
        return dataclasses.replace(hidden, cache=None), hidden.cache


def _states(hidden: Hidden, places: jax.Array) -> Hidden:
    """Returns the states at i32[B,Q'] of [B,Q,D]."""
    return dataclasses.replace(hidden, values_BTD=jnp.take_along_axis(hidden.values_BTD, places[:, :, None], axis=1))


def _leading(hits: jax.Array) -> jax.Array:
    """Returns i32[B], the number of True values before the first False of bool[B,Q]."""
    return jnp.sum(jnp.cumprod(hits.astype(jnp.int32), axis=1), axis=1)
