"""Small networks of every family, awkward on purpose. Nothing here needs torch until `build` is called."""

import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np

from diffusion_lm.architectures.base import BoundModel
from diffusion_lm.interop.huggingface import Imported
from diffusion_lm.nn.masks import Causal, Full

FOLDER = pathlib.Path(__file__).parent / "huggingface"
TOLERANCE = 2e-4
VOCAB, LENGTH = 43, 14

_DECODER = dict(
    vocab_size=VOCAB,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    pad_token_id=None,
    bos_token_id=1,
    eos_token_id=2,
)
_ENCODER = dict(
    vocab_size=VOCAB,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=20,
    pad_token_id=1,
)
_GPT2 = dict(vocab_size=VOCAB, n_positions=20, n_embd=16, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
_YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16}

_GEMMA = _DECODER | {"head_dim": 6, "sliding_window": 4, "query_pre_attn_scalar": 9, "tie_word_embeddings": True}
_LOCAL = ["sliding_attention", "full_attention", "sliding_attention"]
_GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "rope_theta": 300.0, "factor": 2.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
}

_MODERN = _ENCODER | {
    "num_hidden_layers": 4,
    "max_position_embeddings": 64,
    "local_attention": 4,
    "pad_token_id": 3,
    **dict.fromkeys(("bos_token_id", "cls_token_id"), 1),
    **dict.fromkeys(("eos_token_id", "sep_token_id"), 2),
    "rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 300.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
    },
}

