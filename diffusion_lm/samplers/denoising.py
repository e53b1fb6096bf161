"""Parallel decoding by repeated denoising of the target window: AR2Diff's sampler and all of the masked family."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from diffusion_lm.core.alignment import SamePosition
from diffusion_lm.core.errors import require
from diffusion_lm.core.rng import StreamKeys, stream_number
from diffusion_lm.core.types import Batch, Decoded, Trace
from diffusion_lm.nn.named_masks import named_blocks
from diffusion_lm.noise.contract import PROBABILITIES, Contract, kind_of
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
from diffusion_lm.samplers.blockwise import FIRST_BLOCKS, Blocks, seed_slots
from diffusion_lm.samplers.candidates import best_candidate, candidate_keys, start_canvases
from diffusion_lm.samplers.commit import Everything
from diffusion_lm.samplers.proposals import Proposal, blanked
from diffusion_lm.samplers.step import State, Step, commit_scores

END_POLICIES = ("free", "ban", "defer", "stop")


@dataclasses.dataclass(frozen=True)
class DenoisingSampler:
    """Starts from noise and runs the network again and again over the whole canvas; keeps the best of the candidates.

    In each step the network proposes a token for every open slot, `commit` says which slots take theirs (and, for some
    rules, which turn back into noise), and the row's clock advances. A slot is open while it holds MASK; where the
    noise has no MASK, all slots of the block are. A row moves to its next block when its block has used up its steps,
    or has nothing open and a rule that takes nothing back. In the last step of a block all open slots are written, so
    no MASK is left. The target ends at the first EOS or PAD. Target slots may lie anywhere, fixed text between them.

    With the defaults this is the decoder of AR2Diff (arXiv 2401.17181): N = 8 random starts, T = 10
    passes, every target token drawn from softmax(logits / 0.2) in each pass, and the candidate kept whose *last
    input* has the lowest cross-entropy under the *last logits*.

    All of it is one program: candidates, and the unconditional passes of guidance, are rows of the batch, and the
    encoder, if any, runs once. `Decoded.scores` is the kept candidate's mean log-probability per scored token: of the
    last input under the last logits where the noise has no MASK, else of each token when it was written.
    `Decoded.forward_passes` is the number of network calls times `candidates`, twice that with guidance; a decode
    that ends early reports the calls it made.

    Attributes:
      start: the noise whose rate-1 state is the start canvas.
      commit: which open slots take their draw in a step (`samplers.commit`, `samplers.revision`).
      alignment: which hidden state predicts which token.
      steps: network calls for one candidate, spread over the blocks of its window; None = one per target token.
      block: tokens per block, decoded from left to right; 0 = the window is one block. Where the network has blocks
        (`visibility`), smaller ones here are the sub-blocks of Fast-dLLM v2: an order inside the network's block.
      first_block: blocks are counted from the "target" or from the "example"; in the latter case the remainder of the
        prompt is the known part of the first block. A visibility with blocks must count alike.
      cache: `samplers.caching.PrefixCache` or `DualCache`: after a block's first step only a part of each row is read
        again, the keys and values of the rest are kept (Fast-dLLM, arXiv 2505.22618). An approximation, unless the
        visibility hides the block from what is kept. Rows of a batch then enter each block together. None = whole rows.
      seeds: the token with which a block of the network opens is drawn alone, in a step before the rest of its block,
        as `BlockDiffusion.block_start = "seed"` trains it. With as many steps as slots; where steps are fewer, a block
        of one step takes all at once. With a cache, under a visibility without blocks, the sampler's are meant.
      causal_context: for networks trained with `BlockDiffusion.causal_clean`: finished blocks and conditioning see from
        left to right, the network's block that is decoded sees itself and all before it.
      candidates: starts per prompt.
      temperature: of the draws; 0 takes the argmax, and the candidates then differ by their starts only.
      final_temperature: where given, the temperature falls to it linearly over the steps of a block.
      top_k: draw among the k most likely tokens; 0 = all.
      top_p: draw from the smallest set of most likely tokens whose mass reaches p.
      guidance: strength w of classifier-free guidance, logits c + w (c - u), u with the conditioning replaced by noise
        (`samplers.proposals.blanked`). 0 is off and costs nothing.
      self_conditioning: each step reads, at its noisy slots, the embedding that the step before predicted on average,
        at the temperature of the draws (1 where that is 0), without filters; zeros in the first step of a block. None =
        where the network has the layer for it, True = an error where it has not, False = zeros.
      rerank: "model_score", or "none" for the first candidate.
      score_over: the score is the mean over the whole "window", or over "real" tokens: those before the end, and the
        end itself; without a MASK, those that are not PAD in the last input. AR2Diff does not say which; the window
        favours long padding. A candidate that is all PAD is scored over the window in either case, since an empty mean
        would beat every text.
      early_exit: freeze a candidate at a fixed point and stop when all are frozen (`samplers.stopping.settled`). Only
        without a MASK, with a rule that takes nothing back and without predictions that are fed back; other rows end by
        themselves.
      exit_tolerance: bound on the probability that a frozen candidate would have changed after all.
      stop: a rule that ends blocks or rows (`samplers.stopping.StopRule`), or None.
      end: "free" treats EOS and PAD as tokens; "ban" gives them no probability, so that the whole window is text;
        "defer" opens a slot whose draw is one of them only when no other slot is left or the block's last step has
        come; "stop" finishes a row when it holds one of them and everything to its left is committed.
      visibility: "full", or the one that the model was trained under.
      eos_id: ends a target.
      pad_id: ends a target.
      forbidden: ids that are never drawn; MASK of the start noise always is among them.
      keep_trace: return the kept candidate's canvas after each step, before it is cut at the end; every step is then a
        pass, also those that change nothing.
    """

    start: Any = UniformCorruption()
    commit: Any = Everything()
    alignment: Any = SamePosition()
    steps: int | None = 10
    block: int = 0
    first_block: str = "target"
    cache: Any = None
    seeds: bool = False
    causal_context: bool = False
    candidates: int = 8
    temperature: float = 0.2
    final_temperature: float | None = None
    top_k: int = 0
    top_p: float = 1.0
    guidance: float = 0.0
    self_conditioning: bool | None = None
    rerank: str = "model_score"
    score_over: str = "window"
    early_exit: bool = True
    exit_tolerance: float = 0.01
    stop: Any = None
    end: str = "free"
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
                (isinstance(value, int) and value >= 1) or (name == "steps" and value is None),
                f"{name} = {value} must be a whole number of at least 1",
                where=f"DenoisingSampler.{name}",
                fix="AR2Diff decodes with steps = 10, candidates = 8.",
            )
        require(
            isinstance(self.block, int) and self.block >= 0,
            f"block = {self.block} is no number of tokens",
            where="DenoisingSampler.block",
            fix="0 decodes the window as one block.",
        )
        require(
            0 <= self.exit_tolerance < 1,
            f"exit_tolerance = {self.exit_tolerance} is no probability below 1",
            where="DenoisingSampler.exit_tolerance",
            fix="The default is 0.01; early_exit = False runs every step.",
        )
        require(
            self.final_temperature is None or (self.temperature > 0 and self.final_temperature > 0),
            f"the temperature cannot go from {self.temperature} to {self.final_temperature}",
            where="DenoisingSampler.final_temperature",
            fix="Both must be above 0; None keeps the temperature.",
        )
        check_draw(self.temperature, self.top_k, self.top_p, "DenoisingSampler")
        check_choice(self.rerank, ("model_score", "none"), "DenoisingSampler.rerank")
        check_choice(self.score_over, ("window", "real"), "DenoisingSampler.score_over")
        check_choice(self.end, END_POLICIES, "DenoisingSampler.end")
        check_choice(self.first_block, FIRST_BLOCKS, "DenoisingSampler.first_block")
        check_visibility(self.visibility, "DenoisingSampler.visibility")
        require(
            self.mask_id is not None or self.end != "stop",
            "end = 'stop' needs a start canvas of MASK",
            where="DenoisingSampler.start",
            fix="Use AbsorbingCorruption, or end = 'free'.",
        )
        uniform = getattr(self.commit, "needs_uniform_noise", False)
        require(
            self.mask_id is None or not uniform,
            f"{type(self.commit).__name__} undoes uniform noise and the start canvas is MASK",
            where="DenoisingSampler.start",
            fix="Use UniformCorruption, or the rule Ancestral.",
        )
        wanted = self.mask_id if self.commit.noise_kind is None else self.commit.noise.mask_id
        require(
            wanted == self.mask_id,
            f"{type(self.commit).__name__} undoes noise with MASK = {wanted}, and the start canvas has {self.mask_id}",
            where="DenoisingSampler.start",
            fix="Use AbsorbingCorruption with the mask_id of the rule's noise, or UniformCorruption where it has none.",
        )
        plain = self.temperature == 1 and self.final_temperature is None and self.top_k == 0 and self.top_p == 1
        require(
            self.commit.output == PROBABILITIES or plain,
            f"temperature={self.temperature}, final_temperature={self.final_temperature}, top_k={self.top_k}, "
            f"top_p={self.top_p}: {type(self.commit).__name__} reads ratios, for which these are not defined",
            where="DenoisingSampler.temperature",
            fix="Use temperature = 1.0, top_k = 0, top_p = 1.0.",
        )
        require(
            self.temperature > 0 or not getattr(self.commit, "needs_draws", False),
            f"temperature={self.temperature}: {type(self.commit).__name__} draws its tokens",
            where="DenoisingSampler.temperature",
            fix="Use temperature = 1.0.",
        )
        require(
            self.end != "defer" or not self.commit.rewrites,
            f"end = 'defer' opens slots that hold MASK, and {type(self.commit).__name__} writes others too",
            where="DenoisingSampler.end",
            fix="Use end = 'free'.",
        )
        require(
            self.guidance == 0 or not uniform or (self.top_k == 0 and self.top_p == 1),
            "a guided posterior is not defined where top_k or top_p leave one of the two passes without a token",
            where="DenoisingSampler.guidance",
            fix="Use top_k = 0 and top_p = 1.0, or guidance = 0.0.",
        )
        require(
            self.end != "stop" or not self.commit.revises,
            "end = 'stop' would cut off a rule that may still take the end back",
            where="DenoisingSampler.end",
            fix="Use end = 'free' with rules that revise.",
        )
        self._check_blocks()

    def _check_blocks(self) -> None:
        """Raises `ConfigError` where the order of slots does not fit the network's blocks."""
        blocks = named_blocks(self.visibility)
        require(
            blocks is None or blocks.first_block == self.first_block,
            f"the network's blocks ({self.visibility}) and the sampler's ({self.first_block}) are counted differently",
            where="DenoisingSampler.first_block",
            fix="'target' goes with visibility = 'blocks:N', 'example' with 'example_blocks:N'.",
        )
        require(
            self.cache is None or (self.block > 0 and self.mask_id is not None),
            "keys and values are kept from step to step of a block of MASK, and "
            + ("block = 0 has no end" if self.mask_id is not None else "the noise is made of ordinary tokens"),
            where="DenoisingSampler.cache",
            fix="Use block = 32 and AbsorbingCorruption, or cache = None.",
        )
        for name in ("seeds", "causal_context"):
            require(
                blocks is not None or not getattr(self, name) or (name == "seeds" and self.cache is not None),
                f"{name} asks for blocks, and visibility {self.visibility!r} has none",
                where=f"DenoisingSampler.{name}",
                fix="Use visibility = 'blocks:N' or 'example_blocks:N' with the block size of the training.",
            )
        require(
            not self.seeds or (self.mask_id is not None and not self.commit.revises),
            "seeds are drawn once and need a start canvas of MASK and a rule that takes nothing back",
            where="DenoisingSampler.seeds",
            fix="Use AbsorbingCorruption and a rule without revision.",
        )

    @property
    def mask_id(self) -> int | None:
        """MASK of the start noise, or None where it is made of ordinary tokens."""
        return self.start.mask_id if self.start.needs_mask_token else None

    @property
    def contract(self) -> Contract:
        """What it decodes."""
        return Contract(
            noise=self.commit.noise_kind or kind_of(self.mask_id, uniform=False),
            visibility=self.visibility,
            alignment=self.alignment,
            output=self.commit.output,
            causal_context=self.causal_context,
            # With a cache and no blocks of the network, seeds are an order of the sampler's own.
            seeds=self.seeds and named_blocks(self.visibility) is not None,
        )

    @property
    def _never(self) -> tuple[int, ...]:
        """Ids without probability, before any choice is made (traps T35, T47)."""
        banned = (self.eos_id, self.pad_id) if self.end == "ban" else ()
        mask = () if self.mask_id is None else (self.mask_id,)
        return tuple(dict.fromkeys((*self.forbidden, *banned, *mask)))

    def generate(self, model: Model, prompt: Batch, keys: StreamKeys) -> Decoded:
        """Fills the target windows; see `samplers.base.Sampler`."""
        B, C = prompt.tokens.shape[0], self.candidates
        require(
            not self.self_conditioning or model.spec.self_conditioning,
            "the sampler feeds predictions back and the network has no layer that reads them",
            where="DenoisingSampler.self_conditioning",
            fix="Bind TransformerSpec.self_conditioning = True, train with it, or leave this at None.",
        )
        prompt = prompt.replace(tokens=emptied(prompt, self.pad_id))
        blank = None
        if self.guidance != 0:
            blank = blanked(prompt, keys, self.start, self.mask_id, model.spec.vocab_size)
        proposal = Proposal.of(
            model,
            prompt,
            C,
            blank,
            visibility=self.visibility,
            alignment=self.alignment,
            draw={"top_k": self.top_k, "top_p": self.top_p, "forbidden": self._never},
            guidance=self.guidance,
            causal_context=self.causal_context,
            feeds_back=model.spec.self_conditioning and self.self_conditioning is not False,
        )

        def noise(keys: StreamKeys) -> jax.Array:
            return start_canvases(self.start, keys, prompt, C, vocab_size=model.spec.vocab_size)

        def fresh_noise(step: jax.Array) -> jax.Array:
            root = jax.random.fold_in(jax.random.fold_in(keys.root, stream_number("sampler/noise")), step)
            return noise(keys.replace(root=root))

        canvas, target_mask = noise(keys), proposal.rows.target_mask
        blocks = Blocks.of(target_mask, self.block, self.steps, self.first_block)
        step = Step(
            settings=self,
            proposal=proposal,
            blocks=blocks,
            seeds=seed_slots(target_mask, blocks, named_blocks(self.visibility)) if self.seeds else None,
            token_keys=candidate_keys(keys, "sampler/token", prompt, C) if self.temperature > 0 else None,
            rule_keys=candidate_keys(keys, "sampler/rule", prompt, C),
            noise=fresh_noise,
        )
        final = jax.lax.while_loop(
            lambda state: jnp.any(state.block < blocks.counts),
            step,
            State(
                canvas=canvas,
                block=jnp.zeros(B * C, jnp.int32),
                clock=jnp.zeros(B * C, jnp.int32),
                log_prob=jnp.zeros(canvas.shape, jnp.float32),
                scores=jnp.zeros(B * C, jnp.float32),
                turn=jnp.zeros(B * C, jnp.int32),
                calls=jnp.zeros((), jnp.int32),
                prediction=proposal.no_prediction(),
                kept=None if self.cache is None else proposal.nothing_kept(),
                trace=jnp.broadcast_to(canvas, (blocks.most_steps(), *canvas.shape)) if self.keep_trace else None,
            ),
        )
        scores = final.scores if self.mask_id is None else commit_scores(self, final, target_mask)
        best = best_candidate(scores, B) if self.rerank == "model_score" else jnp.arange(B) * C
        tokens = cut_at_end(final.canvas[best], prompt.target_mask, self.eos_id, self.pad_id)
        return Decoded(
            tokens=tokens,
            lengths=target_lengths(tokens, prompt.target_mask, self.eos_id, self.pad_id),
            scores=scores[best],
            forward_passes=jnp.full(B, C * proposal.rows_per_call, jnp.int32) * final.calls,
            trace=Trace(final.trace[:, best]) if self.keep_trace else None,
        )
