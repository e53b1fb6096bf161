"""What the network proposes for the tokens of a canvas: the forward pass, guidance, and the draws."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from diffusion_lm.core.rng import StreamKeys, stream_number
from diffusion_lm.core.types import Batch, TokenStats
from diffusion_lm.nn.cross_entropy import Noised, Ratios
from diffusion_lm.nn.masks import Causal, Queries, Visibility
from diffusion_lm.nn.named_masks import named_blocks, named_visibility
from diffusion_lm.nn.time_conditioning import time_input
from diffusion_lm.noise.corruption import Corruption
from diffusion_lm.samplers.base import Model
from diffusion_lm.samplers.blockwise import unfinished_slots
from diffusion_lm.samplers.caching import Feed, Kept
from diffusion_lm.samplers.candidates import repeat_rows, row_indices


@dataclasses.dataclass(frozen=True)
class Proposal:
    """The forward passes and draws of one decode.

    With `blank`, classifier-free guidance: each call also runs the canvas with its conditioning, that of the encoder
    included, replaced by noise, as rows of the same call. Logits become c + guidance (c - u). (LLaDA and SMDM, arXiv
    2410.18514, write u + (w + 1)(c - u), the same number with w = guidance; D-CFG, 2412.10193, writes gamma c +
    (1 - gamma) u, the same with gamma = 1 + guidance.)

    Attributes:
      model: the network.
      rows: the prompts, one row per candidate, without encoder.
      encoder: the encoder's state for the rows of a call, or None.
      visibility: name of the visibility.
      causal_context: finished blocks and conditioning see as in a causal model, and `visibility`, which names blocks,
        holds for the block that is decoded (networks trained with `BlockDiffusion.causal_clean`).
      alignment: which hidden state predicts which token.
      draw: `temperature` (where it is constant), `top_k`, `top_p` and `forbidden` of `BoundModel.token_stats`.
      blank: i32[R,T], the conditioning of the unconditional pass, or None without guidance.
      guidance: strength.
      feeds_back: whether calls read the prediction of the call before, and draws return it. Under guidance each pass
        reads its own, so that nothing of the conditioning reaches the unconditional one.
    """

    model: Model
    rows: Batch
    encoder: Any
    visibility: str
    alignment: Any
    draw: dict[str, Any]
    blank: jax.Array | None = None
    guidance: float = 0.0
    causal_context: bool = False
    feeds_back: bool = False

    @classmethod
    def of(cls, model: Model, prompt: Batch, candidates: int, blank: Batch | None, **fields) -> "Proposal":
        """Returns the proposal for `candidates` rows per prompt; runs the encoder, once per prompt.

        `blank` is the prompt with noise for conditioning (`blanked`), or None without guidance.
        """
        encoder = None
        if prompt.encoder is not None:
            indices, inputs = row_indices(prompt.tokens.shape[0], candidates), prompt.encoder
            if blank is not None:
                inputs = _joined(inputs, blank.encoder)
                indices = jnp.concatenate([indices, indices + prompt.tokens.shape[0]])
            encoder = model.encode(inputs).take_rows(indices)
        rows = repeat_rows(prompt.replace(encoder=None), candidates)
        tokens = None if blank is None else repeat_rows(blank.tokens, candidates)
        return cls(model, rows, encoder, blank=tokens, **fields)

    @property
    def rows_per_call(self) -> int:
        """Rows of the network's batch that one row of the canvas costs."""
        return 1 if self.blank is None else 2

    def no_prediction(self) -> jax.Array | None:
        """Returns what the first call reads for a prediction: zeros [R,T,P,D] for P passes, or None."""
        if not self.feeds_back:
            return None
        spec = self.model.spec
        return jnp.zeros((*self.rows.tokens.shape, self.rows_per_call, spec.model_dim), spec.compute_dtype)

    def nothing_kept(self) -> Kept:
        """Returns the empty cache of the rows of a call."""
        R, T = self.rows.tokens.shape
        return Kept.nothing(self.model.init_cache(R * self.rows_per_call, T), R)

    def run(
        self,
        canvas: jax.Array,
        active: jax.Array,
        prediction: jax.Array | None = None,
        rate: jax.Array | None = None,
        feed: Feed | None = None,
    ) -> tuple[Any, Any]:
        """Runs one network call.

        Args:
          canvas: i32[R,T].
          active: bool[R,T], the slots that are being decoded.
          prediction: [R,T,P,D], what the draws of the call before returned as `expected`, or None.
          rate: f32[R,T], how much noise the target slots hold, of which a network that reads a time is told.
          feed: the slots to read, where a cache holds the others; None reads all.

        Returns:
          The hidden states, with the cache of all rows of the call if there is one, and the unconditional ones (or
          None).
        """
        rows, tokens = self.rows, canvas
        time = time_input(self.model.spec, rate, rows.target_mask)
        if self.blank is not None:
            tokens = jnp.concatenate([canvas, jnp.where(rows.target_mask, canvas, self.blank)])
            rows, active, time = _joined(rows, rows), _joined(active, active), _joined(time, time)
        if prediction is not None:
            prediction = jnp.concatenate(jnp.unstack(prediction, axis=2))
        inputs = {
            "visibility": self._visibility(rows.target_mask, active),
            "segment_ids": rows.segment_ids,
            "encoder": self.encoder,
        }
        if feed is None:
            hidden = self.model(tokens, positions=rows.positions, self_condition=prediction, time=time, **inputs)
        else:
            hidden = feed.run(self.model, tokens, {"self_condition": prediction, "time": time}, **inputs)
        if self.blank is None:
            return hidden, None
        R = canvas.shape[0]
        return (
            hidden.replace(values_BTD=hidden.values_BTD[:R]),
            hidden.replace(values_BTD=hidden.values_BTD[R:], cache=None),
        )

    def _visibility(self, target_mask: jax.Array, active: jax.Array) -> Visibility:
        seen = named_visibility(self.visibility, target_mask)
        blocks = named_blocks(self.visibility)
        if not self.causal_context or blocks is None:
            return seen
        return Causal() | (seen & Queries(unfinished_slots(target_mask, active, blocks)))

    def stats(
        self,
        passes: tuple[Any, Any],
        where: jax.Array,
        keys: jax.Array | None,
        score: jax.Array,
        *,
        temperature: float | jax.Array,
        summaries: tuple[str, ...],
        transition: Noised | Ratios | None = None,
    ) -> TokenStats:
        """Returns the draws at the tokens `where` (bool[R,T]), and the log-probability of the tokens `score` there.

        `transition` says what a step makes of the logits, and has its values at the tokens, too; None draws from them.
        """
        hidden, unconditional = passes
        moved = jax.tree.map(self.alignment.to_slots, transition)
        stats = self.model.token_stats(
            hidden,
            where=self.alignment.to_slots(where),
            keys_BT=None if keys is None else self.alignment.to_slots(keys),
            score=self.alignment.to_slots(score),
            temperature=temperature,
            summaries=summaries,
            unconditional=unconditional,
            guidance=self.guidance,
            noised=moved if isinstance(moved, Noised) else None,
            ratios=moved if isinstance(moved, Ratios) else None,
            expected=self.feeds_back,
            **self.draw,
        )
        return jax.tree.map(self.alignment.to_tokens, stats)


