"""Decoding by resampling a canvas: AR2Diff's sampler (SUNDAE), uniform noise (UDLM, SEDD), GIDD and DiffusionGemma."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from diffusion_lm.architectures.base import BoundModel
from diffusion_lm.core.alignment import Alignment, SamePosition
from diffusion_lm.core.checks import check_choice, check_count, check_probability
from diffusion_lm.core.real_tokens import is_filler
from diffusion_lm.core.rng import StreamKeys
from diffusion_lm.core.types import Batch, Decoded
from diffusion_lm.nn.named_masks import check_visibility
from diffusion_lm.noise.contract import Contract
from diffusion_lm.noise.process import Hybrid, Uniform
from diffusion_lm.samplers.decoding import Decoding
from diffusion_lm.samplers.loop import Ending, Loop, State, denoise, mean_over, sampled_scores
from diffusion_lm.samplers.rule import CanvasRule
from diffusion_lm.samplers.settings import check_rule
from diffusion_lm.samplers.stopping import CanvasStop, settled
from diffusion_lm.samplers.unmasking import AllSlots
from diffusion_lm.samplers.view import Decision, View


@dataclasses.dataclass(frozen=True)
class CanvasSampler:
    """Starts from noise; in each step the network predicts every token of the canvas, and `update` resamples some.

    With the defaults this is the decoder of AR2Diff (arXiv 2401.17181): N = 8 random starts, T = 10 passes, every
    target token drawn from softmax(logits / 0.2) in each pass, and the candidate is returned whose *last input* has the
    lowest cross-entropy under the *last logits*.

    All of it is one program: candidates, and the unconditional passes of guidance, are rows of the batch, and the
    encoder, if any, runs once. `Decoded.scores` is the mean log-probability of the last input under the last logits,
    per scored token; with noise that has MASK (`process.Hybrid`), of each token when it was sampled.
    `Decoded.forward_passes` is the number of network calls times `candidates`, twice that with guidance.

    Attributes:
      process: the noise process; the canvas starts as a draw of z_1.
      update: which slots are sampled in a step, and which take fresh noise (`samplers.uniform`, `samplers.hybrid`,
        `samplers.ratios`, `samplers.unmasking`).
      steps: denoising steps per window, distributed over its canvases; None = one per target token.
      canvas: tokens per canvas; canvases are decoded from left to right. 0 = the window is one canvas.
      decoding: temperature, top-k, top-p and forbidden tokens.
      guidance: strength w of classifier-free guidance, logits c + w (c - u), u with the conditioning replaced by noise
        (`denoiser.blank_conditioning`). 0 is off and adds no pass.
      self_conditioning: each step reads the mean embedding that the step before predicted; as in `MaskedSampler`.
      candidates: starts per prompt; at temperature 0 they differ only by their starts.
      score_over: the score is the mean over the whole "window", or over the "real" tokens: those that are not filler in
        the last input, or, with MASK, those up to and including the end. AR2Diff does not say which; the window favours
        long padding. A candidate that is all filler is scored over the window in either case, because an empty mean
        would beat every text.
      exit_tolerance: ends a row at a fixed point, if the probability that later steps would change it is at most this
        (`stopping.settled`). None runs every step. Rules that do not settle and self-conditioning always run them.
      stop: ends canvases (`stopping.StableAndSure`), or None.
      alignment: which hidden state predicts which token.
      visibility: attention visibility, that of the training.
      keep_trace: return the canvas after each step, before it is cut at the end.
    """

    process: Uniform | Hybrid = Uniform()
    update: CanvasRule = AllSlots()
    steps: int | None = 10
    canvas: int = 0
    decoding: Decoding = Decoding(temperature=0.2)
    guidance: float = 0.0
    self_conditioning: bool | None = None
    candidates: int = 8
    score_over: Literal["window", "real"] = "window"
    exit_tolerance: float | None = 0.01
    stop: CanvasStop | None = None
    alignment: Alignment = SamePosition()
    visibility: str = "full"
    keep_trace: bool = False

    def __post_init__(self):
        if self.steps is not None:
            check_count(self.steps, "CanvasSampler.steps", "AR2Diff uses 10.")
        check_count(self.candidates, "CanvasSampler.candidates", "AR2Diff uses 8.")
        check_count(self.canvas, "CanvasSampler.canvas", "0 decodes the window as one canvas.", minimum=0)
        if self.exit_tolerance is not None:
            fix = "The default is 0.01; None runs every step."
            check_probability(self.exit_tolerance, "CanvasSampler.exit_tolerance", fix, below_one=True)
        check_choice(self.score_over, ("window", "real"), "CanvasSampler.score_over")
        check_visibility(self.visibility, "CanvasSampler.visibility")
        check_rule(self, "update")

    @property
    def rule(self) -> CanvasRule:
        """The update rule."""
        return self.update

    @property
    def contract(self) -> Contract:
        """What the sampler assumes about the network."""
        return Contract(self.process.kind, self.visibility, self.alignment, self.update.output)

    def without_early_end(self) -> "CanvasSampler":
        """Returns the sampler that runs every step."""
        return dataclasses.replace(self, exit_tolerance=None, stop=None)

    def generate(self, model: BoundModel, prompt: Batch, keys: StreamKeys) -> Decoded:
        """Fills the target windows; see `samplers.sampler.Sampler`."""
        return denoise(CanvasLoop, self, model, prompt, keys, block_size=self.canvas, score=_scores)


class CanvasLoop(Loop[CanvasSampler]):
    """The denoising loop over canvases in which every slot may change in each step."""

    def open_slots(self, active: jax.Array, canvas: jax.Array) -> jax.Array:
        """Returns bool[R,T], all active slots."""
        return active

    def slots_to_draw(self, view: View) -> jax.Array:
        """Returns bool[R,T]: the whole window, because the score is that of the whole input."""
        return view.active if self.sampler.process.has_mask else self.denoiser.rows.target_mask

    @property
    def extra_summaries(self) -> tuple[str, ...]:
        """Those of the stop rule."""
        return () if self.sampler.stop is None else self.sampler.stop.summaries

    def apply(self, decision: Decision, view: View, state: State) -> jax.Array:
        """Returns i32[R,T], the canvas with sampled tokens and fresh noise."""
        if decision.renoise is None:
            return jnp.where(decision.sample, view.stats.sample, state.canvas)
        # The final canvas is the argmax, not the last draws next to the last noise (trap T49).
        draws = jnp.where(view.is_last, view.stats.argmax, view.stats.sample)
        sample, renoise = decision.sample | (view.is_last & view.active), decision.renoise & ~view.is_last
        return jnp.where(renoise, self.noise(state.calls), jnp.where(sample, draws, state.canvas))

    def ending(self, decision: Decision, view: View, state: State, canvas: jax.Array, moving: jax.Array) -> Ending:
        """Returns which rows end their canvas."""
        del decision, moving
        sampler = self.sampler
        block_ends, scores = view.is_last[:, 0], state.scores
        if sampler.stop is not None:
            stopped = sampler.stop.stops(view)
            canvas = jnp.where(stopped[:, None] & view.active, view.stats.argmax, canvas)
            block_ends |= stopped
        if not sampler.process.has_mask:
            # Rows that are done keep the score of their own last step.
            running = state.block < self.blocks.counts
            scores = jnp.where(running, self._input_scores(state.canvas, view), scores)
        # With self-conditioning an unchanged canvas is not a fixed point, because the prediction that is read changes.
        if sampler.exit_tolerance is not None and sampler.update.settles and state.prediction is None:
            block_ends |= settled(
                state.canvas,
                jnp.where(view.active, view.stats.sample, state.canvas),
                view.stats,
                view.active,
                temperature=sampler.decoding.temperature,
                steps_left=view.steps - view.step - 1,
                tolerance=sampler.exit_tolerance,
            )
        return Ending(canvas, block_ends, jnp.zeros_like(block_ends), scores)

    def _input_scores(self, canvas: jax.Array, view: View) -> jax.Array:
        """Returns f32[R], minus the mean cross-entropy of the step's input under the step's output."""
        # The whole window, since every step reads all of it.
        scored = target_mask = self.denoiser.rows.target_mask
        if self.sampler.score_over == "real":
            real = target_mask & ~is_filler(canvas, target_mask, self.denoiser.rows.special)
            # All filler: the mean over no token would be 0, the best score of all.
            scored = jnp.where(jnp.any(real, axis=1, keepdims=True), real, target_mask)
        return mean_over(view.stats.target_log_prob, scored)


def _scores(loop: Loop[CanvasSampler], final: State) -> jax.Array:
    """Returns f32[R], see `CanvasSampler`."""
    sampler = loop.sampler
    if not sampler.process.has_mask:
        return final.scores
    return sampled_scores(loop, final, text_only=sampler.score_over == "real")
