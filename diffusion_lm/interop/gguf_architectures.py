"""Translates GGUF architectures to Hugging Face: names of tensors, order of rows, metadata to config.json.

llama.cpp's converter changes the weights of the Hugging Face checkpoint in three ways, which are undone here. It
permutes the rows of LLaMA's queries and keys so that the two entries that RoPE rotates are adjacent, it adds 1 to
Gemma's norm weights, and it transposes GPT-2's matrices.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from diffusion_lm.core.errors import ConfigError, near_names
from diffusion_lm.interop.gguf_metadata import Metadata
from diffusion_lm.interop.name_maps.family import shown
from diffusion_lm.nn.rope import Llama3Rope, base_frequencies

_LAYER, _SELF, _MLP = "model.layers.{i}.", "model.layers.{i}.self_attn.", "model.layers.{i}.mlp."

_DECODER = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    _LAYER + "input_layernorm": "blk.{i}.attn_norm",
    _SELF + "q_proj": "blk.{i}.attn_q",
    _SELF + "k_proj": "blk.{i}.attn_k",
    _SELF + "v_proj": "blk.{i}.attn_v",
    _SELF + "o_proj": "blk.{i}.attn_output",
    _SELF + "q_norm": "blk.{i}.attn_q_norm",
    _SELF + "k_norm": "blk.{i}.attn_k_norm",
    _LAYER + "post_attention_layernorm": "blk.{i}.ffn_norm",
    _MLP + "gate_proj": "blk.{i}.ffn_gate",
    _MLP + "up_proj": "blk.{i}.ffn_up",
    _MLP + "down_proj": "blk.{i}.ffn_down",
}
_BOTH_NORMS = _DECODER | {
    _LAYER + "post_attention_layernorm": "blk.{i}.post_attention_norm",
    _LAYER + "pre_feedforward_layernorm": "blk.{i}.ffn_norm",
    _LAYER + "post_feedforward_layernorm": "blk.{i}.post_ffw_norm",
}
_H = "transformer.h.{i}."
_GPT2 = {
    "transformer.wte": "token_embd",
    "transformer.wpe": "position_embd",
    "transformer.ln_f": "output_norm",
    "lm_head": "output",
    _H + "ln_1": "blk.{i}.attn_norm",
    _H + "attn.c_attn": "blk.{i}.attn_qkv",
    _H + "attn.c_proj": "blk.{i}.attn_output",
    _H + "ln_2": "blk.{i}.ffn_norm",
    _H + "mlp.c_fc": "blk.{i}.ffn_up",
    _H + "mlp.c_proj": "blk.{i}.ffn_down",
}

ROPE_FACTORS = "rope_freqs.weight"
"""Divisors of the RoPE frequencies in files of LLaMA 3.1 and later. The metadata do not describe the scaling."""


@dataclasses.dataclass(frozen=True)
class GgufArchitecture:
    """One architecture of GGUF files.

    Attributes:
      name: value of `general.architecture`.
      names: from a module of the Hugging Face checkpoint to that of the file; `{i}` is the number of the layer.
      config: from the metadata to the contents of a config.json.
      interleaved: whether the rows of queries and keys are in rotated pairs, (0, E/2, 1, E/2 + 1, ...) of each head.
      norms_from_zero: whether the norm weights of the Hugging Face checkpoint are those of the file minus 1.
      transposed: modules whose matrices are transposed in the Hugging Face checkpoint.
    """

    name: str
    names: Mapping[str, str]
    config: Callable[[Metadata], dict[str, object]]
    interleaved: bool = False
    norms_from_zero: bool = False
    transposed: tuple[str, ...] = ()


def _decoder(data: Metadata) -> dict[str, Any]:
    """Returns the config keys that all decoders with RoPE share."""
    heads, width = data.need("attention.head_count"), data.need("embedding_length")
    head_dim = data.get("attention.key_length", width // heads)
    data.same("attention.value_length", head_dim)
    data.same("rope.dimension_count", head_dim)
    return dict(
        vocab_size=data.vocab_size,
        num_hidden_layers=data.need("block_count"),
        hidden_size=width,
        intermediate_size=data.need("feed_forward_length"),
        num_attention_heads=heads,
        num_key_value_heads=data.one("attention.head_count_kv", heads),
        head_dim=head_dim,
        rms_norm_eps=data.need("attention.layer_norm_rms_epsilon"),
        max_position_embeddings=data.need("context_length"),
        tie_word_embeddings=not data.has_tensor("output.weight"),
        rope_parameters=_rope(data, data.get("rope.freq_base", 10000.0), head_dim),
        attention_bias=data.has_tensor("blk.0.attn_q.bias"),
    )


def _rope(data: Metadata, theta: float, head_dim: int) -> dict[str, Any]:
    kind = data.get("rope.scaling.type", "none")
    if kind == "none":
        scaling = {"rope_type": "default"} if data.rope_factors is None else _llama3(data, theta, head_dim)
        return {"rope_theta": theta, **scaling}
    found = {
        "factor": data.get("rope.scaling.factor"),
        "original_max_position_embeddings": data.get("rope.scaling.original_context_length"),
        "attention_factor": data.get("rope.scaling.attn_factor"),
        "beta_fast": data.get("rope.scaling.yarn_beta_fast"),
        "beta_slow": data.get("rope.scaling.yarn_beta_slow"),
    }
    return {"rope_type": kind, "rope_theta": theta} | {
        name: value for name, value in found.items() if value is not None
    }


def _llama3(data: Metadata, theta: float, head_dim: int) -> dict[str, Any]:
    """Returns LLaMA 3's RoPE scaling, recovered from the divisors in the file.

    The divisors determine `factor` (the largest one). The other parameters are those of the published models; divisors
    that these parameters do not give are refused.
    """
    factors = np.asarray(data.rope_factors, np.float64)
    # The largest divisor is the factor, up to the rounding to float32.
    scaling = Llama3Rope(float(f"{factors.max():.6g}"), 8192, low_freq_factor=1.0, high_freq_factor=4.0)
    expected = np.asarray(base_frequencies(head_dim, theta)) / np.asarray(scaling.frequencies(head_dim, theta))
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-3):
        raise ConfigError(
            f"tensor {ROPE_FACTORS!r} holds RoPE factors other than those of LLaMA 3",
            where=data.file,
            fix="Import the Hugging Face checkpoint, whose config.json describes the scaling.",
        )
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "original_max_position_embeddings": scaling.original_max_positions,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
    }


def _llama(data: Metadata) -> dict[str, Any]:
    fields = _decoder(data) | {"mlp_bias": data.has_tensor("blk.0.ffn_up.bias")}
    fields["num_local_experts"] = data.get("expert_count", 0)
    window = data.get("attention.sliding_window")
    if window is None:
        return fields | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    return fields | {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": window}


def _qwen2(data: Metadata) -> dict[str, Any]:
    return _decoder(data) | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}


def _qwen3(data: Metadata) -> dict[str, Any]:
    return _decoder(data) | {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}


def _gemma(data: Metadata) -> dict[str, Any]:
    own = {"model_type": "gemma", "architectures": ["GemmaForCausalLM"], "hidden_activation": "gelu_pytorch_tanh"}
    return _decoder(data) | own


def _gemma2(data: Metadata) -> dict[str, Any]:
    return _decoder(data) | dict(
        model_type="gemma2",
        architectures=["Gemma2ForCausalLM"],
        hidden_activation="gelu_pytorch_tanh",
        query_pre_attn_scalar=_query_scale(data, largest=46),
        attn_logit_softcapping=data.get("attn_logit_softcapping"),
        final_logit_softcapping=data.get("final_logit_softcapping"),
        sliding_window=data.need("attention.sliding_window"),
    )


def _gemma3(data: Metadata) -> dict[str, Any]:
    fields = _decoder(data)
    window_rope = {"rope_type": "default", "rope_theta": data.get("rope.freq_base_swa", 10000.0)}
    pattern = data.get("attention.sliding_window_pattern", 6)
    layers = range(fields["num_hidden_layers"])
    windowed = pattern if isinstance(pattern, list) else [(layer + 1) % pattern != 0 for layer in layers]
    return fields | dict(
        model_type="gemma3_text",
        architectures=["Gemma3ForCausalLM"],
        hidden_activation="gelu_pytorch_tanh",
        query_pre_attn_scalar=_query_scale(data, largest=62),
        final_logit_softcapping=data.get("final_logit_softcapping"),
        sliding_window=data.need("attention.sliding_window"),
        layer_types=["sliding_attention" if has_window else "full_attention" for has_window in windowed],
        rope_parameters={"full_attention": fields["rope_parameters"], "sliding_attention": window_rope},
    )


def _query_scale(data: Metadata, largest: int) -> float:
    """Returns `query_pre_attn_scalar`, whose square root divides the attention scores of Gemma 2 and 3.

    The file does not hold it. As in llama.cpp, the number of layers identifies the 27B models, which divide by the
    width per head; all others divide by the head size.
    """
    heads, width = data.need("attention.head_count"), data.need("embedding_length")
    per_head = width // heads
    return per_head if data.need("block_count") == largest else data.get("attention.key_length", per_head)


def _gpt2(data: Metadata) -> dict[str, Any]:
    return dict(
        model_type="gpt2",
        architectures=["GPT2LMHeadModel"],
        vocab_size=data.vocab_size,
        n_layer=data.need("block_count"),
        n_embd=data.need("embedding_length"),
        n_head=data.need("attention.head_count"),
        n_inner=data.need("feed_forward_length"),
        n_positions=data.need("context_length"),
        layer_norm_epsilon=data.need("attention.layer_norm_epsilon"),
        activation_function="gelu_new",
        tie_word_embeddings=not data.has_tensor("output.weight"),
    )


ARCHITECTURES = {
    one.name: one
    for one in (
        GgufArchitecture("llama", _DECODER, _llama, interleaved=True),
        GgufArchitecture("qwen2", _DECODER, _qwen2),
        GgufArchitecture("qwen3", _DECODER, _qwen3),
        GgufArchitecture("gemma", _DECODER, _gemma, norms_from_zero=True),
        GgufArchitecture("gemma2", _BOTH_NORMS, _gemma2, norms_from_zero=True),
        GgufArchitecture("gemma3", _BOTH_NORMS, _gemma3, norms_from_zero=True),
        GgufArchitecture("gpt2", _GPT2, _gpt2, transposed=("c_attn", "c_proj", "c_fc")),
    )
}
"""The supported architectures, by `general.architecture`."""


def architecture_of(name: str, file: str) -> GgufArchitecture:
    """Returns the architecture of this name.

    Raises:
      ConfigError: it is not supported.
    """
    if "moe" in name:
        raise ConfigError(
            f"general.architecture = {shown(name)} is a mixture of experts, which is not supported",
            where=file,
            fix="Use a dense checkpoint.",
        )
    if name not in ARCHITECTURES:
        raise ConfigError(
            f"general.architecture = {shown(name)} is not supported{near_names(name, ARCHITECTURES)}",
            where=file,
            fix=f"GGUF files can be {', '.join(ARCHITECTURES)}; import other families from their Hugging Face folders.",
        )
    return ARCHITECTURES[name]
