"""ModernBERT: an encoder with RoPE and GeGLU; every third layer has full attention, the others a sliding window."""

from typing import Any

from diffusion_lm.interop.name_maps import llama
from diffusion_lm.interop.name_maps.config_keys import BOOL, COUNT, LAYERS, POSITIVE, STRING, config_keys
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
)
from diffusion_lm.interop.name_maps.rope_keys import ROPE_KEYS, fields_of, layered_rope
from diffusion_lm.nn.transformer import TransformerSpec

_LAYER, _QKV, _WI = "model.layers.{i}.", "model.layers.{i}.attn.Wqkv.", "model.layers.{i}.mlp.Wi."
_ACTIVATIONS = {"gelu": "exact", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}
# Defaults of transformers' class: theta of layers with full attention and with a window, and how often full comes.
_FULL_THETA, _WINDOW_THETA, _EVERY = 160000.0, 10000.0, 3


def _read_config(config: CheckpointConfig) -> SpecFields:
    config.refuse(norm_bias=False)
    gelu = config.choose("hidden_activation", _ACTIVATIONS, "gelu")
    if config.choose("classifier_activation", _ACTIVATIONS, "gelu") != gelu:
        raise config.unsupported("classifier_activation", "it must be the activation of the layers")
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


def _layers(config: CheckpointConfig, layers: int) -> SpecFields:
    """Returns windows and RoPE, from `layer_types` and `rope_parameters` or from the keys of older files."""
    every = config.get("global_attn_every_n_layers", _EVERY)
    # `local_attention` counts both directions. Ours counts one direction and the token itself.
    reach = config.get("local_attention", 128) // 2 + 1
    windows = llama.layer_windows(config, layers, reach, lambda layer: layer % every != 0)
    full, window = layered_rope(
        config,
        full=("global_rope_theta", _FULL_THETA),
        window=("local_rope_theta", _WINDOW_THETA),
        scales_window=True,
    )
    if not windows:
        return fields_of(config, full)
    if windows["window_layers"] is None:
        return windows | fields_of(config, window)
    return windows | fields_of(config, full) | {"window_rope_theta": fields_of(config, window)["rope_theta"]}


def _write_config(spec: TransformerSpec) -> dict[str, Any]:
    plain = llama.decoder_config(spec)
    window_theta = spec.rope_theta if spec.window_rope_theta is None else spec.window_rope_theta
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
            "sliding_attention": {"rope_type": "default", "rope_theta": window_theta},
        },
        global_rope_theta=spec.rope_theta,
        local_rope_theta=window_theta,
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
        # The first layer has no norm of its own: the embeddings were just normalised.
        Weight("blocks/attention_norm/scale", _LAYER + "attn_norm.weight", first_layer=1),
        Weight("blocks/attention/query", _QKV + "weight", HEADS_OUT, 0, 3, parts_axis=0),
        Weight("blocks/attention/key", _QKV + "weight", HEADS_OUT, 1, 3, parts_axis=0),
        Weight("blocks/attention/value", _QKV + "weight", HEADS_OUT, 2, 3, parts_axis=0),
        Weight("blocks/attention/query_bias", _QKV + "bias", HEADS_BIAS, 0, 3),
        Weight("blocks/attention/key_bias", _QKV + "bias", HEADS_BIAS, 1, 3),
        Weight("blocks/attention/value_bias", _QKV + "bias", HEADS_BIAS, 2, 3),
        Weight("blocks/attention/output", _LAYER + "attn.Wo.weight", HEADS_IN),
        Weight("blocks/attention/output_bias", _LAYER + "attn.Wo.bias"),
        Weight("blocks/mlp_norm/scale", _LAYER + "mlp_norm.weight"),
        Weight("blocks/mlp/gate", _WI + "weight", TRANSPOSE, 0, 2, parts_axis=0),
        Weight("blocks/mlp/up", _WI + "weight", TRANSPOSE, 1, 2, parts_axis=0),
        Weight("blocks/mlp/gate_bias", _WI + "bias", part=0, parts=2),
        Weight("blocks/mlp/up_bias", _WI + "bias", part=1, parts=2),
        Weight("blocks/mlp/down", _LAYER + "mlp.Wo.weight", TRANSPOSE),
        Weight("blocks/mlp/down_bias", _LAYER + "mlp.Wo.bias"),
        Weight("final_norm/scale", "model.final_norm.weight"),
        Weight("head/transform/dense", "head.dense.weight", TRANSPOSE),
        Weight("head/transform/dense_bias", "head.dense.bias"),
        Weight("head/transform/norm/scale", "head.norm.weight"),
        Weight("head/tokens", "decoder.weight", VOCABULARY),
        Weight("head/bias", "decoder.bias", VOCABULARY),
    ),
    read_config=_read_config,
    write_config=_write_config,
    keys=(
        *config_keys(COUNT, "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads"),
        *config_keys(COUNT, "local_attention", "global_attn_every_n_layers"),
        *config_keys(LAYERS, "num_hidden_layers"),
        *config_keys(POSITIVE, "norm_eps", "global_rope_theta", "local_rope_theta"),
        *config_keys(STRING, "hidden_activation", "classifier_activation"),
        *config_keys(BOOL, "norm_bias", "classifier_bias", "decoder_bias", "tie_word_embeddings"),
        *llama.BIAS_KEYS,
        *llama.LAYER_TYPE_KEYS,
        *ROPE_KEYS,
    ),
    ignored_keys=(
        "layer_norm_eps",  # in the published files; the class reads `norm_eps`
        *("classifier_.*", "sparse_prediction", "sparse_pred_ignore_index"),
        *("deterministic_flash_attn", "reference_compile", "repad_logits_with_grad"),
    ),
    tied=(("decoder.weight", "model.embeddings.tok_embeddings.weight"),),
    causal=False,
    default_token_ids=(
        *(("bos_token_id", 50281), ("cls_token_id", 50281), ("eos_token_id", 50282)),
        *(("sep_token_id", 50282), ("pad_token_id", 50283)),
    ),
)
