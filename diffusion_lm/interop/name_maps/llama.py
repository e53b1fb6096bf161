"""LLaMA 1 to 3, and what has its weights under the same names: SmolLM, Mistral, Qwen 2 and 3."""

from typing import Any

from diffusion_lm.core.errors import ConfigError
from diffusion_lm.interop.name_maps.family import (
    HEADS_BIAS,
    HEADS_IN,
    HEADS_OUT,
    TRANSPOSED,
    VOCABULARY,
    Config,
    Family,
    Weight,
)
from diffusion_lm.nn.rope import DynamicRope, LinearRope, Llama3Rope, RopeScaling, YarnRope
from diffusion_lm.nn.transformer import TransformerSpec

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
    Weight("blocks/mlp/gate", _MLP + "gate_proj.weight", TRANSPOSED),
    Weight("blocks/mlp/up", _MLP + "up_proj.weight", TRANSPOSED),
    Weight("blocks/mlp/down", _MLP + "down_proj.weight", TRANSPOSED),
    Weight("blocks/mlp/gate_bias", _MLP + "gate_proj.bias"),
    Weight("blocks/mlp/up_bias", _MLP + "up_proj.bias"),
    Weight("blocks/mlp/down_bias", _MLP + "down_proj.bias"),
    Weight("final_norm/scale", "model.norm.weight"),
    Weight("head/tokens", "lm_head.weight", VOCABULARY),
)
COPIES = (("lm_head.weight", "model.embed_tokens.weight"),)
IGNORABLE = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", r"model\.rotary_emb\.inv_freq")


def decoder_spec(config: Config) -> dict[str, Any]:
    """Returns the fields that all these decoders say in the same words."""
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
        **rope(config),
    )


def rope(config: Config) -> dict[str, Any]:
    """Returns `rope_theta` and `rope_scaling`, from `rope_parameters` or from the fields of older files."""
    parameters = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = parameters.get("rope_theta") or config.get("rope_theta", 10000.0)
    kind = str(parameters.get("rope_type") or parameters.get("type") or "default")
    if any(isinstance(value, dict) for value in parameters.values()):
        raise config.unsupported("rope_parameters", "one set for all layers")
    share = parameters.get("partial_rotary_factor") or config.get("partial_rotary_factor", 1.0)
    if share != 1.0:
        raise config.unsupported("partial_rotary_factor", "whole heads are rotated")
    return {"rope_theta": float(theta), "rope_scaling": _scaling(config, kind, parameters)}


def _scaling(config: Config, kind: str, parameters: dict[str, Any]) -> RopeScaling | None:
    known = ("default", "linear", "dynamic", "llama3", "yarn")
    if kind == "default":
        return None
    if kind not in known:
        raise ConfigError(
            f"{config.file} says rope_type = {kind!r}, which this network cannot do (supported: {', '.join(known)})",
            where="rope_parameters",
            fix="Use a checkpoint without it.",
        )

    def number(name: str, default: Any = None) -> Any:
        value = parameters.get(name)
        value = default if value is None else value
        if value is None:
            raise ConfigError(f"{config.file} does not say {name!r}", where="rope_parameters", fix="Complete the file.")
        return value

    longest = config.get("max_position_embeddings")
    original = parameters.get("original_max_position_embeddings") or config.get("original_max_position_embeddings")
    if kind == "linear":
        return LinearRope(float(number("factor")))
    if kind == "dynamic":
        config.need("max_position_embeddings")
        return DynamicRope(float(number("factor")))
    if kind == "llama3":
        return Llama3Rope(
            float(number("factor")),
            original_max_positions=number("original_max_position_embeddings", original or longest),
            low_freq_factor=float(number("low_freq_factor")),
            high_freq_factor=float(number("high_freq_factor")),
        )
    factor = float(number("factor", longest / original if longest and original else None))
    attention_factor = parameters.get("attention_factor")
    scale, all_dim = parameters.get("mscale"), parameters.get("mscale_all_dim")
    if attention_factor is None and scale and all_dim:
        plain = YarnRope(factor).magnitude - 1.0
        attention_factor = (scale * plain + 1.0) / (all_dim * plain + 1.0)
    return YarnRope(
        factor,
        original_max_positions=number("original_max_position_embeddings", original or longest),
        beta_fast=float(number("beta_fast", 32.0)),
        beta_slow=float(number("beta_slow", 1.0)),
        attention_factor=attention_factor,
        truncate=parameters.get("truncate", True),
    )


