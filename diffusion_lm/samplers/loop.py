"""The denoising loop that all masked and canvas samplers share.

    while a row has blocks left:
        network(canvas)  ->  draws at the open slots
        rule(view)       ->  which slots are sampled, which are renoised
        canvas           <-  draws, noise
        each row         ->  next step of its block, next block, or done

An algorithm is a `rule.Rule`. `masked.MaskedSampler` and `canvas.CanvasSampler` say which slots are open and when a
block ends. Prompts times candidates are the R rows of one batch, and the loop is one compiled program.
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

import flax.struct
import jax
import jax.numpy as jnp

from diffusion_lm.architectures.base import BoundModel
from diffusion_lm.architectures.exponents import token_exponents
from diffusion_lm.core.errors import require
from diffusion_lm.core.rng import StreamKeys, fold_in_each, stream_number
from diffusion_lm.core.types import Batch, Decoded, TokenStats, Trace
from diffusion_lm.nn.named_masks import named_blocks, noise_share
from diffusion_lm.noise.process import is_noise, mask_id_of
from diffusion_lm.samplers.blocks import RowBlocks
from diffusion_lm.samplers.caching import CachedPass, CacheState
from diffusion_lm.samplers.candidates import best_candidate, candidate_keys, start_canvases
from diffusion_lm.samplers.denoiser import Denoiser, Passes, blank_conditioning
from diffusion_lm.samplers.rule import RuleState
from diffusion_lm.samplers.settings import DenoisingSettings
from diffusion_lm.samplers.view import Decision, View
from diffusion_lm.samplers.window import cut_at_end, ends_before, target_lengths, without_target

Settings = TypeVar("Settings", bound=DenoisingSettings)


@flax.struct.dataclass
class State:
    """What the loop carries, for R = B * candidates rows.

    Attributes:
      canvas: i32[R,T].
      block: i32[R], the current block; the number of blocks when the row is done.
      step: i32[R], steps done in the block.
      total_steps: i32[R], steps done in all, including those without a forward pass; it numbers the row's draws.
      log_prob: f32[R,T], log-probability of each token when it was sampled.
      scores: f32[R], of the last input under the last logits (canvases without MASK), else 0.
      calls: i32[], number of calls of the network.
      rule: the state of the rule.
      prediction: [R,T,P,D], the mean embeddings that the last call predicts; None without self-conditioning.
      cache: the KV cache of the current block, or None.
      trace: i32[steps,R,T] or None.
    """

    canvas: jax.Array
    block: jax.Array
    step: jax.Array
    total_steps: jax.Array
    log_prob: jax.Array
    scores: jax.Array
    calls: jax.Array
    rule: RuleState
    prediction: jax.Array | None
    cache: CacheState | None
    trace: jax.Array | None


class Ending(NamedTuple):
    """What a step means for its rows.

    Attributes:
      canvas: i32[R,T], the canvas after the step.
      block_ends: bool[R], rows that go to their next block.
      row_ends: bool[R], rows that are done.
      scores: f32[R], see `State`.
    """

    canvas: jax.Array
    block_ends: jax.Array
    row_ends: jax.Array
    scores: jax.Array


@dataclasses.dataclass(frozen=True, eq=False)
class Loop(abc.ABC, Generic[Settings]):
    """The body of the loop. Subclasses say which slots are open and when blocks end.

    Attributes:
      sampler: its settings.
      denoiser: the network.
      blocks: the rows' blocks.
      token_keys: key[R,T] of the draws, or None at temperature 0.
      rule_keys: key[R,T] of the rule.
      noise: call number -> i32[R,T], fresh noise for slots that are renoised in that call.
    """

    sampler: Settings
    denoiser: Denoiser
    blocks: RowBlocks
    token_keys: jax.Array | None
    rule_keys: jax.Array
    noise: Callable[[jax.Array], jax.Array]

    def run(self, state: State) -> State:
        """Runs steps until every row is done."""
        return jax.lax.while_loop(lambda state: jnp.any(state.block < self.blocks.counts), self.step, state)

    def step(self, state: State) -> State:
        """Runs one step of every row."""
        state = self.skip_idle_steps(state)
        # bool[R,1]; the canvas, the random numbers and the rule's state of other rows stay as they are.
        moving = self.moving_rows(state)
        view = self.view(state)
        view = view.replace(active=view.active & moving, open=view.open & moving)
        view, decision, rule_state, cache = self.decide(view, state)
        canvas = self.apply(decision, view, state)
        end = self.ending(decision, view, state, canvas, moving)

        # Rows that wait take no step: neither their counters nor their draws advance.
        moved = moving[:, 0]
        block_ends = end.block_ends & moved
        block = jnp.minimum(jnp.where(block_ends, state.block + 1, state.block), self.blocks.counts)
        trace = None
        if state.trace is not None:
            # All later entries too, so that steps after the end of a row repeat its final canvas.
            later = jnp.arange(state.trace.shape[0])[:, None, None] >= state.total_steps[:, None]
            trace = jnp.where(later, end.canvas[None], state.trace)
        return State(
            canvas=end.canvas,
            # A row is done when its block number is the number of its blocks.
            block=jnp.where(end.row_ends, self.blocks.counts, block),
            step=jnp.where(block_ends, 0, state.step + moved),
            total_steps=state.total_steps + moved,
            # Of tokens that were sampled in this step; all others keep theirs from when they were sampled.
            log_prob=jnp.where(decision.sample, view.stats.sample_log_prob, state.log_prob),
            scores=end.scores,
            calls=state.calls + 1,
            rule=_for_rows(moved & (state.block < self.blocks.counts), rule_state, state.rule),
            prediction=view.stats.expected,
            cache=cache,
            trace=trace,
        )

    @abc.abstractmethod
    def open_slots(self, active: jax.Array, canvas: jax.Array) -> jax.Array:
        """Returns bool[R,T], the active slots that may be sampled."""

    @abc.abstractmethod
    def apply(self, decision: Decision, view: View, state: State) -> jax.Array:
        """Returns i32[R,T], the canvas after the decision."""

    @abc.abstractmethod
    def ending(self, decision: Decision, view: View, state: State, canvas: jax.Array, moving: jax.Array) -> Ending:
        """Returns which rows end their block, or are done, after a step that led to `canvas`."""

    @abc.abstractmethod
    def slots_to_draw(self, view: View) -> jax.Array:
        """Returns bool[R,T], the slots whose statistics the step needs."""

    @property
    def extra_summaries(self) -> tuple[str, ...]:
        """The statistics that are needed in addition to the rule's."""
        return ()

    def skip_idle_steps(self, state: State) -> State:
        """Returns the state at each row's next step that may change it."""
        return state

    def moving_rows(self, state: State) -> jax.Array:
        """Returns bool[R,1] or bool[1,1], the rows that take this step."""
        del state
        return jnp.ones((1, 1), bool)

    def cached_pass(self, view: View, state: State) -> CachedPass | None:
        """Returns the slots to run if a cache holds the others."""
        del view, state
        return None

    def view(self, state: State) -> View:
        """Returns what the rule reads before the forward pass."""
        active, special = self.blocks.active(state.block), self.denoiser.rows.special
        return View(
            canvas=state.canvas,
            active=active,
            open=self.open_slots(active, state.canvas),
            step=state.step,
            steps=self.blocks.steps_in(state.block),
            log_prob=state.log_prob,
            keys=numbered(self.rule_keys, state.total_steps),
            process=self.sampler.process,
            vocab_size=self.denoiser.model.spec.vocab_size,
            mask_id=mask_id_of(self.sampler.process, special),
            exponents=token_exponents(self.denoiser.model),
        )

    def decide(self, view: View, state: State) -> tuple[View, Decision, RuleState, CacheState | None]:
        """Runs the network and the rule; returns the view with statistics, the decision and the next states."""
        passes, cache, read = self.forward(view, state)
        rule = self.sampler.rule
        where = self.slots_to_draw(view)
        view = view.replace(
            draws=self.stats(passes, where | read, view, state, (*rule.summaries, *self.extra_summaries))
        )
        if rule.reads_logits:
            view = view.replace(logit_values=self.logit_values(passes, where, view))
        decision, rule_state = rule(self.eligible(view), state.rule)
        return view, decision, rule_state, cache

    def eligible(self, view: View) -> View:
        """Returns the view in which the rule chooses."""
        return view

    def forward(self, view: View, state: State) -> tuple[Passes, CacheState | None, jax.Array]:
        """Runs the network; returns its states, the cache, and bool[R,T], where the next call reads a prediction."""
        target_mask = self.denoiser.rows.target_mask
        noisy = is_noise(self.sampler.process, view.canvas, target_mask, self.denoiser.rows.special)
        prediction = state.prediction
        if prediction is not None:
            # The first step of a block has no previous prediction, and clean tokens are no longer predicted.
            read = noisy & (view.step > 0)[:, None]
            prediction = jnp.where(read[:, :, None, None], prediction, 0)
        # Only slots that the pass runs can read a prediction and give a new one.
        cached, cache = self.cached_pass(view, state), state.cache
        if cached is not None:
            noisy &= self.sampler.alignment.to_tokens(cached.wanted)
        passes = self.denoiser.run(view.canvas, view.active, prediction, self.noise_rate(view, state), cached)
        if cache is not None and passes.conditional.cache is not None:
            cache = cache.after(passes.conditional.cache, state.block, view.active)
        return passes, cache, noisy if prediction is not None else jnp.zeros_like(noisy)

    def stats(
        self, passes: Passes, where: jax.Array, view: View, state: State, summaries: tuple[str, ...]
    ) -> TokenStats:
        """Returns the draws at the slots `where`, bool[R,T]."""
        rule = self.sampler.rule
        return self.denoiser.stats(
            passes,
            where,
            None if self.token_keys is None else numbered(self.token_keys, state.total_steps),
            view.canvas,
            temperature=rule.temperature(view, self.sampler.decoding.temperature),
            summaries=tuple(dict.fromkeys(summaries)),
            transition=rule.transition(view),
        )

    def logit_values(self, passes: Passes, where: jax.Array, view: View) -> jax.Array:
        """Returns f32[R,T], the rule's own function of the logits and the draws."""
        to_slots, to_tokens = self.sampler.alignment.to_slots, self.sampler.alignment.to_tokens
        values = self.denoiser.model.map_logits(
            self.sampler.rule.from_logits,
            passes.conditional,
            (to_slots(view.stats.sample),),
            where=to_slots(where),
            forbidden=self.sampler.decoding.never_drawn(self.denoiser.rows.special),
        )
        return to_tokens(values)

    def noise_rate(self, view: View, state: State) -> jax.Array:
        """Returns f32[R,T], the noise rate of each target slot, the input of time-conditioned networks.

        It is the rule's if that follows a schedule and the network was trained with one time for these slots. Otherwise
        it is the fraction of MASK, or, if the noise has no MASK, the fraction of remaining steps.
        """
        sampler, rate = self.sampler, self.sampler.rule.noise_rate(view)
        mask_id, target_mask = view.mask_id, self.denoiser.rows.target_mask
        # A block order of the sampler alone mixes finished and untouched slots under one time.
        one_time = not self.blocks.size or named_blocks(sampler.visibility) is not None
        if mask_id is not None and (rate is None or not one_time):
            return noise_share(view.canvas == mask_id, target_mask, sampler.visibility)
        # Without MASK the canvas does not show the noise: later blocks are noise, earlier ones are finished.
        later_blocks = self.blocks.number > state.block[:, None]
        return jnp.where(view.active, view.times()[0] if rate is None else rate, later_blocks.astype(jnp.float32))


