"""Gemma 1, 2 and 3 (text): scaled embeddings, RMSNorm times 1 + weight, from Gemma 2 on two norms per sublayer."""

from typing import Any

from diffusion_lm.interop.name_maps import llama
from diffusion_lm.interop.name_maps.config_keys import BOOL, COUNT, POSITIVE, STRING, config_keys, never, off
from diffusion_lm.interop.name_maps.family import CheckpointConfig, Family, JsonObject, SpecFields, Weight
from diffusion_lm.interop.name_maps.rope_keys import fields_of, layered_rope
from diffusion_lm.nn.transformer import TransformerSpec

_TANH = {"gelu_pytorch_tanh": "tanh", "gelu_new": "tanh"}
# Every n-th layer has full attention where config.json has no `layer_types`.
_PATTERNS = {"gemma2": 2, "gemma3_text": 6}
_KEYS = (
    *llama.DECODER_KEYS,
    *config_keys(BOOL, "attention_bias"),
    *config_keys(STRING, "hidden_activation"),
    *config_keys(BOOL, "use_bidirectional_attention", is_neutral=off),
)
_WINDOW_KEYS = (
    *llama.WINDOW_KEYS,
    *config_keys(COUNT, "sliding_window_pattern"),
    *config_keys(POSITIVE, "query_pre_attn_scalar", is_neutral=never),
    *config_keys(POSITIVE, "attn_logit_softcapping", "final_logit_softcapping", is_neutral=never),
)

# Defaults of the text model's class, which the config.json of a model with images may leave out.
_TEXT_DEFAULTS = dict(vocab_size=262208, num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=1 << 17)


def language_model(values: JsonObject) -> JsonObject:
    """Returns the config.json of the language model where `values` belong to a Gemma 3 with a vision tower."""
    text = values.get("text_config")
    if values.get("model_type") != "gemma3" or not isinstance(text, dict):
        return values
    specials = {name: value for name, value in values.items() if name.endswith("_token_id")}
    own = {"model_type": GEMMA3.model_types[0], "architectures": [GEMMA3.architectures[0]]}
    shared = {name: values[name] for name in ("torch_dtype", "dtype", "transformers_version") if name in values}
    return _TEXT_DEFAULTS | shared | specials | text | own


def _read_common(config: CheckpointConfig) -> SpecFields:
    config.refuse(use_bidirectional_attention=False)
    bias = config.get("attention_bias", False)
    # The caller has checked the activation; `decoder_spec` would accept SiLU only.
    fields = llama.decoder_spec(config.replaced(hidden_act=None))
    return fields | dict(
        head_dim=config.get("head_dim", 256),
        mlp="geglu",
        gelu="tanh",
        norm_around_one=True,
        scaled_embeddings=True,
        tied_embeddings=config.get("tie_word_embeddings", True),
        qkv_bias=bias,
        attention_output_bias=bias,
    )


def _read_gemma(config: CheckpointConfig) -> SpecFields:
    # The first files say "gelu" and mean its tanh approximation, with which the models were trained.
    name = "hidden_activation" if config.get("hidden_activation") else "hidden_act"
    config.choose(name, _TANH | {"gelu": "tanh"}, "gelu_pytorch_tanh")
    return _read_common(config)


def _read_gemma2(config: CheckpointConfig) -> SpecFields:
    config.choose("hidden_activation", _TANH, "gelu_pytorch_tanh")
    config.refuse(sliding_window_pattern=2)
    return (
        _read_common(config)
        | _windows(config, "gemma2")
        | dict(
            norm_placement="both",
            attention_scale_size=config.get("query_pre_attn_scalar", 256),
            # Absent keys take the defaults of the class, null turns the cap off.
            attention_softcap=config.get_or_null("attn_logit_softcapping", 50.0),
            logit_softcap=config.get_or_null("final_logit_softcapping", 30.0),
        )
    )


def _read_gemma3(config: CheckpointConfig) -> SpecFields:
    config.choose("hidden_activation", _TANH, "gelu_pytorch_tanh")
    if config.get("attn_logit_softcapping") is not None:
        raise config.unsupported("attn_logit_softcapping", "Gemma 3 has no soft cap on attention scores")
    full, window = layered_rope(
        config, full=("rope_theta", 1e6), window=("rope_local_base_freq", 1e4), scales_window=False
    )
    windows = _windows(config, "gemma3_text")
    chosen = full
    if windows.get("window_layers") is not None:
        windows["window_rope_theta"] = fields_of(config, window)["rope_theta"]
    elif windows:
        chosen = window  # every layer has a window
    plain = config.replaced(rope_parameters=chosen, rope_scaling=None)
    return (
        _read_common(plain)
        | windows
        | dict(
            norm_placement="both",
            qk_norm=True,
            attention_scale_size=config.get("query_pre_attn_scalar", 256),
            logit_softcap=config.get("final_logit_softcapping"),
        )
    )


