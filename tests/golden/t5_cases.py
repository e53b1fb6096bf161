"""Small encoder-decoders of the T5 family, awkward on purpose. Nothing here needs torch until `build` is called."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from diffusion_lm.architectures.base import BoundModel
from diffusion_lm.core.types import EncoderInputs
from diffusion_lm.interop.huggingface import Imported
from diffusion_lm.nn.masks import Causal

VOCAB, SOURCE, TARGET = 43, 17, 14

_T5 = dict(
    vocab_size=VOCAB,
    d_model=16,
    d_kv=6,
    d_ff=24,
    num_layers=2,
    num_decoder_layers=3,
    num_heads=4,
    relative_attention_num_buckets=8,
    relative_attention_max_distance=10,
    decoder_start_token_id=0,
)
_UNTIED = _T5 | {"tie_word_embeddings": False, "feed_forward_proj": "gated-gelu"}

GOLDEN: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": ("T5", _T5),
    "t5_1_1": ("T5", _UNTIED | {"num_heads": 3, "layer_norm_epsilon": 1e-3}),
    "mt5": ("MT5", _UNTIED | {"vocab_size": 47, "d_kv": 3, "num_decoder_layers": 2}),
    "umt5": ("UMT5", _T5 | {"feed_forward_proj": "gated-gelu", "num_heads": 3, "num_layers": 3}),
}
"""Class prefix in transformers and config; those that have a fixture in the repository."""

LIVE: dict[str, tuple[str, dict[str, Any]]] = {
    "byt5": ("T5", _UNTIED | {"vocab_size": 384, "num_layers": 3, "num_decoder_layers": 1}),
    "t5_silu": ("T5", _UNTIED | {"feed_forward_proj": "gated-silu"}),
    "t5_gelu": ("T5", _T5 | {"feed_forward_proj": "gelu"}),
    "t5_tied_gated": ("T5", _T5 | {"feed_forward_proj": "gated-gelu", "d_kv": 4}),
    "t5_large_buckets": ("T5", _T5 | {"relative_attention_num_buckets": 32, "relative_attention_max_distance": 128}),
    "umt5_relu": ("UMT5", _T5 | {"feed_forward_proj": "relu", "relative_attention_max_distance": 20}),
    "mt5_relu": ("MT5", _UNTIED | {"feed_forward_proj": "relu"}),
}
"""More shapes, compared where transformers is installed."""


def build(name: str) -> Any:
    """Returns the torch model of a case, its weights random and of a size at which every part counts."""
    import torch
    import transformers

    prefix, fields = (GOLDEN | LIVE)[name]
    config = getattr(transformers, f"{prefix}Config")(**fields)
    model = getattr(transformers, f"{prefix}ForConditionalGeneration")(config).eval()
    if not fields.get("tie_word_embeddings", True):
        # transformers 5 ties every T5 that it makes, and unties those whose files hold two tables.
        model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.shared.weight))
        model.all_tied_weights_keys.pop("lm_head.weight")
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    with torch.no_grad():
        for path, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if "relative_attention_bias" in path or "shared" in path:
                weight.copy_(noise)
            elif weight.ndim == 2:
                weight.copy_(noise * (1.2 / weight.shape[1] ** 0.5))
            else:
                weight.copy_(1.0 + 0.2 * noise)
    return model


def inputs() -> dict[str, np.ndarray]:
    """Returns source and target ids and the masks of real tokens: row 1 is padded right and row 2 left."""
    random = np.random.default_rng(0)
    arrays = {}
    for stream, length in (("source", SOURCE), ("target", TARGET)):
        mask = np.ones((3, length), np.int32)
        mask[1, -5:] = 0
        mask[2, :4] = 0
        ids = random.integers(2, VOCAB, mask.shape).astype(np.int32)
        arrays |= {stream: np.where(mask == 1, ids, 0).astype(np.int32), f"{stream}_mask": mask}
    return arrays


def reference(model: Any, arrays: dict[str, np.ndarray]) -> np.ndarray:
    """Returns the torch model's logits [3,TARGET,V]."""
    import torch

    given = {name: torch.tensor(array).long() for name, array in arrays.items()}
    with torch.no_grad():
        out = model(
            input_ids=given["source"],
            attention_mask=given["source_mask"],
            decoder_input_ids=given["target"],
            decoder_attention_mask=given["target_mask"],
        )
    return out.logits.float().numpy()


def our_logits(imported: Imported, arrays: dict[str, np.ndarray], scored: slice = slice(None)) -> np.ndarray:
    """Returns our logits [.,TARGET,V] of the rows in `scored`."""

    def stream(name: str) -> tuple[Any, Any, Any]:
        ids, mask = arrays[name][scored], arrays[f"{name}_mask"][scored]
        positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
        return jnp.asarray(ids), jnp.asarray(mask), jnp.asarray(positions, jnp.int32)

    model = BoundModel(imported.architecture, imported.params)
    tokens, segment_ids, positions = stream("target")
    hidden = model(
        tokens,
        visibility=Causal(),
        positions=positions,
        segment_ids=segment_ids,
        encoder=EncoderInputs(*stream("source")),
    )
    return np.asarray(model.logits(hidden))
