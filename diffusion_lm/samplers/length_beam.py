"""The length beam: each prompt is decoded at several lengths, and the best text is returned (arXiv 2308.12219)."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from diffusion_lm.architectures.base import BoundModel
from diffusion_lm.architectures.length_head import length_logits
from diffusion_lm.core.checks import check_choice
from diffusion_lm.core.errors import require
from diffusion_lm.core.rng import StreamKeys
from diffusion_lm.core.types import Batch, Decoded
from diffusion_lm.noise.contract import Contract
from diffusion_lm.samplers.candidates import best_candidate, repeat_rows
from diffusion_lm.samplers.canvas import CanvasSampler
from diffusion_lm.samplers.decoding import Decoding
from diffusion_lm.samplers.masked import MaskedSampler
from diffusion_lm.samplers.window import cut_at_end, target_lengths, without_target

SOURCES = ("head", "window")


@dataclasses.dataclass(frozen=True)
class LengthBeam:
    """Decodes each prompt at its `beam` most likely lengths and returns the text with the highest score of the sampler.

    A candidate of length L has L target slots, then EOS as fixed text (`closing`), and nothing of the rest of the
    window, as in training with a clean EOS and the exact length. All candidates are rows of one batch and share their
    draws slot by slot. A length of 0, whose empty mean would beat every text, is never tried, nor a length that exceeds
    the window. A prompt with fewer such lengths than `beam` tries those.

    `Decoded.scores` is the returned candidate's score under `sampler`: in the masked family, the mean log-probability
    of its tokens. `Decoded.forward_passes` counts those of all candidates, and one for the prompt's lengths.

    Attributes:
      sampler: decodes windows of given lengths. Since the length is given, it should not generate ends
        (`Decoding.forbidden = ("eos", "pad")`).
      beam: number of lengths to try, the papers' "length beam": 10 for task models, 3 for instruction-tuned ones.
      lengths: "head": those that the model's length head finds most likely. "window": the one that fills the prompt's
        window, which the data gives (`target_window.OracleLength` gives the reference's, and results say so).
      closing: EOS follows the text, if the model was trained in this way; it takes the last slot of the window.
      visibility: attention visibility of the pass that predicts the length.
      keep_trace: as in the sampler.
    """

    sampler: MaskedSampler | CanvasSampler = MaskedSampler(decoding=Decoding(forbidden=("eos", "pad")))
    beam: int = 10
    lengths: Literal["head", "window"] = "head"
    closing: bool = True
    visibility: str = "full"
    keep_trace: bool = False

    def __post_init__(self):
        check_choice(self.lengths, SOURCES, "LengthBeam.lengths")
        require(
            isinstance(self.beam, int) and self.beam >= 1 and (self.beam == 1 or self.lengths == "head"),
            f"beam={self.beam} with lengths={self.lengths!r}: must be an integer >= 1, and 1 for 'window'",
            where="LengthBeam.beam",
            fix="Use 1 or more lengths of the head, or 1 if the window gives the length.",
        )

    @property
    def needs_length_head(self) -> bool:
        """Whether the model must have a length head."""
        return self.lengths == "head"

    @property
    def contract(self) -> Contract:
        """That of `sampler`, with EOS given if `closing`."""
        return dataclasses.replace(self.sampler.contract, closed=self.closing)

    def without_early_end(self) -> "LengthBeam":
        """Returns the length beam over a sampler that runs every step."""
        return dataclasses.replace(self, sampler=self.sampler.without_early_end())

    def generate(self, model: BoundModel, prompt: Batch, keys: StreamKeys) -> Decoded:
        """Fills the target windows; see `samplers.sampler.Sampler`."""
        prompt = prompt.replace(tokens=without_target(prompt))
        lengths_BK, possible_BK = self._lengths(model, prompt)
        B, K = lengths_BK.shape
        rows, lengths = repeat_rows(prompt, K), lengths_BK.reshape(-1, 1)
        place = jnp.cumsum(rows.target_mask, axis=1) - 1
        window = rows.target_mask & (place < lengths)
        closing = rows.target_mask & (place == lengths) & self.closing
        # What is left of the window becomes padding: the network must not see the space after the text.
        candidates = rows.replace(
            tokens=jnp.where(closing, prompt.special.eos_id, rows.tokens),
            target_mask=window,
            segment_ids=jnp.where(rows.target_mask & ~window & ~closing, 0, rows.segment_ids),
        )
        sampler = dataclasses.replace(self.sampler, keep_trace=self.keep_trace)
        decoded = sampler.generate(model, candidates, keys)
        # Impossible lengths are decoded too, because shapes are static, and never win.
        best = best_candidate(jnp.where(possible_BK.reshape(-1), decoded.scores, -jnp.inf), B)
        tokens = jnp.where(window | closing, jnp.where(closing, prompt.special.eos_id, decoded.tokens), rows.tokens)[
            best
        ]
        tokens = cut_at_end(tokens, prompt.target_mask, prompt.special)
        passes = jnp.sum(decoded.forward_passes.reshape(B, K), axis=1, dtype=jnp.int32)
        return Decoded(
            tokens=tokens,
            lengths=target_lengths(tokens, prompt.target_mask, prompt.special),
            scores=decoded.scores[best],
            forward_passes=passes + (1 if self.needs_length_head else 0),
            trace=None if decoded.trace is None else jax.tree.map(lambda x: x[:, best], decoded.trace),
        )

    def _lengths(self, model: BoundModel, prompt: Batch) -> tuple[jax.Array, jax.Array]:
        """Returns i32[B,K] lengths, most likely first, and bool[B,K], which of them fit into the row's window."""
        room_B1 = jnp.sum(prompt.target_mask, axis=1, keepdims=True, dtype=jnp.int32) - int(self.closing)
        if self.lengths == "window":
            return jnp.maximum(room_B1, 0), room_B1 > 0
        logits_BC = length_logits(model, prompt, self.visibility)
        number = jnp.arange(logits_BC.shape[1])
        # A text of length 0 would have the mean of no token, the best score of all.
        fits = (number > 0) & (number <= room_B1)
        beam = min(self.beam, logits_BC.shape[1])
        found_BK, lengths_BK = jax.lax.top_k(jnp.where(fits, logits_BC, -jnp.inf), beam)
        possible = jnp.isfinite(found_BK)
        return jnp.where(possible, lengths_BK, 0).astype(jnp.int32), possible
