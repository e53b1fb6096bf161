"""Self-speculation: one network drafts a few tokens by diffusion and verifies them as an autoregressive model."""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from diffusion_lm.core.alignment import SamePosition, Shifted
from diffusion_lm.core.errors import require
from diffusion_lm.core.rng import StreamKeys
from diffusion_lm.core.types import Batch, Decoded, TokenStats, Trace
from diffusion_lm.nn.masks import Causal, Conditioning, Queries, Visibility
from diffusion_lm.noise.contract import NO_NOISE, Contract
from diffusion_lm.samplers.base import Model, Window, check_choice, check_draw, cut_at_end, emptied, target_lengths
from diffusion_lm.samplers.incremental import LeftToRight

DRAFTS = ("bidirectional", "causal")


class _State(flax.struct.PyTreeNode):
    canvas: jax.Array  # i32[B,T]
    count: jax.Array  # i32[B], target tokens written so far; the newest one is not in the cache yet
    drafts: jax.Array  # i32[B,K-1], proposals for the tokens behind the next one
    drafted: jax.Array  # bool[B], whether there are any
    done: jax.Array  # bool[B]
    scores: jax.Array  # f32[B]
    calls: jax.Array  # i32[]
    cache: Any
    trace: Any  # i32[T,B,T] or None


@dataclasses.dataclass(frozen=True)
class SelfSpeculation:
    """Generates what `AutoregressiveSampler` generates under causal visibility, in fewer forward passes.

    For networks whose clean copy was trained to predict the next token (`BlockDiffusion.causal_clean` with an
    `autoregressive_weight`). A draft is accepted as long as it is the token that the autoregressive model writes at
    that place; the first one that is not is replaced by it. At temperature 0 that is greedy decoding. Above, the
    autoregressive token is drawn with the key of `AutoregressiveSampler`, and drafts with the same keys, so that both
    fall on the same token as often as their distributions allow it by one uniform number: every temperature gives the
    tokens, not only the law, of the autoregressive sampler. (Accepting with min(1, p/q), as I-DLM does, has the same
    law and accepts at least as often.)

    Two passes a cycle (Nemotron-Labs-Diffusion, linear self-speculation): the first runs the newest token and `draft`
    MASK behind it, the second runs the drafts causally. The newest token's state is causal in the first pass as well,
    so the first draft is exact and a cycle writes 2 to `draft` + 1 tokens: never fewer passes' worth than one a pass.

    One pass a cycle (`strided`; introspective strided decoding of I-DLM, arXiv 2604.11035): the newest token, the
    drafts of the pass before and `draft` MASK behind them. It writes the accepted drafts and one token more; if all
    were accepted the MASK have drafted what follows, else the next pass verifies nothing. 1 to `draft` tokens a pass.

    The key/value cache holds what is verified: whatever a pass wrote for MASK and rejected drafts is overwritten
    before anything sees it. `Decoded.scores` and the end of a target are those of `AutoregressiveSampler`;
    `forward_passes` counts the prefill and all passes until the longest row is done.

    Attributes:
      mask_id: id of MASK; it is never emitted.
      draft: MASK tokens of a draft, the block size of the training; the first of them stands for an exact token.
      drafts: what MASK sees of its draft: "bidirectional", all of it, or "causal", what stands before
        (`BlockDiffusion.causal_noisy`).
      alignment: which state of a draft predicts which token; verification always reads the state before a token.
      strided: one pass a cycle instead of two.
      temperature: 0 is greedy.
      top_k: draw among the k most likely tokens; 0 = all.
      top_p: draw from the smallest set of most likely tokens whose mass reaches p.
      eos_id: ends a target.
      pad_id: ends a target too.
      forbidden: further ids that are never emitted.
      keep_trace: return the canvas after each cycle.
    """

    mask_id: int
    draft: int = 16
    drafts: str = "bidirectional"
    alignment: Any = SamePosition()
    strided: bool = False
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    eos_id: int = 1
    pad_id: int = 0
    forbidden: tuple[int, ...] = ()
    keep_trace: bool = False

    def __post_init__(self):
        object.__setattr__(self, "forbidden", tuple(self.forbidden))
        check_choice(self.drafts, DRAFTS, "SelfSpeculation.drafts")
        check_draw(self.temperature, self.top_k, self.top_p, "SelfSpeculation")
        require(
            isinstance(self.draft, int) and self.draft >= 2,
            f"draft = {self.draft} drafts nothing, since the first token is exact",
            where="SelfSpeculation.draft",
            fix="Give the block size of the training, 2 or more.",
        )

    @property
    def contract(self) -> Contract:
        """Next tokens: drafts cost passes where they are wrong and never change the text."""
        return Contract(NO_NOISE, "causal", Shifted())

    def generate(self, model: Model, prompt: Batch, keys: StreamKeys) -> Decoded:
        """Fills the target windows; see `samplers.base.Sampler`."""
        require(
            not model.spec.time_conditioning,
            "a network that reads the time cannot draft and verify in one pass: the same MASK has no time of its own",
            where="TransformerSpec.time_conditioning",
            fix="Set it to False, or decode with DenoisingSampler.",
        )
        window = Window.of(prompt)
        network = LeftToRight(model, prompt, window, "causal")
        encoder = network.encode()
        canvas = emptied(prompt, self.pad_id)
        B, T = canvas.shape
        hidden, cache = network.prefill(canvas, encoder)
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
        first = cycle.stats(hidden, jnp.zeros((B, 1), jnp.int32))
        state = cycle.written(state, first.sample, first.sample_log_prob, jnp.ones(B, jnp.int32))
        step = cycle.strided if self.strided else cycle.draft_and_verify
        state = jax.lax.while_loop(lambda state: ~jnp.all(state.done), step, state)
        tokens = cut_at_end(state.canvas, prompt.target_mask, self.eos_id, self.pad_id)
        return Decoded(
            tokens=tokens,
            lengths=target_lengths(tokens, prompt.target_mask, self.eos_id, self.pad_id),
            scores=state.scores,
            forward_passes=jnp.broadcast_to(state.calls, window.sizes.shape),
            trace=Trace(state.trace) if self.keep_trace else None,
        )


