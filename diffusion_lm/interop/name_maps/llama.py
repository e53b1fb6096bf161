"""LLaMA 1 to 3, SmolLM and Mistral, and what Qwen and Gemma share with them: weights, config keys, windows."""

from collections.abc import Callable
from typing import Any

from diffusion_lm.core.errors import ConfigError
from diffusion_lm.interop.name_maps.config_keys import (
    BOOL,
    COUNT,
    INTEGER,
    LAYERS,
    NUMBER,
    POSITIVE,
    STRING,
    STRINGS,
    config_keys,
    never,
    one,
)
from diffusion_lm.interop.name_maps.family import (
    HEADS_BIAS,
    HEADS_IN,
    HEADS_OUT,
    TRANSPOSE,
    VOCABULARY,
    CheckpointConfig,
    Family,
    SpecFields,
    Weight,
    shown,
)
from diffusion_lm.interop.name_maps.rope_keys import ROPE_KEYS, rope_fields
from diffusion_lm.nn.rope import DynamicRope, LinearRope, Llama3Rope, YarnRope
from diffusion_lm.nn.transformer import TransformerSpec

# Whether a layer of this type has a sliding window; early files write "attention" for full attention.
_LAYER_TYPES = {"full_attention": False, "attention": False, "sliding_attention": True}
_ATTENTION, _MLP = "model.layers.{i}.self_attn.", "model.layers.{i}.mlp."

WEIGHTS = (
    Weight("embed/tokens", "model.embed_tokens.weight", VOCABULARY),
    Weight("blocks/attention_norm/scale", "model.layers.{i}.input_layernorm.weight"),
    Weight("blocks/attention/query", _ATTENTION + "q_proj.weight", HEADS_OUT),
    Weight("blocks/attention/key", _ATTENTION + "k_proj.weight", HEADS_OUT),
    Weight("blocks/attention/value", _ATTENTION + "v_proj.weight", HEADS_OUT),
    Weight("blocks/attention/output", _ATTENTION + "o_proj.weight", HEADS_IN),
    Weight("blocks/attention/query_bias", _ATTENTION + "q_proj.bias", HEADS_BIAS),
    Weight("blocks/attention/key_bias", _ATTENTION + "k_proj.bias", HEADS_BIAS),
    Weight("blocks/attention/value_bias", _ATTENTION + "v_proj.bias", HEADS_BIAS),
    Weight("blocks/attention/output_bias", _ATTENTION + "o_proj.bias"),
    Weight("blocks/attention/query_norm/scale", _ATTENTION + "q_norm.weight"),
    Weight("blocks/attention/key_norm/scale", _ATTENTION + "k_norm.weight"),
    Weight("blocks/mlp_norm/scale", "model.layers.{i}.post_attention_layernorm.weight"),
    Weight("blocks/mlp/gate", _MLP + "gate_proj.weight", TRANSPOSE),
    Weight("blocks/mlp/up", _MLP + "up_proj.weight", TRANSPOSE),
    Weight("blocks/mlp/down", _MLP + "down_proj.weight", TRANSPOSE),
    Weight("blocks/mlp/gate_bias", _MLP + "gate_proj.bias"),
    Weight("blocks/mlp/up_bias", _MLP + "up_proj.bias"),
    Weight("blocks/mlp/down_bias", _MLP + "down_proj.bias"),
    Weight("final_norm/scale", "model.norm.weight"),
    Weight("head/tokens", "lm_head.weight", VOCABULARY),
)
TIED = (("lm_head.weight", "model.embed_tokens.weight"),)
# Frequencies of RoPE that older versions of transformers saved as buffers.
IGNORED_TENSORS = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", r"model\.rotary_emb\.inv_freq")


def _all_full(value: object) -> bool:
    return isinstance(value, list) and all(kind in ("full_attention", "attention") for kind in value)


LAYER_TYPE_KEYS = config_keys(STRINGS, "layer_types", is_neutral=_all_full)
DECODER_KEYS = (
    *config_keys(COUNT, "vocab_size", "hidden_size", "intermediate_size", "head_dim"),
    *config_keys(COUNT, "num_attention_heads", "num_key_value_heads"),
    *config_keys(LAYERS, "num_hidden_layers"),
    *config_keys(STRING, "hidden_act"),
    *config_keys(POSITIVE, "rms_norm_eps"),
    *config_keys(BOOL, "tie_word_embeddings"),
    # Tensor parallelism in LLaMA's class: the number of slices of each product, which changes the order of the sums.
    *config_keys(NUMBER, "pretraining_tp", is_neutral=one),
    *LAYER_TYPE_KEYS,
    *ROPE_KEYS,
)
"""Keys of config.json that `decoder_spec` and `check_layer_types` read."""

