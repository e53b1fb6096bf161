"""Gemma 1, 2 and 3 (text): scaled embeddings, norms around one, and from 2 on norms on both sides of each layer."""

from collections.abc import Mapping
from typing import Any

from diffusion_lm.interop.name_maps import llama
from diffusion_lm.interop.name_maps.family import Config, Family, Weight
from diffusion_lm.interop.name_maps.rope_fields import fields_of, layered_rope
from diffusion_lm.nn.transformer import TransformerSpec

_TANH = {"gelu_pytorch_tanh": "tanh", "gelu_new": "tanh"}
_PATTERNS = {"gemma2": 2, "gemma3_text": 6}


# What the class of the language model takes where the config.json of a model with images says nothing.
_TEXT = dict(vocab_size=262208, num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=1 << 17)


def language_model(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the config.json of the language model alone where `values` are those of a Gemma 3 that reads images."""
    text = values.get("text_config")
    if values.get("model_type") != "gemma3" or not isinstance(text, dict):
        return values
    specials = {name: value for name, value in values.items() if name.endswith("_token_id")}
    own = {"model_type": GEMMA3.model_types[0], "architectures": [GEMMA3.architectures[0]]}
    shared = {name: values[name] for name in ("torch_dtype", "dtype", "transformers_version") if name in values}
    return _TEXT | shared | specials | text | own


def _spec(config: Config) -> dict[str, Any]:
    config.refuse(use_bidirectional_attention=False)
    bias = config.get("attention_bias", False)
    # The families choose their activation before; a LLaMA's would be SiLU.
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


def _gemma_spec(config: Config) -> dict[str, Any]:
    # The first files say "gelu" and mean the approximation that the models were trained with.
    name = "hidden_activation" if config.get("hidden_activation") else "hidden_act"
    config.choose(name, _TANH | {"gelu": "tanh"}, "gelu_pytorch_tanh")
    return _spec(config)


def _gemma2_spec(config: Config) -> dict[str, Any]:
    config.choose("hidden_activation", _TANH, "gelu_pytorch_tanh")
    config.refuse(sliding_window_pattern=2)
    return (
        _spec(config)
        | _windows(config, "gemma2")
        | dict(
            norm_placement="both",
            attention_scale_size=config.get("query_pre_attn_scalar", 256),
            # Absent, they are those of the class; null, they are off.
            attention_softcap=config.given("attn_logit_softcapping", 50.0),
            logit_softcap=config.given("final_logit_softcapping", 30.0),
        )
    )


def _gemma3_spec(config: Config) -> dict[str, Any]:
    config.choose("hidden_activation", _TANH, "gelu_pytorch_tanh")
    if config.get("attn_logit_softcapping") is not None:
        raise config.unsupported("attn_logit_softcapping", "Gemma 3 caps no scores")
    far, near = layered_rope(config, far=("rope_theta", 1e6), near=("rope_local_base_freq", 1e4), scales_near=False)
    windows = _windows(config, "gemma3_text")
    chosen = far
    if windows.get("window_layers") is not None:
        windows["window_rope_theta"] = fields_of(config, near)["rope_theta"]
    elif windows:
        chosen = near
    plain = config.replaced(rope_parameters=chosen, rope_scaling=None)
    return (
        _spec(plain)
        | windows
        | dict(
            norm_placement="both",
            qk_norm=True,
            attention_scale_size=config.get("query_pre_attn_scalar", 256),
            logit_softcap=config.get("final_logit_softcapping"),
        )
    )


def _windows(config: Config, kind: str) -> dict[str, Any]:
    """Returns the window and its layers; files without `layer_types` leave out every second or every sixth layer."""
    every, window = config.get("sliding_window_pattern", _PATTERNS[kind]), config.given("sliding_window", 4096)
    return llama.layer_windows(config, config.need("num_hidden_layers"), window, lambda layer: (layer + 1) % every != 0)


def _gemma_config(spec: TransformerSpec) -> dict[str, Any]:
    names = ("hidden_act", "hidden_activation")
    return llama.decoder_config(spec) | dict.fromkeys(names, "gelu_pytorch_tanh") | {"attention_bias": spec.qkv_bias}


def _gemma2_config(spec: TransformerSpec) -> dict[str, Any]:
    windows = llama.window_config(spec)
    return _gemma_config(spec) | dict(
        query_pre_attn_scalar=spec.head_dim if spec.attention_scale_size is None else spec.attention_scale_size,
        attn_logit_softcapping=spec.attention_softcap,
        final_logit_softcapping=spec.logit_softcap,
        sliding_window=windows["sliding_window"] or 4096,
        layer_types=windows["layer_types"],
    )


def _gemma3_config(spec: TransformerSpec) -> dict[str, Any]:
    config = _gemma2_config(spec)
    near = spec.rope_theta if spec.window_rope_theta is None else spec.window_rope_theta
    parameters = {
        "full_attention": config["rope_parameters"],
        "sliding_attention": {"rope_type": "default", "rope_theta": near},
    }
    return config | {"rope_parameters": parameters, "rope_local_base_freq": near}


_BOTH = (
    *(line for line in llama.WEIGHTS if not line.ours.startswith("blocks/mlp_norm/")),
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
    copies=llama.COPIES,
    ignorable=llama.IGNORABLE,
    spec=_gemma_spec,
    config=_gemma_config,
)

GEMMA2 = Family(
    name="gemma2",
    description="Gemma 2, with soft caps and a window in every second layer",
    source="arXiv 2408.00118",
    model_types=("gemma2",),
    architectures=("Gemma2ForCausalLM", "Gemma2Model"),
    prefix="model.",
    weights=_BOTH,
    copies=llama.COPIES,
    ignorable=llama.IGNORABLE,
    spec=_gemma2_spec,
    config=_gemma2_config,
)

GEMMA3 = Family(
    name="gemma3",
    description="Gemma 3 with a window in five of six layers; of one that reads images, the language model",
    source="arXiv 2503.19786",
    model_types=("gemma3_text",),
    architectures=("Gemma3ForCausalLM", "Gemma3TextModel"),
    prefix="model.",
    weights=_BOTH,
    copies=(*llama.COPIES, *((f"language_model.{copy}", f"language_model.{name}") for copy, name in llama.COPIES)),
    ignorable=(*llama.IGNORABLE, r"(model\.)?(vision_tower|multi_modal_projector)\..+"),
    renames=(
        # With images: of transformers before version 5, and since then.
        (r"^(model|lm_head)\.", r"language_model.\1."),
        (r"^model\.", "model.language_model."),
    ),
    spec=_gemma3_spec,
    config=_gemma3_config,
)
