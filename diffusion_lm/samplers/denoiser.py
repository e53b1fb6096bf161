"""The forward passes and draws of one decode, with classifier-free guidance and self-conditioning."""

import dataclasses
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from diffusion_lm.architectures.base import BoundModel, EncoderState, Hidden
from diffusion_lm.core.alignment import Alignment
from diffusion_lm.core.rng import StreamKeys, stream_number
from diffusion_lm.core.types import Batch, TokenStats
from diffusion_lm.nn.cross_entropy import Noised, Ratios
from diffusion_lm.nn.masks import Causal, Queries, Visibility
from diffusion_lm.nn.named_masks import named_blocks, named_visibility
from diffusion_lm.nn.time_conditioning import time_input
from diffusion_lm.noise.process import NoiseProcess, prior
from diffusion_lm.samplers.blocks import unfinished_slots
from diffusion_lm.samplers.caching import CachedPass, CacheState
from diffusion_lm.samplers.candidates import repeat_rows, row_indices
from diffusion_lm.samplers.decoding import Decoding

Tree = TypeVar("Tree")


class Passes(NamedTuple):
    """The hidden states of one call.

    Attributes:
      conditional: with the KV cache of all rows of the call, if there is one.
      unconditional: those without the conditioning; None without guidance.
    """

    conditional: Hidden
    unconditional: Hidden | None


@dataclasses.dataclass(frozen=True)
class Denoiser:
    """The network as a function of the canvas, for R rows of candidates.

    With `blank`, classifier-free guidance: each call also runs the canvas with its conditioning, that of the encoder
    included, replaced by noise, as further rows of the same call. Logits become c + guidance (c - u). (LLaDA and SMDM,
    arXiv 2410.18514, write u + (w + 1)(c - u), the same with w = guidance; D-CFG, 2412.10193, writes gamma c +
    (1 - gamma) u, the same with gamma = 1 + guidance.)

    Attributes:
      model: the network.
      rows: the prompts, one row per candidate, without encoder inputs.
      encoder: the encoder's state for the rows of a call, or None.
      visibility: name of the visibility.
      causal_context: finished blocks and conditioning are causal, and `visibility`, which names blocks, holds for the
        block that is decoded (networks trained with `BlockDiffusion.causal_clean`).
      alignment: which hidden state predicts which token.
      decoding: the settings of the draws; the temperature is given with each call.
      blank: i32[R,T], the conditioning of the unconditional pass, or None without guidance.
      guidance: strength of the guidance.
      feeds_back: whether calls read the prediction of the call before (self-conditioning). With guidance each pass
        reads its own, so that nothing of the conditioning reaches the unconditional one.
    """

    model: BoundModel
    rows: Batch
    encoder: EncoderState | None
    visibility: str
    alignment: Alignment
    decoding: Decoding
    blank: jax.Array | None = None
    guidance: float = 0.0
    causal_context: bool = False
    feeds_back: bool = False

    @classmethod
    def of(
        cls,
        model: BoundModel,
        prompt: Batch,
        blank: Batch | None,
        *,
        candidates: int,
        visibility: str,
        alignment: Alignment,
        decoding: Decoding,
        guidance: float,
        causal_context: bool,
        feeds_back: bool,
    ) -> "Denoiser":
        """Returns the denoiser for `candidates` rows per prompt; runs the encoder, once per prompt.

        `blank` is the prompt with noise as conditioning (`blank_conditioning`), or None without guidance.
        """
        encoder = None
        if prompt.encoder is not None:
            indices, inputs = row_indices(prompt.tokens.shape[0], candidates), prompt.encoder
            if blank is not None:
                assert blank.encoder is not None
                inputs = _concatenated(inputs, blank.encoder)
                # The second half of the rows reads the blank source.
                indices = jnp.concatenate([indices, indices + prompt.tokens.shape[0]])
            encoder = model.encode(inputs).take_rows(indices)
        return cls(
            model=model,
            rows=repeat_rows(prompt.replace(encoder=None), candidates),
            encoder=encoder,
            visibility=visibility,
            alignment=alignment,
            decoding=decoding,
            blank=None if blank is None else repeat_rows(blank.tokens, candidates),
            guidance=guidance,
            causal_context=causal_context,
            feeds_back=feeds_back,
        )

    @property
    def rows_per_call(self) -> int:
        """Rows of the network's batch per row of the canvas."""
        return 1 if self.blank is None else 2

    def no_prediction(self) -> jax.Array | None:
        """Returns the prediction that the first call reads: zeros [R,T,P,D] for P passes; None without feedback."""
        if not self.feeds_back:
            return None
        spec = self.model.spec
        return jnp.zeros((*self.rows.tokens.shape, self.rows_per_call, spec.model_dim), spec.compute_dtype)

    def empty_cache(self) -> CacheState:
        """Returns the empty cache of the rows of a call."""
        R, T = self.rows.tokens.shape
        return CacheState.empty(self.model.init_cache(R * self.rows_per_call, T), R)

    def run(
        self,
        canvas: jax.Array,
        active: jax.Array,
        prediction: jax.Array | None = None,
        rate: jax.Array | None = None,
        cached: CachedPass | None = None,
    ) -> Passes:
        """Runs one call of the network.

        Args:
          canvas: i32[R,T].
          active: bool[R,T], the slots that are being decoded.
          prediction: [R,T,P,D], the `expected` statistic of the call before, or None.
          rate: f32[R,T], the noise rate of the target slots, the input of time-conditioned networks.
          cached: the slots to run if a cache holds the others; None runs all.
        """
        rows, tokens = self.rows, canvas
        # None for networks without a time input.
        time = time_input(self.model.spec, rate, rows.target_mask)
        if self.blank is not None:
            tokens = jnp.concatenate([canvas, jnp.where(rows.target_mask, canvas, self.blank)])
            rows, active, time = _concatenated(rows, rows), _concatenated(active, active), _concatenated(time, time)
        if prediction is not None:
            # [R,T,P,D] -> [P R,T,D]: each pass reads its own prediction.
            prediction = jnp.concatenate(jnp.unstack(prediction, axis=2))
        visibility = self._visibility(rows.target_mask, active)
        if cached is None:
            hidden = self.model(
                tokens,
                visibility=visibility,
                positions=rows.positions,
                segment_ids=rows.segment_ids,
                encoder=self.encoder,
                self_condition=prediction,
                time=time,
            )
        else:
            hidden = cached.run(
                self.model,
                tokens,
                self_condition=prediction,
                time=time,
                visibility=visibility,
                segment_ids=rows.segment_ids,
                encoder=self.encoder,
            )
        if self.blank is None:
            return Passes(hidden, None)
        R = canvas.shape[0]
        return Passes(
            dataclasses.replace(hidden, values_BTD=hidden.values_BTD[:R]),
            dataclasses.replace(hidden, values_BTD=hidden.values_BTD[R:], cache=None),
        )

    def _visibility(self, target_mask: jax.Array, active: jax.Array) -> Visibility:
        visibility = named_visibility(self.visibility, target_mask)
        blocks = named_blocks(self.visibility)
        if not self.causal_context or blocks is None:
            return visibility
        return Causal() | (visibility & Queries(unfinished_slots(target_mask, active, blocks)))

    def stats(
        self,
        passes: Passes,
        where: jax.Array,
        keys: jax.Array | None,
        score: jax.Array,
        *,
        temperature: float | jax.Array,
        summaries: tuple[str, ...],
        transition: Noised | Ratios | None = None,
    ) -> TokenStats:
        """Returns the draws at the tokens `where` (bool[R,T]), and the log-probability of the tokens `score` there.

        `transition` says what a step makes of the logits, per token; None draws from the prediction.
        """
        # Hidden states are per slot, all other arrays per token: move them to the slots that predict the tokens.
        to_slots = self.alignment.to_slots
        at_slots = jax.tree.map(to_slots, transition)
        stats = self.model.token_stats(
            passes.conditional,
            where=to_slots(where),
            keys_BT=None if keys is None else to_slots(keys),
            score=to_slots(score),
            temperature=temperature,
            top_k=self.decoding.top_k,
            top_p=self.decoding.top_p,
            forbidden=self.decoding.never_drawn(self.rows.special),
            summaries=summaries,
            unconditional=passes.unconditional,
            guidance=self.guidance,
            noised=at_slots if isinstance(at_slots, Noised) else None,
            ratios=at_slots if isinstance(at_slots, Ratios) else None,
            expected=self.feeds_back,
        )
        return jax.tree.map(self.alignment.to_tokens, stats)