BIAS_KEYS = config_keys(BOOL, "attention_bias", "mlp_bias")
WINDOW_KEYS = config_keys(INTEGER, "sliding_window", is_neutral=never)


def decoder_spec(config: CheckpointConfig) -> SpecFields:
    """Returns the fields that have the same keys in LLaMA, Mistral, Qwen and Gemma."""
    config.choose("hidden_act", {"silu": None, "swish": None}, "silu")
    config.refuse(pretraining_tp=1)
    width, heads = config.need("hidden_size"), config.need("num_attention_heads")
    head_dim = config.get("head_dim", width // heads)
    return dict(
        vocab_size=config.need("vocab_size"),
        num_layers=config.need("num_hidden_layers"),
        model_dim=width,
        num_heads=heads,
        num_kv_heads=config.get("num_key_value_heads", heads),
        head_dim=head_dim,
        mlp_dim=config.need("intermediate_size"),
        mlp="swiglu",
        norm_eps=config.get("rms_norm_eps", 1e-6),
        position="rope",
        max_positions=config.get("max_position_embeddings"),
        tied_embeddings=config.get("tie_word_embeddings", False),
        tied_logit_scale=False,
        attention_scale="inverse_sqrt",
        embedding_std=0.02,
        **rope_fields(config),
    )


def layer_windows(
    config: CheckpointConfig, layers: int, window: int | None, has_window: Callable[[int], bool] = lambda layer: True
) -> SpecFields:
    """Returns `window` and `window_layers`.

    Args:
      config: whose `layer_types`, where present, gives the type of each layer.
      layers: number of layers.
      window: size of the window in one direction, the token itself included; None = no window.
      has_window: whether a layer has the window where `layer_types` is absent.

    Raises:
      ConfigError: `layer_types` names other types of layers, has another length, or needs a window that is absent.
    """
    types = config.get("layer_types")
    if types is None:
        chosen = tuple(layer for layer in range(layers) if window is not None and has_window(layer))
    else:
        chosen = tuple(layer for layer, windowed in enumerate(check_layer_types(config, types, layers)) if windowed)
    if not chosen:
        return {}
    if window is None:
        raise ConfigError(
            f"{config.file}: layer_types gives layer {chosen[0]} a sliding window, but sliding_window is not enabled",
            where="layer_types",
            fix="Use the config.json that belongs to these weights.",
        )
    # None means all layers, so that equal networks have equal specs, with and without `layer_types`.
    return {"window": window, "window_layers": None if len(chosen) == layers else chosen}


def check_layer_types(config: CheckpointConfig, types: list[str], layers: int) -> list[bool]:
    """Returns whether each layer has a sliding window; raises `ConfigError` about other types of layers."""
    if len(types) != layers:
        raise ConfigError(
            f"{config.file}: layer_types has {len(types)} entries for {layers} layers",
            where="layer_types",
            fix="Use the config.json that belongs to these weights.",
        )
    for layer, kind in enumerate(types):
        if kind not in _LAYER_TYPES:
            raise ConfigError(
                f"{config.file}: layer_types = {shown(kind)} of layer {layer} is not supported "
                "(supported: full_attention, sliding_attention)",
                where="layer_types",
                fix="Use a checkpoint without it.",
            )
    return [_LAYER_TYPES[kind] for kind in types]


def decoder_config(spec: TransformerSpec) -> dict[str, Any]:
    """Returns the keys that LLaMA, Mistral, Qwen and Gemma share; inverse of `decoder_spec`."""
    return dict(
        vocab_size=spec.vocab_size,
        num_hidden_layers=spec.num_layers,
        hidden_size=spec.model_dim,
        num_attention_heads=spec.num_heads,
        num_key_value_heads=spec.kv_heads,
        head_dim=spec.head_dim,
        intermediate_size=spec.mlp_dim,
        hidden_act="silu",
        rms_norm_eps=spec.norm_eps,
        max_position_embeddings=spec.max_positions or 1 << 17,
        tie_word_embeddings=spec.tied_embeddings,
        # transformers 5 reads `rope_parameters`, earlier versions `rope_theta` and `rope_scaling`.
        rope_parameters=_rope_parameters(spec) | {"rope_theta": spec.rope_theta},
        rope_theta=spec.rope_theta,
        rope_scaling=_rope_parameters(spec) if spec.rope_scaling else None,
    )


def _rope_parameters(spec: TransformerSpec) -> dict[str, Any]:
    scaling = spec.rope_scaling
    if isinstance(scaling, LinearRope):
        return {"rope_type": "linear", "factor": scaling.factor}
    if isinstance(scaling, DynamicRope):
        return {"rope_type": "dynamic", "factor": scaling.factor}
    if isinstance(scaling, Llama3Rope):
        return {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "original_max_position_embeddings": scaling.original_max_positions,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
        }
    if isinstance(scaling, YarnRope):
        own = {} if scaling.attention_factor is None else {"attention_factor": scaling.attention_factor}
        return own | {
            "rope_type": "yarn",
            "factor": scaling.factor,
            "original_max_position_embeddings": scaling.original_max_positions,
            "beta_fast": scaling.beta_fast,
            "beta_slow": scaling.beta_slow,
            "truncate": scaling.truncate,
        }
    return {"rope_type": "default"}


def window_config(spec: TransformerSpec) -> dict[str, Any]:
    """Returns the keys of the sliding window; inverse of `layer_windows`."""
    layers = range(spec.num_layers) if spec.window_layers is None else spec.window_layers
    windowed = set(layers) if spec.window is not None else set()
    types = ["sliding_attention" if layer in windowed else "full_attention" for layer in range(spec.num_layers)]
    return {"use_sliding_window": bool(windowed), "sliding_window": spec.window, "layer_types": types}


def _read_llama(config: CheckpointConfig) -> SpecFields:
    attention_bias = config.get("attention_bias", False)
    layers = config.need("num_hidden_layers")
    if any(check_layer_types(config, config.get("layer_types", ["full_attention"] * layers), layers)):
        raise config.unsupported("layer_types", "LLaMA has no sliding window")
    return decoder_spec(config) | dict(
        qkv_bias=attention_bias, attention_output_bias=attention_bias, mlp_bias=config.get("mlp_bias", False)
    )


def _write_llama(spec: TransformerSpec) -> dict[str, Any]:
    return decoder_config(spec) | {"attention_bias": spec.qkv_bias, "mlp_bias": spec.mlp_bias}


def _read_mistral(config: CheckpointConfig) -> SpecFields:
    # An absent key is the default of transformers' class, null means no window.
    window, layers = config.get_or_null("sliding_window", 4096), config.need("num_hidden_layers")
    windows = layer_windows(config, layers, window)
    if windows.get("window") != window or windows.get("window_layers") is not None:
        raise config.unsupported("layer_types", "Mistral has a sliding window in all layers or in none")
    return decoder_spec(config) | windows


def _write_mistral(spec: TransformerSpec) -> dict[str, Any]:
    return decoder_config(spec) | {"sliding_window": spec.window}


LLAMA = Family(
    name="llama",
    description="LLaMA 1, 2 and 3, SmolLM and others with the same layers",
    source="arXiv 2302.13971, 2407.21783",
    model_types=("llama",),
    architectures=("LlamaForCausalLM", "LlamaModel", "LLaMAForCausalLM"),
    prefix="model.",
    weights=WEIGHTS,
    read_config=_read_llama,
    write_config=_write_llama,
    keys=(*DECODER_KEYS, *BIAS_KEYS),
    ignored_keys=("is_llama_config",),
    tied=TIED,
    ignored_tensors=IGNORED_TENSORS,
)

MISTRAL = Family(
    name="mistral",
    description="Mistral 7B and others with the same layers and sliding window",
    source="arXiv 2310.06825",
    model_types=("mistral",),
    architectures=("MistralForCausalLM", "MistralModel"),
    prefix="model.",
    weights=WEIGHTS,
    read_config=_read_mistral,
    write_config=_write_mistral,
    keys=(*DECODER_KEYS, *WINDOW_KEYS),
    tied=TIED,
    ignored_tensors=IGNORED_TENSORS,
)