def blanked(prompt: Batch, keys: StreamKeys, start: Corruption, mask_id: int | None, vocab_size: int) -> Batch:
    """Returns the prompt with conditioning that says nothing: MASK, or random tokens behind the opening one.

    The random ones are those of `start` at rate 1, drawn once a prompt, so that calls on one canvas agree.
    """
    if mask_id is not None:
        encoder = prompt.encoder
        if encoder is not None:
            unseen = jnp.where(encoder.segment_ids > 0, mask_id, encoder.tokens)
            encoder = dataclasses.replace(encoder, tokens=unseen)
        visible = prompt.segment_ids > 0
        return prompt.replace(tokens=jnp.where(visible, mask_id, prompt.tokens), encoder=encoder)

    def noisy(stream: str, tokens, positions, replaced):
        own = keys.replace(root=jax.random.fold_in(keys.root, stream_number(stream)))
        ids = jnp.broadcast_to(prompt.row_ids[:, None], tokens.shape)
        like = Batch(
            tokens, replaced, replaced.astype(jnp.float32), replaced.astype(jnp.int32), positions, ids, prompt.special
        )
        return start.corrupt(own, like, jnp.ones(tokens.shape, jnp.float32), vocab_size=vocab_size).tokens

    conditioning = (prompt.segment_ids > 0) & (prompt.positions > 0)
    tokens = noisy("sampler/blank", prompt.tokens, prompt.positions, conditioning)
    encoder = prompt.encoder
    if encoder is not None:
        source = noisy("sampler/blank/encoder", encoder.tokens, encoder.positions, encoder.segment_ids > 0)
        encoder = dataclasses.replace(encoder, tokens=source)
    return prompt.replace(tokens=tokens, encoder=encoder)


def _joined(first, second):
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), first, second)
