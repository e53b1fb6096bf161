"""Self-conditioning: a pass reads the prediction of the pass before it (Analog Bits, arXiv 2208.04202)."""

import jax

from diffusion_lm.architectures.base import BoundModel, Hidden
from diffusion_lm.core.alignment import Alignment
from diffusion_lm.core.rng import StreamKeys
from diffusion_lm.core.types import Batch

STREAM = "self_conditioning"


def predicted_embedding(
    model: BoundModel,
    hidden: Hidden,
    alignment: Alignment,
    batch: Batch,
    noisy_BT: jax.Array,
    keys: StreamKeys,
    probability: float,
    *,
    forbidden: tuple[int, ...] = (),
) -> jax.Array:
    """Returns [B,T,D], the mean embedding of each noisy token under the model's prediction; no gradient flows through.

    Args:
      model: the network.
      hidden: of the first pass.
      alignment: which state predicts which token.
      batch: the clean batch.
      noisy_BT: bool[B,T], the slots that may hold noise.
      keys: decide by example which ones read the prediction.
      probability: with which an example reads it; the others read zeros.
      forbidden: ids that get no probability.
    """
    read = noisy_BT & (keys.example_uniform(STREAM, batch.example_ids) < probability)
    stats = model.token_stats(hidden, where=alignment.to_slots(read), forbidden=forbidden, expected=True)
    assert stats.expected is not None
    return jax.lax.stop_gradient(alignment.to_tokens(stats.expected)[:, :, 0])