def denoise(
    loop_class: type[Loop[Settings]],
    sampler: Settings,
    model: BoundModel,
    prompt: Batch,
    keys: StreamKeys,
    *,
    block_size: int,
    causal_context: bool = False,
    cached: bool = False,
    score: Callable[[Loop[Settings], State], jax.Array],
) -> Decoded:
    """Fills the target windows of `prompt` with the loop of a sampler; see `sampler.Sampler.generate`.

    Args:
      loop_class: the sampler's loop.
      sampler: its settings.
      model: the network.
      prompt: as in `sampler.Sampler.generate`.
      keys: of the draws.
      block_size: tokens per block; 0 decodes the window as one block.
      causal_context: see `blocks.Blocks`.
      cached: whether a KV cache is used.
      score: returns f32[R], the scores of the candidates after the last step.
    """
    B, C, special = prompt.tokens.shape[0], sampler.candidates, prompt.special
    vocab_size = model.spec.vocab_size
    require(
        not sampler.self_conditioning or model.spec.self_conditioning,
        "self_conditioning=True: the network has no layer that reads a previous prediction",
        where=f"{type(sampler).__name__}.self_conditioning",
        fix="Bind TransformerSpec.self_conditioning = True and train with it, or set this to None.",
    )
    prompt = prompt.replace(tokens=without_target(prompt))
    blank = None
    if sampler.guidance != 0:
        blank = blank_conditioning(sampler.process, prompt, keys, vocab_size)
    denoiser = Denoiser.of(
        model,
        prompt,
        blank,
        candidates=C,
        visibility=sampler.visibility,
        alignment=sampler.alignment,
        decoding=sampler.decoding,
        guidance=sampler.guidance,
        causal_context=causal_context,
        feeds_back=model.spec.self_conditioning and sampler.self_conditioning is not False,
    )

    # Keyed by call, so that renoised slots get fresh noise in every step.
    def noise(call: jax.Array) -> jax.Array:
        root = jax.random.fold_in(jax.random.fold_in(keys.root, stream_number("sampler/noise")), call)
        return start_canvases(sampler.process, keys.replace(root=root), prompt, C, vocab_size=vocab_size)

    canvas = start_canvases(sampler.process, keys, prompt, C, vocab_size=vocab_size)
    blocks = RowBlocks.of(denoiser.rows.target_mask, block_size, sampler.steps, sampler.visibility)
    loop = loop_class(
        sampler=sampler,
        denoiser=denoiser,
        blocks=blocks,
        token_keys=candidate_keys(keys, "sampler/token", prompt, C) if sampler.decoding.temperature > 0 else None,
        rule_keys=candidate_keys(keys, "sampler/rule", prompt, C),
        noise=noise,
    )
    # Every row has counters of its own, so rows do not depend on their batch.
    zeros = jnp.zeros(B * C, jnp.int32)
    final = loop.run(
        State(
            canvas=canvas,
            block=zeros,
            step=zeros,
            total_steps=zeros,
            log_prob=jnp.zeros(canvas.shape, jnp.float32),
            scores=jnp.zeros(B * C, jnp.float32),
            calls=jnp.zeros((), jnp.int32),
            rule=sampler.rule.init(B * C),
            prediction=denoiser.no_prediction(),
            cache=denoiser.empty_cache() if cached else None,
            trace=jnp.broadcast_to(canvas, (blocks.most_steps(), *canvas.shape)) if sampler.keep_trace else None,
        )
    )
    scores = score(loop, final)
    # The scores of candidates are compared within each prompt only.
    best = best_candidate(scores, B)
    tokens = cut_at_end(final.canvas[best], prompt.target_mask, special)
    return Decoded(
        tokens=tokens,
        lengths=target_lengths(tokens, prompt.target_mask, special),
        scores=scores[best],
        forward_passes=jnp.full(B, C * denoiser.rows_per_call, jnp.int32) * final.calls,
        trace=None if final.trace is None else Trace(final.trace[:, best]),
    )


