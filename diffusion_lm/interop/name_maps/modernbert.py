"""ModernBERT: an encoder with RoPE, gated layers, and attention that is local in all but every third layer."""

from typing import Any

from diffusion_lm.interop.name_maps import llama
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
from diffusion_lm.interop.name_maps.rope_fields import fields_of, layered_rope
from diffusion_lm.nn.transformer import TransformerSpec

_LAYER, _QKV, _WI = "model.layers.{i}.", "model.layers.{i}.attn.Wqkv.", "model.layers.{i}.mlp.Wi."
_ACTIVATIONS = {"gelu": "exact", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}
_FAR, _NEAR, _EVERY = 160000.0, 10000.0, 3


def _spec(config: Config) -> dict[str, Any]:
    config.refuse(norm_bias=False)
    config.asked.add("layer_norm_eps")  # of the published files; the class reads `norm_eps`
    gelu = config.choose("hidden_activation", _ACTIVATIONS, "gelu")
    if config.choose("classifier_activation", _ACTIVATIONS, "gelu") != gelu:
        raise config.unsupported("classifier_activation", "the head has the GELU of the layers")
    width, heads, layers = (config.need(name) for name in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
    attention_bias = config.get("attention_bias", False)
    return dict(
        vocab_size=config.need("vocab_size"),
        num_layers=layers,
        model_dim=width,
        num_heads=heads,
        head_dim=width // heads,
        mlp_dim=config.need("intermediate_size"),
        mlp="geglu",
        gelu=gelu,
        norm="layernorm",
        norm_eps=config.get("norm_eps", 1e-5),
        embedding_norm=True,
        first_attention_norm=False,
        position="rope",
        max_positions=config.get("max_position_embeddings", 8192),
        tied_embeddings=config.get("tie_word_embeddings", True),
        tied_logit_scale=False,
        qkv_bias=attention_bias,
        attention_output_bias=attention_bias,
        mlp_bias=config.get("mlp_bias", False),
        attention_scale="inverse_sqrt",
        head_transform=True,
        head_transform_bias=config.get("classifier_bias", False),
        head_bias=config.get("decoder_bias", True),
        embedding_std=0.02,
        **_layers(config, layers),
    )


def _layers(config: Config, layers: int) -> dict[str, Any]:
    """Returns windows and RoPE, from `layer_types` and `rope_parameters` or from what older files say instead."""
    every = config.get("global_attn_every_n_layers", _EVERY)
    # `local_attention` counts both sides; a token sees half of it ahead, half of it back, and itself.
    reach = config.get("local_attention", 128) // 2 + 1
    windows = llama.layer_windows(config, layers, reach, lambda layer: layer % every != 0)
    far, near = layered_rope(
        config, far=("global_rope_theta", _FAR), near=("local_rope_theta", _NEAR), scales_near=True
    )
    if not windows:
        return fields_of(config, far)
    if windows["window_layers"] is None:
        return windows | fields_of(config, near)
    return windows | fields_of(config, far) | {"window_rope_theta": fields_of(config, near)["rope_theta"]}


def _config(spec: TransformerSpec) -> dict[str, Any]:
    plain = llama.decoder_config(spec)
    near = spec.rope_theta if spec.window_rope_theta is None else spec.window_rope_theta
    activation = {value: key for key, value in reversed(_ACTIVATIONS.items())}[spec.gelu]
    return dict(
        vocab_size=spec.vocab_size,
        num_hidden_layers=spec.num_layers,
        hidden_size=spec.model_dim,
        num_attention_heads=spec.num_heads,
        intermediate_size=spec.mlp_dim,
        hidden_activation=activation,
        classifier_activation=activation,
        norm_eps=spec.norm_eps,
        norm_bias=False,
        attention_bias=spec.has_qkv_bias,
        mlp_bias=spec.has_mlp_bias,
        classifier_bias=spec.head_transform_bias,
        decoder_bias=spec.head_bias,
        max_position_embeddings=spec.max_positions or 8192,
        tie_word_embeddings=spec.tied_embeddings,
        local_attention=128 if spec.window is None else 2 * (spec.window - 1),
        layer_types=llama.window_config(spec)["layer_types"],
        rope_parameters={
            "full_attention": plain["rope_parameters"],
            "sliding_attention": {"rope_type": "default", "rope_theta": near},
        },
        global_rope_theta=spec.rope_theta,
        local_rope_theta=near,
    )


FAMILY = Family(
    name="modernbert",
    description="ModernBERT with its masked language model",
    source="arXiv 2412.13663",
    model_types=("modernbert",),
    architectures=("ModernBertForMaskedLM",),
    prefix="model.",
    weights=(
        Weight("embed/tokens", "model.embeddings.tok_embeddings.weight", VOCABULARY),
        Weight("embedding_norm/scale", "model.embeddings.norm.weight"),
        # The first layer reads what the norm of the embeddings returns.
        Weight("blocks/attention_norm/scale", _LAYER + "attn_norm.weight", first=1),
        Weight("blocks/attention/query", _QKV + "weight", HEADS_OUT, 0, 3, parts_axis=0),
        Weight("blocks/attention/key", _QKV + "weight", HEADS_OUT, 1, 3, parts_axis=0),
        Weight("blocks/attention/value", _QKV + "weight", HEADS_OUT, 2, 3, parts_axis=0),
        Weight("blocks/attention/query_bias", _QKV + "bias", HEADS_BIAS, 0, 3),
        Weight("blocks/attention/key_bias", _QKV + "bias", HEADS_BIAS, 1, 3),
        Weight("blocks/attention/value_bias", _QKV + "bias", HEADS_BIAS, 2, 3),
        Weight("blocks/attention/output", _LAYER + "attn.Wo.weight", HEADS_IN),
        Weight("blocks/attention/output_bias", _LAYER + "attn.Wo.bias"),
        Weight("blocks/mlp_norm/scale", _LAYER + "mlp_norm.weight"),
        Weight("blocks/mlp/gate", _WI + "weight", TRANSPOSED, 0, 2, parts_axis=0),
        Weight("blocks/mlp/up", _WI + "weight", TRANSPOSED, 1, 2, parts_axis=0),
        Weight("blocks/mlp/gate_bias", _WI + "bias", part=0, parts=2),
        Weight("blocks/mlp/up_bias", _WI + "bias", part=1, parts=2),
        Weight("blocks/mlp/down", _LAYER + "mlp.Wo.weight", TRANSPOSED),
        Weight("blocks/mlp/down_bias", _LAYER + "mlp.Wo.bias"),
        Weight("final_norm/scale", "model.final_norm.weight"),
        Weight("head/transform/dense", "head.dense.weight", TRANSPOSED),
        Weight("head/transform/dense_bias", "head.dense.bias"),
        Weight("head/transform/norm/scale", "head.norm.weight"),
        Weight("head/tokens", "decoder.weight", VOCABULARY),
        Weight("head/bias", "decoder.bias", VOCABULARY),
    ),
    copies=(("decoder.weight", "model.embeddings.tok_embeddings.weight"),),
    spec=_spec,
    config=_config,
    causal=False,
    special_ids=(
        *(("bos_token_id", 50281), ("cls_token_id", 50281), ("eos_token_id", 50282)),
        *(("sep_token_id", 50282), ("pad_token_id", 50283)),
    ),
)
