"""Windows of a known length: several lengths tried side by side, the best text kept (arXiv 2308.12219)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from diffusion_lm.architectures.length_head import length_logits
from diffusion_lm.core.errors import require
from diffusion_lm.core.rng import StreamKeys
from diffusion_lm.core.types import Batch, Decoded
from diffusion_lm.noise.contract import Contract
from diffusion_lm.samplers.base import Model, check_choice, cut_at_end, emptied, target_lengths
from diffusion_lm.samplers.candidates import best_candidate, repeat_rows
from diffusion_lm.samplers.denoising import DenoisingSampler

SOURCES = ("head", "window")


@dataclasses.dataclass(frozen=True)
class LengthBeam:
    """Decodes each prompt at its `beam` most likely lengths and keeps the text with the highest score of the sampler.

    A candidate of length L sees L open slots, EOS behind them as fixed text (`closing`), and nothing of the window
    beyond: as in training with a clean EOS and the exact length. All candidates are rows of one batch and share their
    draws slot by slot. A length of 0, whose empty mean would beat every text, is never tried, nor one that the
    window has no room for; a prompt with fewer lengths left than `beam` tries those.

    `Decoded.scores` is the kept candidate's score under `sampler`, for the masked family the mean log-probability of
    its tokens. `Decoded.forward_passes` counts those of all candidates, and one for the prompt's lengths.

    Attributes:
      sampler: decodes windows of given lengths. Its `end` should be "ban", since the length is given.
      beam: lengths to try, the papers' "length beam": 10 for task models, 3 for instruction-tuned ones.
      lengths: "head": those that the model's length head finds most likely. "window": the one that fills the prompt's
        window, which the data gives (`target_window.OracleLength` gives the reference's, and results say so).
      closing: EOS stands behind the text, where the model was trained so; its slot is the window's last.
      eos_id: ends a target.
      pad_id: ends a target.
      visibility: under which the network reads the prompt for its length.
      keep_trace: as the sampler's.
    """

    sampler: Any = DenoisingSampler()
    beam: int = 10
    lengths: str = "head"
    closing: bool = True
    eos_id: int = 1
    pad_id: int = 0
    visibility: str = "full"
    keep_trace: bool = False

    def __post_init__(self):
        check_choice(self.lengths, SOURCES, "LengthBeam.lengths")
        require(
            isinstance(self.beam, int) and self.beam >= 1 and (self.beam == 1 or self.lengths == "head"),
            f"beam = {self.beam} with lengths = {self.lengths!r} is impossible",
            where="LengthBeam.beam",
            fix="Use 1 or more lengths of the head, and 1 where the window gives the length.",
        )

    @property
    def needs_length_head(self) -> bool:
        """Whether the model must have a length head."""
        return self.lengths == "head"

    @property
    def contract(self) -> Contract:
        """That of `sampler`, with EOS given where there is a `closing`."""
        return dataclasses.replace(self.sampler.contract, closed=self.closing)

    def generate(self, model: Model, prompt: Batch, keys: StreamKeys) -> Decoded:
        """Fills the target windows; see `samplers.base.Sampler`."""
        prompt = prompt.replace(tokens=emptied(prompt, self.pad_id))
        lengths_BK, possible_BK = self._lengths(model, prompt)
        B, K = lengths_BK.shape
        rows, lengths = repeat_rows(prompt, K), lengths_BK.reshape(-1, 1)
        place = jnp.cumsum(rows.target_mask, axis=1) - 1
        window = rows.target_mask & (place < lengths)
        closing = rows.target_mask & (place == lengths) & self.closing
        candidates = rows.replace(
            tokens=jnp.where(closing, self.eos_id, rows.tokens),
            target_mask=window,
            segment_ids=jnp.where(rows.target_mask & ~window & ~closing, 0, rows.segment_ids),
        )
        sampler = dataclasses.replace(self.sampler, keep_trace=self.keep_trace)
        decoded = sampler.generate(model, candidates, keys)
        best = best_candidate(jnp.where(possible_BK.reshape(-1), decoded.scores, -jnp.inf), B)
        tokens = jnp.where(window | closing, jnp.where(closing, self.eos_id, decoded.tokens), rows.tokens)[best]
        tokens = cut_at_end(tokens, prompt.target_mask, self.eos_id, self.pad_id)
        passes = jnp.sum(decoded.forward_passes.reshape(B, K), axis=1, dtype=jnp.int32)
        return Decoded(
            tokens=tokens,
            lengths=target_lengths(tokens, prompt.target_mask, self.eos_id, self.pad_id),
            scores=decoded.scores[best],
            forward_passes=passes + (1 if self.needs_length_head else 0),
            trace=None if decoded.trace is None else jax.tree.map(lambda x: x[:, best], decoded.trace),
        )

    def _lengths(self, model: Model, prompt: Batch) -> tuple[jax.Array, jax.Array]:
        """Returns i32[B,K] lengths, likeliest first, and bool[B,K], which of them a row's window has room for."""
        room_B1 = jnp.sum(prompt.target_mask, axis=1, keepdims=True, dtype=jnp.int32) - int(self.closing)
        if self.lengths == "window":
            return jnp.maximum(room_B1, 0), room_B1 > 0
        logits_BC = length_logits(model, prompt, self.visibility)
        number = jnp.arange(logits_BC.shape[1])
        fits = (number > 0) & (number <= room_B1)
        beam = min(self.beam, logits_BC.shape[1])
        found_BK, lengths_BK = jax.lax.top_k(jnp.where(fits, logits_BC, -jnp.inf), beam)
        possible = jnp.isfinite(found_BK)
        return jnp.where(possible, lengths_BK, 0).astype(jnp.int32), possible