GOLDEN: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", _GPT2),
    "llama": ("Llama", _DECODER),
    "llama3_biases_tied": (
        "Llama",
        _DECODER | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "rope_parameters": _LLAMA3},
    ),
    "llama_yarn": ("Llama", _DECODER | {"head_dim": 6, "rope_parameters": _YARN}),
    "mistral_window": ("Mistral", _DECODER | {"sliding_window": 5}),
    "qwen2_some_windows": (
        "Qwen2",
        _DECODER | {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", _DECODER | {"head_dim": 6, "tie_word_embeddings": True}),
    "gemma2": ("Gemma2", _GEMMA | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma3": ("Gemma3", _GEMMA | {"rope_parameters": _GEMMA3_ROPE, "num_hidden_layers": 3, "layer_types": _LOCAL}),
    "bert": ("Bert", _ENCODER | {"pad_token_id": 0}),
    "roberta": ("Roberta", _ENCODER),
    "xlm_roberta_xl": ("XLMRobertaXL", _ENCODER),
    "modernbert": ("ModernBert", _MODERN),
}
"""Class prefix in transformers and config; those that have a fixture in the repository."""

LIVE: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2_untied_exact_gelu": ("GPT2", _GPT2 | {"tie_word_embeddings": False, "activation_function": "gelu"}),
    "gpt2_unscaled": ("GPT2", _GPT2 | {"scale_attn_weights": False, "n_inner": 40, "layer_norm_epsilon": 1e-3}),
    "llama_one_kv_head": ("Llama", _DECODER | {"num_key_value_heads": 1, "rms_norm_eps": 1e-2}),
    "llama_own_kv_heads": ("Llama", _DECODER | {"num_key_value_heads": 4}),
    "llama_linear": (
        "Llama",
        _DECODER | {"rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 3.0}},
    ),
    "llama_dynamic": (
        "Llama",
        _DECODER | {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 3.0}},
    ),
    "llama_yarn_mscale": (
        "Llama",
        _DECODER
        | {
            "rope_parameters": _YARN
            | {"mscale": 1.0, "mscale_all_dim": 0.5, "truncate": False, "beta_fast": 4.0, "beta_slow": 0.5}
        },
    ),
    "llama_wide_heads": ("Llama", _DECODER | {"head_dim": 10}),
    "mistral_no_window": ("Mistral", _DECODER | {"sliding_window": None, "head_dim": 6}),
    "qwen2_tied": ("Qwen2", _DECODER | {"tie_word_embeddings": True}),
    "qwen3_biases": ("Qwen3", _DECODER | {"attention_bias": True, "head_dim": 10}),
    "gemma": ("Gemma", _DECODER | {"head_dim": 6, "tie_word_embeddings": True}),
    "gemma2_no_caps": (
        "Gemma2",
        _GEMMA | {"attn_logit_softcapping": None, "final_logit_softcapping": None, "attention_bias": True},
    ),
    "gemma3_defaults": (
        "Gemma3",
        _DECODER | {"num_hidden_layers": 7, "sliding_window": 3, "tie_word_embeddings": True},
    ),
    "xlm_roberta": ("XLMRoberta", _ENCODER | {"type_vocab_size": 1, "layer_norm_eps": 1e-3}),
    "roberta_other_pad": ("Roberta", _ENCODER | {"pad_token_id": 3}),
    "roberta_relu": ("Roberta", _ENCODER | {"hidden_act": "relu"}),
    "modernbert_biases": (
        "ModernBert",
        _MODERN
        | {"attention_bias": True, "mlp_bias": True, "classifier_bias": True, "decoder_bias": False, "norm_eps": 1e-3},
    ),
    "modernbert_untied_all_local": (
        "ModernBert",
        _MODERN | {"tie_word_embeddings": False, "layer_types": ["sliding_attention"] * 4, "local_attention": 6},
    ),
    "modernbert_tanh_no_window": (
        "ModernBert",
        _MODERN
        | {
            "layer_types": ["full_attention"] * 4,
            "hidden_activation": "gelu_new",
            "classifier_activation": "gelu_new",
        },
    ),
}
"""More shapes, compared where transformers is installed."""

_HEADS = {"GPT2": "LMHeadModel"} | dict.fromkeys(
    ("Bert", "Roberta", "XLMRoberta", "XLMRobertaXL", "ModernBert"), "ForMaskedLM"
)
_CONFIGS = {"Gemma3": "Gemma3TextConfig"}


def build(name: str, **changes: Any) -> Any:
    """Returns the torch model of a case, its weights random and of a size at which every part counts.

    Args:
      name: of the case.
      changes: of its config.
    """
    import torch
    import transformers

    prefix, fields = (GOLDEN | LIVE)[name]
    config = getattr(transformers, _CONFIGS.get(prefix, f"{prefix}Config"))(**(fields | changes))
    model = getattr(transformers, prefix + _HEADS.get(prefix, "ForCausalLM"))(config).eval()
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    ones = () if prefix.startswith("Gemma") else ("norm.weight", "layernorm.weight", "ln_")
    with torch.no_grad():
        for path, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim == 2:
                weight.copy_(noise * (0.5 if "embed" in path or "wte" in path else 1.5 / weight.shape[1] ** 0.5))
            else:
                weight.copy_(0.2 * noise + (1.0 if any(word in path.lower() for word in ones) else 0.0))
    return model


def inputs(pad_id: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Returns ids and the mask of real tokens: three rows; with `pad_id` one is padded right and one left."""
    ids = np.random.default_rng(0).integers(4, VOCAB, (3, LENGTH)).astype(np.int32)
    mask = np.ones_like(ids)
    if pad_id is not None:
        mask[1, -5:] = 0
        mask[2, :4] = 0
        ids = np.where(mask == 1, ids, pad_id).astype(np.int32)
    return ids, mask


def reference(model: Any, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Returns the torch model's logits."""
    import torch

    with torch.no_grad():
        out = model(input_ids=torch.tensor(ids).long(), attention_mask=torch.tensor(mask).long())
    return out.logits.float().numpy()


def our_logits(
    imported: Imported, ids: np.ndarray, mask: np.ndarray, positions: np.ndarray | None = None
) -> np.ndarray:
    """Returns our logits; positions count the real tokens, as the pipeline lays rows out, unless they are given.

    BERT alone counts the padding too; its rows are compared at the positions that transformers gives them.
    """
    if positions is None and imported.family == "bert":
        positions = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
    elif positions is None:
        positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    model = BoundModel(imported.architecture, imported.params)
    hidden = model(
        jnp.asarray(ids),
        visibility=Causal() if imported.causal else Full(),
        positions=jnp.asarray(positions, jnp.int32),
        segment_ids=jnp.asarray(mask, jnp.int32),
    )
    return np.asarray(model.logits(hidden))


def difference(ours: np.ndarray, theirs: np.ndarray, mask: np.ndarray) -> float:
    """Returns the largest difference at real tokens."""
    return float(np.abs(ours - theirs)[mask == 1].max())
