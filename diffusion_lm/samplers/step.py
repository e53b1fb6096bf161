"""One step of `DenoisingSampler`: network, commit rule, and where each row goes next."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from diffusion_lm.architectures.exponents import token_exponents
from diffusion_lm.core.real_tokens import filler
from diffusion_lm.core.rng import fold_in_each
from diffusion_lm.core.types import TokenStats
from diffusion_lm.nn.named_masks import named_blocks, noise_share
from diffusion_lm.samplers.base import ended_before
from diffusion_lm.samplers.blockwise import Blocks
from diffusion_lm.samplers.caching import Feed
from diffusion_lm.samplers.proposals import Proposal
from diffusion_lm.samplers.stopping import ended, settled
from diffusion_lm.samplers.view import Decision, View


@flax.struct.dataclass
class State:
    """What the loop carries, for R = B*C rows of candidates.

    Attributes:
      canvas: i32[R,T].
      block: i32[R], the current block; past the last one when the row is done.
      clock: i32[R], steps done in the block.
      log_prob: f32[R,T], log-probability of each token when it was written.
      scores: f32[R], of the last input under the last logits; 0 where the noise has a MASK.
      turn: i32[R], steps done in all, those without a network call included; it numbers the row's draws.
      calls: i32[], network calls made.
      prediction: [R,T,P,D], the mean embeddings that the last call predicts, or None where none are fed back.
      kept: `samplers.caching.Kept`, or None without a cache.
      trace: i32[steps,R,T] or None.
    """

    canvas: jax.Array
    block: jax.Array
    clock: jax.Array
    log_prob: jax.Array
    scores: jax.Array
    turn: jax.Array
    calls: jax.Array
    prediction: Any
    kept: Any
    trace: Any


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """The body of the loop.

    Attributes:
      settings: the `DenoisingSampler`.
      proposal: the network.
      blocks: the rows' blocks.
      seeds: bool[R,T], slots that are drawn before the rest of their block, or None.
      token_keys: key[R,T] of the draws, or None at temperature 0.
      rule_keys: key[R,T] of the commit rule.
      noise: call number -> i32[R,T], fresh noise for what is erased in that call.
    """

    settings: Any
    proposal: Proposal
    blocks: Blocks
    seeds: jax.Array | None
    token_keys: jax.Array | None
    rule_keys: jax.Array
    noise: Callable[[jax.Array], jax.Array]

    def __call__(self, state: State) -> State:
        """Returns the state after one network call."""
        mask_id = self.settings.mask_id
        if self._knows_bounds and state.prediction is None and state.trace is None:
            state = self._past_idle_steps(state)
        moves, view = self._moves(state), self._view(state)
        view = view.replace(active=view.active & moves, open=view.open & moves)
        token_keys = None if self.token_keys is None else _numbered(self.token_keys, state.turn)
        view, decision, kept = self._decide(view, token_keys, state)
        draws = view.stats.sample
        if mask_id is None and decision.erase is not None:
            # The last canvas is the argmax, not the last draws beside the last noise (trap T49).
            draws = jnp.where(view.is_last, view.stats.argmax, draws)
        canvas = jnp.where(decision.write, draws, state.canvas)
        if decision.erase is not None:
            noise = self.noise(state.calls) if mask_id is None else mask_id
            canvas = jnp.where(decision.erase, noise, canvas)
        return self._moved(state, view, canvas, decision.write, moves, kept)

    @property
    def _decides_first(self) -> bool:
        """Whether the slots of a step are known before its logits are."""
        return self.settings.commit.blind and self._knows_bounds

    @property
    def _knows_bounds(self) -> bool:
        """Whether nothing but the commit rule decides about slots: what it says before the logits are known holds."""
        settings = self.settings
        reads_step = settings.stop is not None and not settings.stop.looks_at_text
        return settings.mask_id is not None and settings.end != "defer" and not reads_step

    def _view(self, state: State) -> View:
        active = self.blocks.active(state.block)
        view = View(
            canvas=state.canvas,
            active=active,
            open=self._noise_in(active, state.canvas),
            clock=state.clock,
            steps=self.blocks.steps_in(state.block),
            log_prob=state.log_prob,
            keys=_numbered(self.rule_keys, state.turn),
            noise_size=getattr(self.settings.start, "vocab_size", None) or self.proposal.model.spec.vocab_size,
            exponents=token_exponents(self.proposal.model),
        )
        return view if self.seeds is None else _only(view, self.seeds)

    def _moves(self, state: State) -> jax.Array:
        """Returns bool[R,1], the rows that take this step: all, or, with a cache, those of the lowest block at hand.

        Rows that wait for the others enter a block together with them, so that the batch reads its rows as a whole once
        a block and not whenever one of them gets there. A row's draws are numbered by its own steps: waiting changes
        none of them.
        """
        if self.settings.cache is None:
            return jnp.ones((1, 1), bool)
        lowest = jnp.min(jnp.where(state.block < self.blocks.counts, state.block, jnp.iinfo(jnp.int32).max))
        return (state.block <= lowest)[:, None]

    def _noise_in(self, active: jax.Array, canvas: jax.Array) -> jax.Array:
        """Returns bool[R,T], the active slots that may be written: all of them where the noise has no MASK."""
        return active if self.settings.mask_id is None else active & (canvas == self.settings.mask_id)

    def _past_idle_steps(self, state: State) -> State:
        """Takes each row past the steps in which it writes and erases nothing: they need no network call.

        MDLM's released decoder saves calls by keeping the last logits while no row of the batch has changed. Here the
        slots of a step, or at least those among which they are, are drawn before the network runs, so each row goes
        straight to its next step that may change it; every step has draws of its own, hence the result is that of the
        decode with all calls (trap T42).
        """
        commit = self.settings.commit
        known = commit.decide if commit.blind else commit.at_most
        if known(self._view(state)) is None:
            return state

        def idle(state: State) -> jax.Array:
            view = self._view(state)
            decision = self._filled(view, known(view))
            changed = decision.write if decision.erase is None else decision.write | decision.erase
            return (state.block < self.blocks.counts) & ~view.is_last[:, 0] & ~jnp.any(changed, axis=1)

        def skip(carry: tuple[State, jax.Array]) -> tuple[State, jax.Array]:
            state, rows = carry
            state = state.replace(clock=state.clock + rows, turn=state.turn + rows)  # type: ignore[attr-defined]
            return state, idle(state)

        return jax.lax.while_loop(lambda carry: jnp.any(carry[1]), skip, (state, idle(state)))[0]

    def _filled(self, view: View, decision: Decision) -> Decision:
        """In the last step nothing stays noise. (Plain redrawing of ordinary tokens leaves none behind.)"""
        if self.settings.mask_id is None and decision.erase is None:
            return decision
        erase = None if decision.erase is None else decision.erase & ~view.is_last
        left = self._noise_in(view.active, view.canvas)
        if self.settings.commit.rewrites:
            left |= decision.write
        return Decision(jnp.where(view.is_last, left, decision.write), erase)

    def _decide(self, view: View, token_keys: jax.Array | None, state: State) -> tuple[View, Decision, Any]:
        """Runs the network and the commit rule; returns the view with statistics, the decision, and what is kept."""
        settings, prediction, feed, kept = self.settings, state.prediction, None, state.kept
        masked = settings.mask_id is not None
        commit, stop = settings.commit, settings.stop
        target_mask = self.proposal.rows.target_mask
        noisy = target_mask & (view.canvas == settings.mask_id) if masked else target_mask
        if prediction is not None:
            # A block begins without one, and what is written is no longer predicted.
            read = noisy & (view.clock > 0)[:, None]
            prediction = jnp.where(read[:, :, None, None], prediction, 0)
        if kept is not None:
            feed = Feed.of(settings, kept, state.block, view.active, self.proposal.rows.segment_ids > 0)
            noisy &= settings.alignment.to_tokens(feed.wanted)
        rate = self._rate(view, state)
        passes, temperature = self.proposal.run(view.canvas, view.active, prediction, rate, feed), settings.temperature
        if kept is not None:
            kept = kept.after(passes[0].cache, state.block, view.active)
        if settings.final_temperature is not None:
            left = 1.0 - view.clock / view.steps
            temperature = settings.final_temperature + (temperature - settings.final_temperature) * left

        temperature = commit.temperature(view, temperature)

        def stats(where: jax.Array, summaries: tuple[str, ...]) -> TokenStats:
            return self.proposal.stats(
                passes,
                where if prediction is None else where | noisy,
                token_keys,
                view.canvas,
                temperature=temperature,
                summaries=summaries,
                transition=commit.transition(view),
            )

        if self._decides_first:
            # The slots are known before the logits are: only theirs are computed and drawn from (trap T03).
            decision = self._filled(view, commit.decide(view))
            return view.replace(stats=stats(decision.write, ())), decision, kept
        where = self._noise_in(view.active, view.canvas)
        if not masked:
            where = target_mask  # the score of the whole input is wanted
        elif commit.revises or (stop is not None and not stop.looks_at_text):
            where = view.active
        summaries = commit.summaries + (() if stop is None else stop.summaries)
        view = view.replace(stats=stats(where, tuple(dict.fromkeys(summaries))))
        decided = commit.decide(self._with_ends_last(view) if settings.end == "defer" else view)
        return view, self._filled(view, decided), kept

    def _rate(self, view: View, state: State) -> jax.Array:
        """Returns f32[R,T], the rate of noise at each target slot, of which a network may be told.

        It is the commit rule's where that follows a schedule, over the slots for which the network was trained to have
        one time. Else the share of MASK, or, where the noise has none, the clock.
        """
        settings, rate = self.settings, self.settings.commit.noise_rate(view)
        one_time = not settings.block or named_blocks(settings.visibility) is not None
        if settings.mask_id is not None and (rate is None or not one_time):
            return noise_share(view.canvas == settings.mask_id, self.proposal.rows.target_mask, settings.visibility)
        to_come = self.blocks.number > state.block[:, None]
        return jnp.where(view.active, view.times()[0] if rate is None else rate, to_come.astype(jnp.float32))

    def _with_ends_last(self, view: View) -> View:
        """Closes slots whose draw is an end, before anything is ranked (trap T47), while others are open."""
        ends = (view.stats.sample == self.settings.eos_id) | (view.stats.sample == self.settings.pad_id)
        return _only(view, ~ends)

    def _moved(
        self, state: State, view: View, canvas: jax.Array, written: jax.Array, moves: jax.Array, kept: Any
    ) -> State:
        """Returns the next state: rows stay in their block, enter the next one, or are done."""
        settings, blocks, target_mask = self.settings, self.blocks, self.proposal.rows.target_mask
        running = state.block < blocks.counts
        advance, over, scores = view.is_last[:, 0], jnp.zeros_like(running), state.scores
        if settings.stop is not None and not settings.stop.looks_at_text:
            stopped = settings.stop.stops(view)
            canvas = jnp.where(stopped[:, None] & view.active, view.stats.argmax, canvas)
            advance |= stopped
        if settings.mask_id is None:
            scores = jnp.where(running, input_scores(settings, state.canvas, view.stats, target_mask), scores)
            # A canvas that stands is no fixed point while what is fed back may still change.
            if settings.early_exit and not settings.commit.revises and state.prediction is None:
                advance |= settled(
                    state.canvas,
                    jnp.where(view.active, view.stats.sample, state.canvas),
                    view.stats,
                    view.active,
                    temperature=max(settings.temperature, settings.final_temperature or 0.0),
                    steps_left=view.steps - view.clock - 1,
                    tolerance=settings.exit_tolerance,
                )
        elif not settings.commit.revises:
            advance |= ~jnp.any(view.active & (canvas == settings.mask_id), axis=1)
        if settings.end == "stop":
            over = ended(canvas, target_mask, settings.mask_id, settings.eos_id, settings.pad_id)
            holes = target_mask & (canvas == settings.mask_id)
            canvas = jnp.where(over[:, None] & holes, settings.pad_id, canvas)
        if settings.stop is not None and settings.stop.looks_at_text:
            # Conditioning and finished blocks: a row whose block continues has nothing new to check.
            done = (blocks.number < state.block[:, None]) | (advance[:, None] & view.active)
            text = (target_mask & done) | (~target_mask & (self.proposal.rows.segment_ids > 0))
            repeats, kept_text = settings.stop.ends(canvas, text, target_mask)
            repeats &= running & advance & moves[:, 0]
            over |= repeats
            canvas = jnp.where(repeats[:, None] & target_mask & ~kept_text, settings.pad_id, canvas)
        trace = None
        if settings.keep_trace:
            later = jnp.arange(state.trace.shape[0])[:, None, None] >= state.turn[:, None]
            trace = jnp.where(later, canvas[None], state.trace)
        moves = moves[:, 0]
        advance &= moves
        following = jnp.minimum(jnp.where(advance, state.block + 1, state.block), blocks.counts)
        return State(
            canvas=canvas,
            block=jnp.where(over, blocks.counts, following),
            clock=jnp.where(advance, 0, state.clock + moves),
            log_prob=jnp.where(written, view.stats.sample_log_prob, state.log_prob),
            scores=scores,
            turn=state.turn + moves,
            calls=state.calls + 1,
            prediction=view.stats.expected,
            kept=kept,
            trace=trace,
        )


def _only(view: View, among: jax.Array) -> View:
    """Closes the slots that are not `among` bool[R,T], for this step and in rows where some of those are open."""
    first = view.open & among
    kept = jnp.where(jnp.any(first, axis=1, keepdims=True), first, view.open)
    closed = jnp.sum(view.open & ~kept, axis=1, keepdims=True, dtype=jnp.int32)
    return view.replace(open=kept, deferred=view.deferred + closed)


def input_scores(settings: Any, canvas: jax.Array, stats: TokenStats, target_mask: jax.Array) -> jax.Array:
    """Returns f32[R], minus the mean cross-entropy of the step's input under the step's output."""
    scored = target_mask
    if settings.score_over == "real":
        real = target_mask & ~filler(canvas, target_mask, settings.pad_id, settings.eos_id)
        scored = jnp.where(jnp.any(real, axis=1, keepdims=True), real, target_mask)
    return _mean(stats.target_log_prob, scored)


def commit_scores(settings: Any, final: State, target_mask: jax.Array) -> jax.Array:
    """Returns f32[R], the mean log-probability that the tokens had when they were written.

    Rows that stopped at their end have slots that were never written, so the text alone counts.
    """
    scored = target_mask
    ends = settings.stop is not None and settings.stop.looks_at_text
    if settings.score_over == "real" or settings.end == "stop" or ends:
        scored &= ended_before(final.canvas, target_mask, settings.eos_id, settings.pad_id) == 0
    return _mean(final.log_prob, scored)


def _mean(values: jax.Array, scored: jax.Array) -> jax.Array:
    total = jnp.sum(jnp.where(scored, values, 0.0), axis=1)
    return total / jnp.maximum(jnp.sum(scored, axis=1), 1)


def _numbered(keys: jax.Array, turn: jax.Array) -> jax.Array:
    return fold_in_each(keys, jnp.broadcast_to(turn[:, None], keys.shape))
