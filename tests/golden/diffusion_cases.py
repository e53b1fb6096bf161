"""Small diffusion checkpoints under the names of the published ones. Nothing here needs torch until `build` is called.

transformers has no classes for these models. The reference is the autoregressive model that they have the shape of,
with its causal mask replaced; what its tensors are called in the published files is written down here by hand, apart
from the tables of the package.
"""

import dataclasses
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from huggingface_cases import LENGTH, VOCAB

from diffusion_lm.architectures.base import BoundModel
from diffusion_lm.interop.huggingface import Imported
from diffusion_lm.nn.masks import Block, Full

FOLDER = pathlib.Path(__file__).parent / "diffusion"
TOLERANCE = 2e-4
MASK, BLOCK = 40, 4

_SHAPE = dict(
    vocab_size=VOCAB,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    rope_parameters={"rope_type": "default", "rope_theta": 500.0},
)
_GPT2 = dict(vocab_size=VOCAB, n_positions=20, n_embd=16, n_layer=2, n_head=4, bos_token_id=2, eos_token_id=2)
_TOKENS = {"mask_token_id": MASK, "pad_token_id": 2, "eos_token_id": 2}

# The fields of GSAI-ML/LLaDA-8B-Base's config.json, at this size.
_LLADA = _TOKENS | {
    "model_type": "llada",
    "architectures": ["LLaDAModelLM"],
    "auto_map": {"AutoModel": "modeling_llada.LLaDAModelLM"},
    "activation_type": "silu",
    "alibi": False,
    "attention_dropout": 0.0,
    "attention_layer_norm": False,
    "attention_layer_norm_with_affine": True,
    "bias_for_layer_norm": False,
    "block_group_size": 1,
    "block_type": "llama",
    "d_model": 16,
    "embedding_dropout": 0.0,
    "embedding_size": VOCAB,
    "flash_attention": False,
    "include_bias": False,
    "include_qkv_bias": False,
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "max_sequence_length": 64,
    "mlp_hidden_size": 24,
    "mlp_ratio": 4,
    "multi_query_attention": None,
    "n_heads": 4,
    "n_kv_heads": 2,
    "n_layers": 2,
    "rms_norm_eps": 1e-6,
    "rope": True,
    "rope_full_precision": True,
    "rope_theta": 500.0,
    "scale_logits": False,
    "vocab_size": VOCAB,
    "weight_tying": False,
}
_LLADA_NAMES = {
    r"model\.embed_tokens\.": "model.transformer.wte.",
    r"model\.norm\.": "model.transformer.ln_f.",
    r"lm_head\.": "model.transformer.ff_out.",
    r"model\.layers\.(\d+)\.input_layernorm": r"model.transformer.blocks.\1.attn_norm",
    r"model\.layers\.(\d+)\.post_attention_layernorm": r"model.transformer.blocks.\1.ff_norm",
    r"model\.layers\.(\d+)\.self_attn\.o_proj": r"model.transformer.blocks.\1.attn_out",
    r"model\.layers\.(\d+)\.self_attn\.": r"model.transformer.blocks.\1.",
    r"model\.layers\.(\d+)\.mlp\.gate_proj": r"model.transformer.blocks.\1.ff_proj",
    r"model\.layers\.(\d+)\.mlp\.down_proj": r"model.transformer.blocks.\1.ff_out",
    r"model\.layers\.(\d+)\.mlp\.up_proj": r"model.transformer.blocks.\1.up_proj",
}
_DENOISER_NAMES = {r"model\.embed_tokens\.": "embed_tokens.", r"model\.": "denoise_model."}


@dataclasses.dataclass(frozen=True)
class Case:
    """One small checkpoint.

    Attributes:
      base: class prefix in transformers of the model with its shape.
      shape: that model's config.
      names: (regular expression, replacement) of the published names.
      config: what config.json says instead of the base model's; `whole` = all that it says.
      whole: whether nothing of the base model's config.json remains.
      family: what it must be recognised as.
      shifted: which state predicts which token.
      block: tokens of a block, or None.
      mask: MASK.
    """

    base: str
    shape: Mapping[str, Any]
    names: Mapping[str, str]
    config: Mapping[str, Any]
    family: str
    shifted: bool
    whole: bool = False
    block: int | None = None
    mask: int | None = MASK