def blank_conditioning(process: NoiseProcess, prompt: Batch, keys: StreamKeys, vocab_size: int) -> Batch:
    """Returns the prompt with conditioning that carries no information: MASK, or random tokens after the first one.

    The random tokens are a draw of z_1, one per prompt, so that all calls of a decode agree.
    """
    if process.has_mask:
        mask_id, encoder = prompt.special.mask, prompt.encoder
        if encoder is not None:
            encoder = dataclasses.replace(encoder, tokens=jnp.where(encoder.segment_ids > 0, mask_id, encoder.tokens))
        return prompt.replace(tokens=jnp.where(prompt.segment_ids > 0, mask_id, prompt.tokens), encoder=encoder)

    def random(stream: str, tokens: jax.Array, positions: jax.Array, replaced: jax.Array) -> jax.Array:
        own = keys.replace(root=jax.random.fold_in(keys.root, stream_number(stream)))
        ids = jnp.broadcast_to(prompt.row_ids[:, None], tokens.shape)
        # A batch in which the conditioning is the target, since only targets are corrupted.
        batch = Batch(
            tokens, replaced, replaced.astype(jnp.float32), replaced.astype(jnp.int32), positions, ids, prompt.special
        )
        return prior(process, own, batch, vocab_size=vocab_size)

    conditioning = (prompt.segment_ids > 0) & (prompt.positions > 0)
    tokens = random("sampler/blank", prompt.tokens, prompt.positions, conditioning)
    encoder = prompt.encoder
    if encoder is not None:
        source = random("sampler/blank/encoder", encoder.tokens, encoder.positions, encoder.segment_ids > 0)
        encoder = dataclasses.replace(encoder, tokens=source)
    return prompt.replace(tokens=tokens, encoder=encoder)


def _concatenated(first: Tree, second: Tree) -> Tree:
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), first, second)