def numbered(keys: jax.Array, number: jax.Array) -> jax.Array:
    """Returns key[R,T], the keys of step number i32[R] of each row."""
    return fold_in_each(keys, jnp.broadcast_to(number[:, None], keys.shape))


def sampled_scores(loop: Loop[Settings], final: State, *, text_only: bool) -> jax.Array:
    """Returns f32[R], the mean log-probability of the tokens when they were sampled.

    With `text_only` the mean is over the tokens up to and including the end, else over the window.
    """
    rows = loop.denoiser.rows
    scored = rows.target_mask
    if text_only:
        scored &= ends_before(final.canvas, rows.target_mask, rows.special) == 0
    return mean_over(final.log_prob, scored)


def mean_over(values: jax.Array, where: jax.Array) -> jax.Array:
    """Returns f32[R], the mean of f32[R,T] over bool[R,T], 0 for rows without any."""
    total = jnp.sum(jnp.where(where, values, 0.0), axis=1)
    return total / jnp.maximum(jnp.sum(where, axis=1), 1)


def _for_rows(rows: jax.Array, new: RuleState, old: RuleState) -> RuleState:
    """Returns `new` in the rows bool[R], `old` in all others."""
    return jax.tree.map(lambda a, b: jnp.where(rows.reshape(-1, *[1] * (a.ndim - 1)), a, b), new, old)
