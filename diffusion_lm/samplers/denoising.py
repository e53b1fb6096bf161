"""Parallel decoding by repeated denoising of the whole target window: the sampler of AR2Diff and its relatives."""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from diffusion_lm.core.alignment import SamePosition
from diffusion_lm.core.errors import require
from diffusion_lm.core.rng import StreamKeys, fold_in_each
from diffusion_lm.core.types import Batch, Decoded, TokenStats, Trace
from diffusion_lm.nn.masks import named_visibility
from diffusion_lm.noise.corruption import UniformCorruption
from diffusion_lm.samplers.base import (
    Model,
    check_choice,
    check_draw,
    check_visibility,
    cut_at_end,
    emptied,
    target_lengths,
)
from diffusion_lm.samplers.candidates import best_candidate, candidate_keys, repeat_rows, row_indices, start_canvases
from diffusion_lm.samplers.proposals import ResampleAll
from diffusion_lm.samplers.stopping import settled


@flax.struct.dataclass
class _State:
    canvas: jax.Array  # i32[B*C,T]
    settled: jax.Array  # bool[B*C]
    scores: jax.Array  # f32[B*C]
    step: jax.Array  # i32[], network calls made
    trace: Any  # i32[steps,B*C,T]


@dataclasses.dataclass(frozen=True)
class DenoisingSampler:
    """Starts from noise, redraws target tokens for `steps` passes, keeps the best of several candidates.

    With the defaults this is the decoder of AR2Diff (arXiv 2401.17181): N = 8 random starts, T = 10
    passes, every target token drawn from softmax(logits / 0.2) in each pass, and the candidate kept whose *last
    input* has the lowest cross-entropy under the *last logits*. The target ends at the first EOS or PAD.

    Candidates are rows of the batch, so all of it is one program; the encoder, if any, runs once per prompt.
    `Decoded.scores` is the kept candidate's mean log-probability per scored token. `Decoded.forward_passes` is the
    number of network calls times `candidates`; a decode that settles early reports the calls it made.

    Attributes:
      start: the noise whose rate-1 state is the start canvas.
      proposal: which target tokens take their draw in a step.
      alignment: which hidden state predicts which token.
      steps: most network calls for one candidate.
      candidates: starts per prompt.
      temperature: of the draws; 0 takes the argmax, and the candidates then differ by their starts only.
      top_k: draw among the k most likely tokens; 0 = all.
      top_p: draw from the smallest set of most likely tokens whose mass reaches p.
      rerank: "model_score", or "none" for the first candidate.
      score_over: the score is the mean over the whole "window", or over "real" tokens, those that are not PAD in the
        last input. The paper does not say which; the window favours long padding. A candidate that is all PAD is scored
        over the window in either case, since an empty mean would beat every text.
      early_exit: freeze a candidate at a fixed point and stop when all are frozen (`samplers.stopping.settled`).
      exit_tolerance: bound on the probability that a frozen candidate would have changed after all.
      visibility: "full", or the one that the model was trained under.
      eos_id: ends a target.
      pad_id: ends a target.
      forbidden: ids that are never drawn.
      keep_trace: return the kept candidate's canvas after each pass, before it is cut at the end.
    """

    start: Any = UniformCorruption()
    proposal: Any = ResampleAll()
    alignment: Any = SamePosition()
    steps: int = 10
    candidates: int = 8
    temperature: float = 0.2
    top_k: int = 0
    top_p: float = 1.0
    rerank: str = "model_score"
    score_over: str = "window"
    early_exit: bool = True
    exit_tolerance: float = 0.01
    visibility: str = "full"
    eos_id: int = 1
    pad_id: int = 0
    forbidden: tuple[int, ...] = ()
    keep_trace: bool = False

    def __post_init__(self):
        object.__setattr__(self, "forbidden", tuple(self.forbidden))
        for name in ("steps", "candidates"):
            value = getattr(self, name)
            require(
                isinstance(value, int) and value >= 1,
                f"{name} = {value} must be a whole number of at least 1",
                where=f"DenoisingSampler.{name}",
                fix="AR2Diff decodes with steps = 10, candidates = 8.",
            )
        require(
            0 <= self.exit_tolerance < 1,
            f"exit_tolerance = {self.exit_tolerance} is no probability below 1",
            where="DenoisingSampler.exit_tolerance",
            fix="The default is 0.01; early_exit = False runs every step.",
        )
        check_draw(self.temperature, self.top_k, self.top_p, "DenoisingSampler")
        check_choice(self.rerank, ("model_score", "none"), "DenoisingSampler.rerank")
        check_choice(self.score_over, ("window", "real"), "DenoisingSampler.score_over")
        check_visibility(self.visibility, "DenoisingSampler.visibility")

    def generate(self, model: Model, prompt: Batch, keys: StreamKeys) -> Decoded:
        """Fills the target windows; see `samplers.base.Sampler`."""
        B, C = prompt.tokens.shape[0], self.candidates
        prompt = prompt.replace(tokens=emptied(prompt, self.pad_id))
        encoder = None
        if prompt.encoder is not None:
            encoder = model.encode(prompt.encoder).take_rows(row_indices(B, C))
        canvas = start_canvases(self.start, keys, prompt, C, vocab_size=model.spec.vocab_size)
        token_keys = candidate_keys(keys, "sampler/token", prompt, C) if self.temperature > 0 else None
        rows = repeat_rows(prompt.replace(encoder=None), C)

        def body(state: _State) -> _State:
            hidden = model(
                state.canvas,
                visibility=named_visibility(self.visibility, rows.target_mask),
                positions=rows.positions,
                segment_ids=rows.segment_ids,
                encoder=encoder,
            )
            stats = self._stats(model, hidden, rows.target_mask, state.canvas, token_keys, state.step)
            proposed = self.proposal.propose(state.canvas, stats, rows.target_mask)
            canvas = jnp.where(state.settled[:, None], state.canvas, proposed)
            scores = jnp.where(state.settled, state.scores, self._scores(state.canvas, stats, rows.target_mask))
            step, done = state.step + 1, state.settled
            if self.early_exit:
                done = done | settled(
                    state.canvas,
                    proposed,
                    stats,
                    rows.target_mask,
                    temperature=self.temperature,
                    steps_left=self.steps - step,
                    tolerance=self.exit_tolerance,
                )
            trace = None
            if self.keep_trace:
                later = jnp.arange(self.steps)[:, None, None] >= state.step
                trace = jnp.where(later, canvas[None], state.trace)
            return _State(canvas, done, scores, step, trace)

        def unfinished(state: _State) -> jax.Array:
            return (state.step < self.steps) & ~jnp.all(state.settled)

        final = jax.lax.while_loop(
            unfinished,
            body,
            _State(
                canvas=canvas,
                settled=~jnp.any(rows.target_mask, axis=1),
                scores=jnp.zeros(B * C, jnp.float32),
                step=jnp.zeros((), jnp.int32),
                trace=jnp.broadcast_to(canvas, (self.steps, *canvas.shape)) if self.keep_trace else None,
            ),
        )
        best = best_candidate(final.scores, B) if self.rerank == "model_score" else jnp.arange(B) * C
        tokens = cut_at_end(final.canvas[best], prompt.target_mask, self.eos_id, self.pad_id)
        return Decoded(
            tokens=tokens,
            lengths=target_lengths(tokens, prompt.target_mask, self.eos_id, self.pad_id),
            scores=final.scores[best],
            forward_passes=jnp.full(B, C, jnp.int32) * final.step,
            trace=Trace(final.trace[:, best]) if self.keep_trace else None,
        )

    def _stats(
        self,
        model: Model,
        hidden: Any,
        target_mask: jax.Array,
        canvas: jax.Array,
        token_keys: jax.Array | None,
        step: jax.Array,
    ) -> TokenStats:
        """Returns this step's draws, and the log-probability of the canvas, at the tokens they speak about."""
        keys_BT = None
        if token_keys is not None:
            keys_BT = fold_in_each(token_keys, jnp.broadcast_to(step, token_keys.shape))
        stats = model.token_stats(
            hidden,
            where=self.alignment.to_slots(target_mask),
            keys_BT=None if keys_BT is None else self.alignment.to_slots(keys_BT),
            score=self.alignment.to_slots(canvas),
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            forbidden=self.forbidden,
        )
        return jax.tree.map(self.alignment.to_tokens, stats)

    def _scores(self, canvas: jax.Array, stats: TokenStats, target_mask: jax.Array) -> jax.Array:
        """Returns f32[B*C], minus the mean cross-entropy of the step's input under the step's output."""
        scored = target_mask
        if self.score_over == "real":
            real = target_mask & (canvas != self.pad_id)
            scored = jnp.where(jnp.any(real, axis=1, keepdims=True), real, target_mask)
        total = jnp.sum(jnp.where(scored, stats.target_log_prob, 0.0), axis=1)
        return total / jnp.maximum(jnp.sum(scored, axis=1), 1)