def layer_windows(config: Config, layers: int) -> dict[str, Any]:
    """Returns `window` and `window_layers` from `sliding_window`, `layer_types` and what older files say instead."""
    window = config.get("sliding_window")
    if window is None or not config.get("use_sliding_window", True):
        return {}
    types = config.get("layer_types")
    if types is not None:
        chosen = tuple(number for number, kind in enumerate(types) if kind == "sliding_attention")
    else:
        first = config.get("max_window_layers", 0)
        chosen = tuple(range(first, layers))
    if not chosen:
        return {}
    return {"window": window, "window_layers": None if len(chosen) == layers else chosen}


def decoder_config(spec: TransformerSpec) -> dict[str, Any]:
    """Returns what all these decoders say in the same words; inverse of `decoder_spec`."""
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
        # Both spellings: transformers before version 5 reads the second and the third.
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
        told = {} if scaling.attention_factor is None else {"attention_factor": scaling.attention_factor}
        return told | {
            "rope_type": "yarn",
            "factor": scaling.factor,
            "original_max_position_embeddings": scaling.original_max_positions,
            "beta_fast": scaling.beta_fast,
            "beta_slow": scaling.beta_slow,
            "truncate": scaling.truncate,
        }
    return {"rope_type": "default"}


def window_config(spec: TransformerSpec) -> dict[str, Any]:
    """Returns the fields of the sliding window; inverse of `layer_windows`."""
    layers = range(spec.num_layers) if spec.window_layers is None else spec.window_layers
    inside = set(layers) if spec.window is not None else set()
    kinds = ["sliding_attention" if layer in inside else "full_attention" for layer in range(spec.num_layers)]
    return {"use_sliding_window": bool(inside), "sliding_window": spec.window, "layer_types": kinds}


def _llama_spec(config: Config) -> dict[str, Any]:
    attention_bias = config.get("attention_bias", False)
    return decoder_spec(config) | dict(
        qkv_bias=attention_bias, attention_output_bias=attention_bias, mlp_bias=config.get("mlp_bias", False)
    )


def _llama_config(spec: TransformerSpec) -> dict[str, Any]:
    return decoder_config(spec) | {"attention_bias": spec.qkv_bias, "mlp_bias": spec.mlp_bias}


def _mistral_spec(config: Config) -> dict[str, Any]:
    return decoder_spec(config) | {"window": config.get("sliding_window")}


def _mistral_config(spec: TransformerSpec) -> dict[str, Any]:
    return decoder_config(spec) | {"sliding_window": spec.window}


LLAMA = Family(
    name="llama",
    description="LLaMA 1, 2 and 3, SmolLM and others of this shape",
    source="arXiv 2302.13971, 2407.21783",
    model_types=("llama",),
    architectures=("LlamaForCausalLM", "LlamaModel", "LLaMAForCausalLM"),
    prefix="model.",
    weights=WEIGHTS,
    copies=COPIES,
    ignorable=IGNORABLE,
    spec=_llama_spec,
    config=_llama_config,
)

MISTRAL = Family(
    name="mistral",
    description="Mistral 7B and others of this shape, with their sliding window",
    source="arXiv 2310.06825",
    model_types=("mistral",),
    architectures=("MistralForCausalLM", "MistralModel"),
    prefix="model.",
    weights=WEIGHTS,
    copies=COPIES,
    ignorable=IGNORABLE,
    spec=_mistral_spec,
    config=_mistral_config,
)