@dataclasses.dataclass(frozen=True, eq=False)
class _Cycle:
    """The two forms of a cycle. K is `draft`; token numbers count from the first target token."""

    settings: SelfSpeculation
    model: Model
    prompt: Batch
    window: Window
    keys: StreamKeys
    encoder: Any

    def draft_and_verify(self, state: _State) -> _State:
        """Returns the state after one pass over [newest, MASK x K] and one over the drafts."""
        K, B = self.settings.draft, state.count.shape[0]
        masks = jnp.full((B, K), self.settings.mask_id, jnp.int32)
        hidden, cache = self._run(
            jnp.concatenate([self._newest(state), masks], axis=1), state.count - 1, state, jnp.zeros(B, jnp.int32)
        )
        # States: 0 is the newest token, 1..K are MASK. The exact token comes first, then the drafts behind it.
        states = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.arange(K - 1) + self._first_draft])
        numbers = state.count[:, None] + jnp.arange(K)
        proposed = self.stats(_states(hidden, jnp.broadcast_to(states, (B, K))), numbers)
        state = state.replace(cache=cache)
        hidden, cache = self._run(proposed.sample, state.count, state, None)
        verified = self.stats(hidden, numbers + 1)
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
        padded = jnp.pad(state.drafts, ((0, 0), (0, K)), constant_values=self.settings.mask_id)
        behind = jnp.where(places < drafts[:, None], padded, self.settings.mask_id)
        hidden, cache = self._run(
            jnp.concatenate([self._newest(state), behind], axis=1), state.count - 1, state, drafts
        )
        # States 0..K-1 verify what follows the newest token; those of MASK begin at drafts + 1.
        states = drafts[:, None] + self._first_draft + jnp.arange(K - 1)
        numbers = state.count[:, None] + jnp.arange(K)
        further = state.count[:, None] + drafts[:, None] + 1 + jnp.arange(K - 1)
        stats = self.stats(
            _states(hidden, jnp.concatenate([jnp.broadcast_to(jnp.arange(K), (B, K)), states], axis=1)),
            jnp.concatenate([numbers, further], axis=1),
        )
        hits = (state.drafts == stats.sample[:, : K - 1]) & (jnp.arange(K - 1) < drafts[:, None])
        accepted = _leading(hits)
        state = state.replace(
            cache=cache, calls=state.calls + 1, drafts=stats.sample[:, K:], drafted=accepted == drafts
        )
        return self.written(state, stats.sample[:, :K], stats.sample_log_prob[:, :K], accepted + 1)

    def stats(self, hidden: Any, numbers: jax.Array) -> TokenStats:
        """Returns the tokens of number i32[B,Q] drawn from [B,Q,D] states; drafts and verified tokens share keys."""
        settings, keys_BQ = self.settings, None
        if settings.temperature > 0:
            row_ids = jnp.broadcast_to(self.prompt.row_ids[:, None], numbers.shape)
            keys_BQ = self.keys.per_token("sampler/token", row_ids, numbers)
        return self.model.token_stats(
            hidden,
            keys_BT=keys_BQ,
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
            forbidden=tuple(dict.fromkeys((*settings.forbidden, settings.mask_id))),
        )

    def written(self, state: _State, tokens: jax.Array, log_probs: jax.Array, valid: jax.Array) -> _State:
        """Writes the first i32[B] `valid` of i32[B,Q] tokens of each row, up to its end."""
        settings, window = self.settings, self.window
        length = state.canvas.shape[1]
        places = jnp.arange(tokens.shape[1])[None]
        is_end = (tokens == settings.eos_id) | (tokens == settings.pad_id)
        after_end = jnp.cumsum(is_end, axis=1) - is_end > 0
        fits = state.count[:, None] + places < window.sizes[:, None]
        kept = (places < valid[:, None]) & fits & ~after_end & ~state.done[:, None]
        slots = jnp.where(kept, (window.starts + state.count)[:, None] + places, length)
        canvas = state.canvas.at[jnp.arange(slots.shape[0])[:, None], slots].set(tokens, mode="drop")
        count = state.count + jnp.sum(kept, axis=1, dtype=jnp.int32)
        trace = state.trace
        if trace is not None:
            trace = jnp.where((jnp.arange(length) >= state.calls - 1)[:, None, None], canvas[None], trace)
        return state.replace(
            canvas=canvas,
            count=count,
            done=state.done | jnp.any(kept & is_end, axis=1) | (count >= window.sizes),
            scores=state.scores + jnp.sum(jnp.where(kept, log_probs, 0.0), axis=1),
            trace=trace,
        )

    @property
    def _first_draft(self) -> int:
        """Number of the state, counted from the one before the first MASK, that predicts the second token from there.

        The first token is predicted exactly, by the state before it.
        """
        return 1 if self.settings.alignment == Shifted() else 2

    def _newest(self, state: _State) -> jax.Array:
        """Returns i32[B,1], each row's newest token."""
        slots = jnp.clip(self.window.starts + state.count - 1, 0, state.canvas.shape[1] - 1)
        return jnp.take_along_axis(state.canvas, slots[:, None], axis=1)

    def _run(self, tokens: jax.Array, number: jax.Array, state: _State, drafts: jax.Array | None) -> tuple[Any, Any]:
        """Runs i32[B,Q] tokens, the first of which has the given number; returns hidden states and the cache.

        Args:
          tokens: i32[B,Q].
          number: i32[B].
          state: gives the cache; rows that are done write nothing into it.
          drafts: i32[B], tokens between the first one and the MASK that see each other; None where there is no MASK.
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
        return hidden.replace(cache=None), hidden.cache


def _states(hidden: Any, places: jax.Array) -> Any:
    """Picks the states at i32[B,Q'] of [B,Q,D]."""
    return hidden.replace(values_BTD=jnp.take_along_axis(hidden.values_BTD, places[:, :, None], axis=1))


def _leading(hits: jax.Array) -> jax.Array:
    """Returns i32[B], how many of the first bool[B,Q] are True in a row."""
    return jnp.sum(jnp.cumprod(hits.astype(jnp.int32), axis=1), axis=1)