def _windows(config: CheckpointConfig, kind: str) -> SpecFields:
    """Returns the window and its layers. Without `layer_types`, every second or sixth layer has full attention."""
    every, window = config.get("sliding_window_pattern", _PATTERNS[kind]), config.get_or_null("sliding_window", 4096)
    return llama.layer_windows(config, config.need("num_hidden_layers"), window, lambda layer: (layer + 1) % every != 0)


def _write_gemma(spec: TransformerSpec) -> dict[str, Any]:
    names = ("hidden_act", "hidden_activation")
    return llama.decoder_config(spec) | dict.fromkeys(names, "gelu_pytorch_tanh") | {"attention_bias": spec.qkv_bias}


def _write_gemma2(spec: TransformerSpec) -> dict[str, Any]:
    windows = llama.window_config(spec)
    return _write_gemma(spec) | dict(
        query_pre_attn_scalar=spec.head_dim if spec.attention_scale_size is None else spec.attention_scale_size,
        attn_logit_softcapping=spec.attention_softcap,
        final_logit_softcapping=spec.logit_softcap,
        sliding_window=windows["sliding_window"] or 4096,
        layer_types=windows["layer_types"],
    )


def _write_gemma3(spec: TransformerSpec) -> dict[str, Any]:
    config = _write_gemma2(spec)
    window_theta = spec.rope_theta if spec.window_rope_theta is None else spec.window_rope_theta
    parameters = {
        "full_attention": config["rope_parameters"],
        "sliding_attention": {"rope_type": "default", "rope_theta": window_theta},
    }
    return config | {"rope_parameters": parameters, "rope_local_base_freq": window_theta}


# Gemma 2 and 3 have a norm before and after each sublayer, and `post_attention_layernorm` is the one after attention.
_BOTH_NORMS = (
    *(line for line in llama.WEIGHTS if not line.param.startswith("blocks/mlp_norm/")),
    Weight("blocks/attention_output_norm/scale", "model.layers.{i}.post_attention_layernorm.weight"),
    Weight("blocks/mlp_norm/scale", "model.layers.{i}.pre_feedforward_layernorm.weight"),
    Weight("blocks/mlp_output_norm/scale", "model.layers.{i}.post_feedforward_layernorm.weight"),
)

GEMMA = Family(
    name="gemma",
    description="Gemma 1",
    source="arXiv 2403.08295",
    model_types=("gemma",),
    architectures=("GemmaForCausalLM", "GemmaModel"),
    prefix="model.",
    weights=llama.WEIGHTS,
    read_config=_read_gemma,
    write_config=_write_gemma,
    keys=_KEYS,
    ignored_keys=("_sliding_window_pattern",),
    tied=llama.TIED,
    ignored_tensors=llama.IGNORED_TENSORS,
)

GEMMA2 = Family(
    name="gemma2",
    description="Gemma 2, with soft caps and a sliding window in every second layer",
    source="arXiv 2408.00118",
    model_types=("gemma2",),
    architectures=("Gemma2ForCausalLM", "Gemma2Model"),
    prefix="model.",
    weights=_BOTH_NORMS,
    read_config=_read_gemma2,
    write_config=_write_gemma2,
    keys=(*_KEYS, *_WINDOW_KEYS),
    ignored_keys=("_sliding_window_pattern",),
    tied=llama.TIED,
    ignored_tensors=llama.IGNORED_TENSORS,
)

GEMMA3 = Family(
    name="gemma3",
    description="Gemma 3, with a sliding window in five of six layers; of models with images, the language model",
    source="arXiv 2503.19786",
    model_types=("gemma3_text",),
    architectures=("Gemma3ForCausalLM", "Gemma3TextModel"),
    prefix="model.",
    weights=_BOTH_NORMS,
    read_config=_read_gemma3,
    write_config=_write_gemma3,
    keys=(*_KEYS, *_WINDOW_KEYS, *config_keys(POSITIVE, "rope_local_base_freq")),
    ignored_keys=("_sliding_window_pattern",),
    tied=(*llama.TIED, *((f"language_model.{copy}", f"language_model.{name}") for copy, name in llama.TIED)),
    ignored_tensors=(*llama.IGNORED_TENSORS, r"(model\.)?(vision_tower|multi_modal_projector)\..+"),
    old_names=(
        # Models with images: names of transformers before version 5, and of version 5.
        (r"^(model|lm_head)\.", r"language_model.\1."),
        (r"^model\.", "model.language_model."),
    ),
)