CASES: dict[str, Case] = {
    "diffugpt": Case(
        "GPT2",
        _GPT2,
        {r"transformer\.wte\.": "embed_tokens.", r"transformer\.": "denoise_model."},
        # As published: GPT-2's config, which does not know of the row for MASK.
        {"vocab_size": VOCAB - 1, "mask_token_id": MASK},
        "diffugpt",
        True,
    ),
    "diffullama_denoiser": Case("Llama", _SHAPE, _DENOISER_NAMES, _TOKENS, "diffullama", True),
    "llada": Case("Llama", _SHAPE, _LLADA_NAMES, _LLADA, "llada", False, whole=True),
    "llada_tied_biases": Case(
        "Qwen2",
        _SHAPE | {"tie_word_embeddings": True},
        _LLADA_NAMES,
        _LLADA | {"weight_tying": True, "include_qkv_bias": True, "vocab_size": VOCAB - 3},
        "llada",
        False,
        whole=True,
    ),
    "dream": Case(
        "Qwen2",
        _SHAPE,
        {},
        _TOKENS
        | {"model_type": "Dream", "architectures": ["DreamModel"], "auto_map": {"AutoModel": "modeling_dream.X"}},
        "dream",
        True,
    ),
    "sdar": Case(
        "Qwen3",
        _SHAPE | {"head_dim": 6, "tie_word_embeddings": True},
        {},
        _TOKENS | {"model_type": "sdar", "architectures": ["SDARForCausalLM"], "block_size": BLOCK},
        "sdar",
        False,
        block=BLOCK,
    ),
    "fast_dllm_v2": Case(
        "Qwen2",
        _SHAPE,
        {},
        _TOKENS | {"model_type": "Fast_dLLM_Qwen", "architectures": ["Fast_dLLM_QwenForCausalLM"], "bd_size": BLOCK},
        "fast-dllm-v2",
        True,
        block=BLOCK,
    ),
}


def build(name: str) -> Any:
    """Returns the torch model that a case has the shape of, with random weights at which every part counts."""
    import torch
    import transformers

    case = CASES[name]
    config = getattr(transformers, f"{case.base}Config")(**case.shape)
    head = "LMHeadModel" if case.base == "GPT2" else "ForCausalLM"
    model = getattr(transformers, case.base + head)._from_config(config, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    with torch.no_grad():
        for path, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            scale = 0.5 if "embed" in path or "wte" in path else 1.5 / weight.shape[-1] ** 0.5
            normed = weight.ndim == 1 and path.endswith("weight")
            weight.copy_(noise * scale if weight.ndim == 2 else 0.2 * noise + float(normed))
    return model


def tensors(name: str, model: Any) -> dict[str, np.ndarray]:
    """Returns the tensors of the checkpoint under their published names; tied ones once."""
    tied = model.config.tie_word_embeddings
    found = {}
    for path, weight in model.named_parameters():
        if path == "lm_head.weight" and tied:
            continue
        for pattern, new in CASES[name].names.items():
            renamed = re.sub(f"^{pattern}", new, path)
            if renamed != path:
                path = renamed
                break
        found[path] = weight.detach().numpy().copy()
    return found


def config(name: str, model: Any) -> dict[str, Any]:
    """Returns the contents of config.json."""
    case = CASES[name]
    base = model.config.to_dict() | {"architectures": [type(model).__name__]}
    return dict(case.config) if case.whole else base | dict(case.config)


def ids() -> np.ndarray:
    """Returns i32[3, LENGTH] tokens, some of them MASK."""
    generator = np.random.default_rng(1)
    tokens = generator.integers(3, VOCAB - 4, (3, LENGTH))
    return np.where(generator.random(tokens.shape) < 0.4, MASK, tokens).astype(np.int32)


def seen(block: int | None) -> np.ndarray:
    """Returns bool[LENGTH, LENGTH]: which key each query sees, everything or its own block and those before it."""
    slots = np.arange(LENGTH)
    return np.ones((LENGTH, LENGTH), bool) if block is None else slots[:, None] // block >= slots[None] // block


def reference(model: Any, tokens: np.ndarray, visible: np.ndarray) -> np.ndarray:
    """Returns the torch model's logits under a mask of its attention."""
    import torch

    bias = torch.where(torch.tensor(visible), 0.0, torch.finfo(torch.float32).min)
    with torch.no_grad():
        out = model(
            input_ids=torch.tensor(tokens).long(),
            attention_mask=bias.expand(len(tokens), 1, *visible.shape),
            use_cache=False,
        )
    return out.logits.float().numpy()


def our_logits(imported: Imported, tokens: np.ndarray) -> np.ndarray:
    """Returns our logits under the visibility that the import says."""
    assert imported.diffusion is not None
    block = imported.diffusion.block_size
    model = BoundModel(imported.architecture, imported.params)
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    hidden = model(
        jnp.asarray(tokens),
        visibility=Full() if block is None else Block(block),
        positions=jnp.asarray(positions, jnp.int32),
        segment_ids=jnp.ones_like(tokens),
    )
    return np.asarray(model.logits(hidden))
