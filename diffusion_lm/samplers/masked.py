"""Decoding of masked diffusion models: the window starts as MASK and is unmasked in parallel."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from diffusion_lm.architectures.base import BoundModel
from diffusion_lm.core.alignment import Alignment, SamePosition
from diffusion_lm.core.checks import check_choice, check_count
from diffusion_lm.core.errors import require
from diffusion_lm.core.rng import StreamKeys
from diffusion_lm.core.types import Batch, Decoded
from diffusion_lm.nn.named_masks import check_visibility, named_blocks
from diffusion_lm.noise.contract import Contract
from diffusion_lm.noise.process import Absorbing
from diffusion_lm.samplers.blocks import Blocks, seed_slots
from diffusion_lm.samplers.caching import CachedPass, CacheState
from diffusion_lm.samplers.decoding import Decoding
from diffusion_lm.samplers.loop import Ending, Loop, State, denoise, sampled_scores
from diffusion_lm.samplers.rule import MaskedRule, RuleState
from diffusion_lm.samplers.settings import check_rule
from diffusion_lm.samplers.stopping import TextStop, has_finished_text
from diffusion_lm.samplers.unmasking import Ranked
from diffusion_lm.samplers.view import Decision, View

ENDS = ("free", "defer", "stop")


@dataclasses.dataclass(frozen=True)
class MaskedSampler:
    """Starts from MASK; in each step the network predicts all MASK slots of a block, and `unmask` selects some of them.

    A row goes to its next block when the steps of its block are used up, or when the block has no MASK left and the
    rule never remasks. The last step of a block unmasks all that is left. The target ends at the first EOS or PAD.
    Target slots may be anywhere in the row, with fixed text between them (infilling).

    `Decoded.scores` is the mean log-probability of the tokens when they were sampled; of several candidates the one
    with the highest score is returned. `Decoded.forward_passes` is the number of network calls times `candidates`,
    twice that with guidance. Steps that cannot change a row cost no call, and a decode that ends early reports the
    calls it made.

    Attributes:
      process: the noise process; its schedule is that of `unmasking.Ancestral` and of the score rules.
      unmask: which MASK slots are sampled in a step, and which tokens are remasked (`samplers.unmasking`,
        `samplers.routing`, `samplers.ratios`, `samplers.token_ancestral`).
      steps: denoising steps per window, distributed over its blocks; None = one per target token.
      blocks: decodes the window block by block, from left to right; None = the window is one block.
      decoding: temperature, top-k, top-p and forbidden tokens.
      guidance: strength w of classifier-free guidance, logits c + w (c - u), u with the conditioning masked. 0 is off
        and adds no pass.
      self_conditioning: each step reads, at its MASK slots, the mean embedding that the step before predicted, at the
        temperature of the draws (1 if that is 0), without filters; zeros in the first step of a block. None = if the
        network has the layer, True = an error if it does not, False = zeros.
      candidates: decodes per prompt, which differ in their draws.
      score_over: the score is a mean over the "real" tokens, those up to and including the end, or over the "window".
      end: "free" treats EOS and PAD as tokens. "defer" unmasks a slot whose draw is one of them only if no other slot
        is left or the last step of the block has come. "stop" finishes a row when it has one of them and no MASK before
        it. (`Decoding.forbidden = ("eos", "pad")` gives them probability 0, so that the whole window is text.)
      stop: ends rows after a finished block (`stopping.LowEntropy`), or None.
      alignment: which hidden state predicts which token.
      visibility: attention visibility, that of the training.
      keep_trace: return the canvas after each step, before it is cut at the end. Every step is then a forward pass.
    """

    process: Absorbing = Absorbing()
    unmask: MaskedRule = Ranked()
    steps: int | None = None
    blocks: Blocks | None = None
    decoding: Decoding = Decoding()
    guidance: float = 0.0
    self_conditioning: bool | None = None
    candidates: int = 1
    score_over: Literal["real", "window"] = "real"
    end: Literal["free", "defer", "stop"] = "free"
    stop: TextStop | None = None
    alignment: Alignment = SamePosition()
    visibility: str = "full"
    keep_trace: bool = False

    def __post_init__(self):
        if self.steps is not None:
            check_count(self.steps, "MaskedSampler.steps", "None takes one step per target token.")
        check_count(self.candidates, "MaskedSampler.candidates")
        check_choice(self.score_over, ("real", "window"), "MaskedSampler.score_over")
        check_choice(self.end, ENDS, "MaskedSampler.end")
        check_visibility(self.visibility, "MaskedSampler.visibility")
        check_rule(self, "unmask")
        seeds = self.blocks is not None and self.blocks.seeds
        for setting, where in ((self.end == "stop", "MaskedSampler.end"), (seeds, "Blocks.seeds")):
            require(
                not setting or not self.unmask.remasks,
                f"{type(self.unmask).__name__} may remask tokens that this setting treats as final",
                where=where,
                fix="Use end = 'free' and seeds = False with rules that remask.",
            )
        if self.blocks is not None and named_blocks(self.visibility) is None:
            require(
                not self.blocks.causal_context and (not seeds or self.blocks.cache is not None),
                f"visibility={self.visibility!r}: causal_context, and seeds without a cache, need the network's blocks",
                where="MaskedSampler.visibility",
                fix="Use 'blocks:N' or 'example_blocks:N' with the block size of the training.",
            )

    @property
    def rule(self) -> MaskedRule:
        """The unmasking rule."""
        return self.unmask

    @property
    def contract(self) -> Contract:
        """What the sampler assumes about the network."""
        return Contract(
            noise=self.process.kind,
            visibility=self.visibility,
            alignment=self.alignment,
            output=self.unmask.output,
            causal_context=self.blocks is not None and self.blocks.causal_context,
            # With a cache and no blocks of the network, seeds are an order of the sampler's own.
            seeds=self.blocks is not None and self.blocks.seeds and named_blocks(self.visibility) is not None,
        )

    def without_early_end(self) -> "MaskedSampler":
        """Returns the sampler with which no row ends before its window is full."""
        return dataclasses.replace(self, end="free", stop=None)

    def generate(self, model: BoundModel, prompt: Batch, keys: StreamKeys) -> Decoded:
        """Fills the target windows; see `samplers.sampler.Sampler`."""
        blocks = self.blocks
        return denoise(
            MaskedLoop,
            self,
            model,
            prompt,
            keys,
            block_size=0 if blocks is None else blocks.size,
            causal_context=blocks is not None and blocks.causal_context,
            cached=blocks is not None and blocks.cache is not None,
            score=_scores,
        )


class MaskedLoop(Loop[MaskedSampler]):
    """The denoising loop over canvases with MASK."""

    def open_slots(self, active: jax.Array, canvas: jax.Array) -> jax.Array:
        """Returns bool[R,T], the active slots with MASK."""
        return active & (canvas == self.denoiser.rows.special.mask)

    def view(self, state: State) -> View:
        """Returns the view; with seeds, only these are open while a block has some left."""
        view, blocks = super().view(state), self.sampler.blocks
        if blocks is None or not blocks.seeds:
            return view
        target_mask = self.denoiser.rows.target_mask
        return _open_only(view, seed_slots(target_mask, self.blocks, named_blocks(self.sampler.visibility)))

    def moving_rows(self, state: State) -> jax.Array:
        """Returns bool[R,1], the rows that take this step: all, or, with a cache, those in the lowest current block.

        Rows that wait for the others enter a block together with them, so that the network runs on whole rows once per
        block of the batch and not whenever one row enters a block. A row's draws are numbered by its own steps, so
        waiting changes none of them.
        """
        if self.sampler.blocks is None or self.sampler.blocks.cache is None:
            return super().moving_rows(state)
        lowest = jnp.min(jnp.where(state.block < self.blocks.counts, state.block, jnp.iinfo(jnp.int32).max))
        return (state.block <= lowest)[:, None]

    def cached_pass(self, view: View, state: State) -> CachedPass | None:
        """Returns the slots that the cache does not hold."""
        if state.cache is None or self.sampler.blocks is None or self.sampler.blocks.cache is None:
            return None
        return CachedPass.of(
            self.sampler.blocks.cache,
            state.cache,
            block=state.block,
            block_size=self.sampler.blocks.size,
            active=view.active,
            used=self.denoiser.rows.segment_ids > 0,
            alignment=self.sampler.alignment,
        )

    @property
    def _rule_decides_alone(self) -> bool:
        """Whether only the rule selects slots, so that what it says before the logits are known is final."""
        return self.sampler.end != "defer"

    def skip_idle_steps(self, state: State) -> State:
        """Skips the steps in which a row is neither unmasked nor remasked: they need no forward pass.

        MDLM's released decoder saves calls by reusing the last logits while no row of the batch has changed. Here the
        slots of a step, or a superset of them, are decided before the network runs, so each row goes straight to its
        next step that may change it. Every step has its own draws, so the result is that of running all steps
        (trap T42).
        """
        rule = self.sampler.unmask
        known = rule.decide if rule.ignores_logits else rule.largest_decision
        if not self._rule_decides_alone or state.prediction is not None or state.trace is not None:
            return state
        if known(self.view(state)) is None:
            return state

        def idle(state: State) -> jax.Array:
            view = self.view(state)
            decision = self._with_last_step(view, known(view))
            changed = decision.sample if decision.renoise is None else decision.sample | decision.renoise
            return (state.block < self.blocks.counts) & ~view.is_last[:, 0] & ~jnp.any(changed, axis=1)

        def skip(carry: tuple[State, jax.Array]) -> tuple[State, jax.Array]:
            state, rows = carry
            state = state.replace(step=state.step + rows, total_steps=state.total_steps + rows)  # type: ignore[attr-defined]
            return state, idle(state)

        return jax.lax.while_loop(lambda carry: jnp.any(carry[1]), skip, (state, idle(state)))[0]

    def decide(self, view: View, state: State) -> tuple[View, Decision, RuleState, CacheState | None]:
        """Runs the network and the rule; in the last step of a block no MASK is left."""
        if not (self.sampler.unmask.ignores_logits and self._rule_decides_alone):
            view, decision, rule_state, cache = super().decide(view, state)
            return view, self._with_last_step(view, decision), rule_state, cache
        # The slots are known before the logits are: only theirs are computed and drawn (trap T03).
        passes, cache, read = self.forward(view, state)
        decision = self._with_last_step(view, self.sampler.unmask.decide(view))
        return view.replace(draws=self.stats(passes, decision.sample | read, view, state, ())), decision, (), cache

    def slots_to_draw(self, view: View) -> jax.Array:
        """Returns bool[R,T]: MASK slots; if the rule remasks, it reads the scores of unmasked slots too."""
        return view.active if self.sampler.unmask.remasks else self.open_slots(view.active, view.canvas)

    def eligible(self, view: View) -> View:
        """With `end = "defer"`, closes slots whose draw is an end, before anything is ranked (trap T47)."""
        if self.sampler.end != "defer":
            return view
        return _open_only(view, ~self.denoiser.rows.special.is_end(view.stats.sample))

    def _with_last_step(self, view: View, decision: Decision | None) -> Decision:
        """Returns the decision, and in the last step of a block that all MASK slots are sampled."""
        assert decision is not None
        masked = self.open_slots(view.active, view.canvas)
        remask = None if decision.renoise is None else decision.renoise & ~view.is_last
        return Decision(jnp.where(view.is_last, masked, decision.sample), remask)

    def apply(self, decision: Decision, view: View, state: State) -> jax.Array:
        """Returns i32[R,T], the canvas with sampled tokens unmasked and others remasked."""
        canvas = jnp.where(decision.sample, view.stats.sample, state.canvas)
        if decision.renoise is None:
            return canvas
        return jnp.where(decision.renoise, self.denoiser.rows.special.mask, canvas)

    def ending(self, decision: Decision, view: View, state: State, canvas: jax.Array, moving: jax.Array) -> Ending:
        """Returns which rows end their block, or are done."""
        sampler, rows = self.sampler, self.denoiser.rows
        target_mask, special = rows.target_mask, rows.special
        block_ends, row_ends = view.is_last[:, 0], jnp.zeros(canvas.shape[0], bool)
        # A rule that remasks needs all its steps, even if no slot is MASK now.
        if not sampler.unmask.remasks:
            block_ends |= ~jnp.any(self.open_slots(view.active, canvas), axis=1)
        if sampler.end == "stop":
            # Slots after the end need no token; they become PAD, so that no MASK is left.
            row_ends = has_finished_text(canvas, target_mask, special.mask, special)
            unneeded = target_mask & (canvas == special.mask)
            canvas = jnp.where(row_ends[:, None] & unneeded, special.pad_id, canvas)
        if sampler.stop is not None:
            # Only conditioning and finished blocks: a row in the middle of a block has nothing new to check.
            finished = (self.blocks.number < state.block[:, None]) | (block_ends[:, None] & view.active)
            text = (target_mask & finished) | (~target_mask & (rows.segment_ids > 0))
            stopped, stays = sampler.stop.ends(canvas, text, target_mask)
            stopped &= (state.block < self.blocks.counts) & block_ends & moving[:, 0]
            row_ends |= stopped
            canvas = jnp.where(stopped[:, None] & target_mask & ~stays, special.pad_id, canvas)
        return Ending(canvas, block_ends, row_ends, state.scores)


def _open_only(view: View, among: jax.Array) -> View:
    """Closes the slots that are not `among` bool[R,T], in rows where some of those are open."""
    first = view.open & among
    stays = jnp.where(jnp.any(first, axis=1, keepdims=True), first, view.open)
    closed = jnp.sum(view.open & ~stays, axis=1, keepdims=True, dtype=jnp.int32)
    return view.replace(open=stays, deferred=view.deferred + closed)


def _scores(loop: Loop[MaskedSampler], final: State) -> jax.Array:
    """Returns f32[R], see `MaskedSampler`."""
    sampler = loop.sampler
    # Rows that ended early have slots that were never sampled, so only their text counts.
    ends_early = sampler.end == "stop" or sampler.stop is not None
    return sampled_scores(loop, final, text_only=sampler.score_over == "real" or ends_early)
