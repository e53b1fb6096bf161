"""GPT-2: learned positions, LayerNorm before each sublayer, queries, keys and values in one Conv1D tensor [in, out]."""

from typing import Any

from diffusion_lm.interop.name_maps.config_keys import BOOL, COUNT, LAYERS, POSITIVE, STRING, config_keys, off
from diffusion_lm.interop.name_maps.family import (
    CONV_HEADS_IN,
    CONV_HEADS_OUT,
    HEADS_BIAS,
    VOCABULARY,
    CheckpointConfig,
    Family,
    SpecFields,
    Weight,
)
from diffusion_lm.nn.transformer import TransformerSpec

_ACTIVATIONS = {
    "gelu_new": ("gelu", "tanh"),
    "gelu_pytorch_tanh": ("gelu", "tanh"),
    "gelu": ("gelu", "exact"),
    "relu": ("relu", "tanh"),
}


def _read_config(config: CheckpointConfig) -> SpecFields:
    config.refuse(add_cross_attention=False, scale_attn_by_inverse_layer_idx=False)
    mlp, gelu = config.choose("activation_function", _ACTIVATIONS, "gelu_new")
    width, heads = config.need("n_embd"), config.need("n_head")
    return dict(
        vocab_size=config.need("vocab_size"),
        num_layers=config.need("n_layer"),
        model_dim=width,
        num_heads=heads,
        head_dim=width // heads,
        mlp_dim=config.get("n_inner", 4 * width),
        mlp=mlp,
        gelu=gelu,
        norm="layernorm",
        norm_eps=config.get("layer_norm_epsilon", 1e-5),
        position="learned",
        max_positions=config.need("n_positions"),
        tied_embeddings=config.get("tie_word_embeddings", True),
        tied_logit_scale=False,
        use_bias=True,
        attention_scale="inverse_sqrt" if config.get("scale_attn_weights", True) else "none",
        embedding_std=0.02,
    )


def _write_config(spec: TransformerSpec) -> dict[str, Any]:
    return dict(
        vocab_size=spec.vocab_size,
        n_layer=spec.num_layers,
        n_embd=spec.model_dim,
        n_head=spec.num_heads,
        n_inner=spec.mlp_dim,
        n_positions=spec.max_positions,
        activation_function={value: key for key, value in reversed(_ACTIVATIONS.items())}[
            spec.mlp, spec.gelu if spec.mlp == "gelu" else "tanh"
        ],
        layer_norm_epsilon=spec.norm_eps,
        scale_attn_weights=spec.attention_scale == "inverse_sqrt",
        tie_word_embeddings=spec.tied_embeddings,
    )


FAMILY = Family(
    name="gpt2",
    description="GPT-2 and models with the same layers",
    source="Radford et al. 2019",
    model_types=("gpt2",),
    architectures=("GPT2LMHeadModel", "GPT2Model"),
    prefix="transformer.",
    weights=(
        Weight("embed/tokens", "transformer.wte.weight", VOCABULARY),
        Weight("positions", "transformer.wpe.weight"),
        Weight("blocks/attention_norm/scale", "transformer.h.{i}.ln_1.weight"),
        Weight("blocks/attention_norm/bias", "transformer.h.{i}.ln_1.bias"),
        Weight("blocks/attention/query", "transformer.h.{i}.attn.c_attn.weight", CONV_HEADS_OUT, 0, 3),
        Weight("blocks/attention/key", "transformer.h.{i}.attn.c_attn.weight", CONV_HEADS_OUT, 1, 3),
        Weight("blocks/attention/value", "transformer.h.{i}.attn.c_attn.weight", CONV_HEADS_OUT, 2, 3),
        Weight("blocks/attention/query_bias", "transformer.h.{i}.attn.c_attn.bias", HEADS_BIAS, 0, 3),
        Weight("blocks/attention/key_bias", "transformer.h.{i}.attn.c_attn.bias", HEADS_BIAS, 1, 3),
        Weight("blocks/attention/value_bias", "transformer.h.{i}.attn.c_attn.bias", HEADS_BIAS, 2, 3),
        Weight("blocks/attention/output", "transformer.h.{i}.attn.c_proj.weight", CONV_HEADS_IN),
        Weight("blocks/attention/output_bias", "transformer.h.{i}.attn.c_proj.bias"),
        Weight("blocks/mlp_norm/scale", "transformer.h.{i}.ln_2.weight"),
        Weight("blocks/mlp_norm/bias", "transformer.h.{i}.ln_2.bias"),
        Weight("blocks/mlp/up", "transformer.h.{i}.mlp.c_fc.weight"),
        Weight("blocks/mlp/up_bias", "transformer.h.{i}.mlp.c_fc.bias"),
        Weight("blocks/mlp/down", "transformer.h.{i}.mlp.c_proj.weight"),
        Weight("blocks/mlp/down_bias", "transformer.h.{i}.mlp.c_proj.bias"),
        Weight("final_norm/scale", "transformer.ln_f.weight"),
        Weight("final_norm/bias", "transformer.ln_f.bias"),
        Weight("head/tokens", "lm_head.weight", VOCABULARY),
    ),
    read_config=_read_config,
    write_config=_write_config,
    keys=(
        *config_keys(COUNT, "vocab_size", "n_embd", "n_head", "n_inner", "n_positions"),
        *config_keys(LAYERS, "n_layer"),
        *config_keys(STRING, "activation_function"),
        *config_keys(POSITIVE, "layer_norm_epsilon"),
        *config_keys(BOOL, "tie_word_embeddings", "scale_attn_weights"),
        *config_keys(BOOL, "add_cross_attention", "scale_attn_by_inverse_layer_idx", is_neutral=off),
    ),
    ignored_keys=(
        # `n_ctx` repeats `n_positions`. Upcasting is a matter of precision; the summary is a classification head.
        *("n_ctx", "reorder_and_upcast_attn", "summary_.*"),
    ),
    tied=(("lm_head.weight", "transformer.wte.weight"),),
    ignored_tensors=(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)",),  # the causal mask
)
