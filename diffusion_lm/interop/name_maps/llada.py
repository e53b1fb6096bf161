"""LLaDA: LLaMA's layers under the names of OLMo, trained from scratch as masked diffusion with full attention.

Names and keys are those of `LLaDALlamaBlock` and `LLaDAModel` in the model code that GSAI-ML publishes with the
weights. RoPE pairs entry j of a head with entry j + E/2, as LLaMA's does, so no permutation is needed. The gate of the
feed-forward layer is `ff_proj`.
"""

from typing import Any

from diffusion_lm.interop.name_maps.config_keys import (
    BOOL,
    COUNT,
    LAYERS,
    NUMBER,
    POSITIVE,
    STRING,
    config_keys,
    never,
    off,
)
from diffusion_lm.interop.name_maps.family import (
    HEADS_BIAS,
    HEADS_IN,
    HEADS_OUT,
    TRANSPOSE,
    VOCABULARY,
    CheckpointConfig,
    Diffusion,
    Family,
    SpecFields,
    Weight,
)
from diffusion_lm.nn.transformer import TransformerSpec

_BLOCK = "model.transformer.blocks.{i}."

# Switches of the published code that this network does not have; `_read_config` checks some more.
# `write_config` writes them too, so that the published class builds this network.
_FIXED = dict(
    alibi=False,
    attention_layer_norm=False,
    bias_for_layer_norm=False,
    block_group_size=1,
    include_bias=False,
    input_emb_norm=False,
    layer_norm_with_affine=True,
    scale_logits=False,
)


def _read_config(config: CheckpointConfig) -> SpecFields:
    config.refuse(**_FIXED)
    config.choose("block_type", {"llama": None})
    config.choose("layer_norm_type", {"rms": None})
    config.choose("activation_type", {"silu": None})
    config.choose("rope", {True: None})
    width, heads = config.need("d_model"), config.need("n_heads")
    one_head = config.get("multi_query_attention", False)
    return dict(
        # `embedding_size` is the number of rows of both tables, and the published code computes logits for all rows.
        vocab_size=config.get("embedding_size") or config.need("vocab_size"),
        num_layers=config.need("n_layers"),
        model_dim=width,
        num_heads=heads,
        num_kv_heads=config.get("n_kv_heads", 1 if one_head else heads),
        head_dim=width // heads,
        mlp_dim=config.get("mlp_hidden_size") or config.need("mlp_ratio") * width,
        mlp="swiglu",
        norm_eps=config.get("rms_norm_eps", 1e-5),
        position="rope",
        rope_theta=float(config.get("rope_theta", 10000.0)),
        max_positions=config.get("max_sequence_length"),
        tied_embeddings=config.need("weight_tying"),
        tied_logit_scale=False,
        qkv_bias=config.get("include_qkv_bias", False),
        attention_scale="inverse_sqrt",
        embedding_std=0.02,
    )


def _write_config(spec: TransformerSpec) -> dict[str, Any]:
    return dict(
        _FIXED,
        block_type="llama",
        layer_norm_type="rms",
        activation_type="silu",
        rope=True,
        rope_full_precision=True,
        rope_theta=spec.rope_theta,
        vocab_size=spec.vocab_size,
        embedding_size=spec.vocab_size,
        n_layers=spec.num_layers,
        d_model=spec.model_dim,
        n_heads=spec.num_heads,
        n_kv_heads=spec.kv_heads,
        mlp_hidden_size=spec.mlp_dim,
        rms_norm_eps=spec.norm_eps,
        max_sequence_length=spec.max_positions or 4096,
        weight_tying=spec.tied_embeddings,
        include_qkv_bias=spec.qkv_bias,
        # The defaults of the published class are not 0.
        attention_dropout=0.0,
        embedding_dropout=0.0,
        residual_dropout=0.0,
        use_cache=False,
    )


LLADA = Family(
    name="llada",
    description="LLaDA 8B and 1.5, dense: masked diffusion, full attention, same position",
    source="arXiv 2502.09992",
    model_types=("llada",),
    architectures=("LLaDAModelLM",),
    prefix="model.",
    weights=(
        Weight("embed/tokens", "model.transformer.wte.weight", VOCABULARY),
        Weight("blocks/attention_norm/scale", _BLOCK + "attn_norm.weight"),
        Weight("blocks/attention/query", _BLOCK + "q_proj.weight", HEADS_OUT),
        Weight("blocks/attention/key", _BLOCK + "k_proj.weight", HEADS_OUT),
        Weight("blocks/attention/value", _BLOCK + "v_proj.weight", HEADS_OUT),
        Weight("blocks/attention/output", _BLOCK + "attn_out.weight", HEADS_IN),
        Weight("blocks/attention/query_bias", _BLOCK + "q_proj.bias", HEADS_BIAS),
        Weight("blocks/attention/key_bias", _BLOCK + "k_proj.bias", HEADS_BIAS),
        Weight("blocks/attention/value_bias", _BLOCK + "v_proj.bias", HEADS_BIAS),
        Weight("blocks/mlp_norm/scale", _BLOCK + "ff_norm.weight"),
        Weight("blocks/mlp/gate", _BLOCK + "ff_proj.weight", TRANSPOSE),
        Weight("blocks/mlp/up", _BLOCK + "up_proj.weight", TRANSPOSE),
        Weight("blocks/mlp/down", _BLOCK + "ff_out.weight", TRANSPOSE),
        Weight("final_norm/scale", "model.transformer.ln_f.weight"),
        Weight("head/tokens", "model.transformer.ff_out.weight", VOCABULARY),
    ),
    read_config=_read_config,
    write_config=_write_config,
    keys=(
        *config_keys(COUNT, "vocab_size", "embedding_size", "max_sequence_length", "d_model", "mlp_hidden_size"),
        *config_keys(COUNT, "n_heads", "n_kv_heads"),
        *config_keys(LAYERS, "n_layers"),
        *config_keys(POSITIVE, "rms_norm_eps", "rope_theta", "mlp_ratio"),
        *config_keys(NUMBER, "block_group_size"),
        *config_keys(STRING, "activation_type"),
        *config_keys(STRING, "block_type", "layer_norm_type", is_neutral=never),
        *config_keys(BOOL, "rope", "weight_tying", "multi_query_attention", "include_bias", "include_qkv_bias"),
        *config_keys(BOOL, "attention_layer_norm", "bias_for_layer_norm", "input_emb_norm", "layer_norm_with_affine"),
        *config_keys(BOOL, "alibi", "scale_logits", is_neutral=off),
    ),
    ignored_keys=(
        # Options of parts that are refused, such as ALiBi.
        *("alibi_bias_max", "attention_layer_norm_with_affine"),
        # Read only where the key that comes first is absent.
        "mlp_ratio",
        # Precision and kernels.
        *("rope_full_precision", "precision", "flash_attention"),
    ),
    tied=(("model.transformer.ff_out.weight", "model.transformer.wte.weight"),),
    causal=False,
    diffusion=Diffusion(
        shifted=False,
        objective="llada",
        sampler="llada_low_confidence",
        mask_ids=((126464, 126336),),
        code="GSAI-ML/LLaDA-8B-Base",
    ),
)
