"""RoBERTa, XLM-R and XLM-R-XL: encoders whose learned positions are counted from the id of the padding token + 1.

Padding has no position of its own there and moves nobody else's, which is what `positions` and `segment_ids` mean here.
Token types: these models know only type 0, whose vector is added to the table of positions.
"""

from typing import Any

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
from diffusion_lm.nn.transformer import TransformerSpec

_LAYER, _SELF = "roberta.encoder.layer.{i}.", "roberta.encoder.layer.{i}.attention.self."
_ACTIVATIONS = {
    "gelu": ("gelu", "exact"),
    "gelu_new": ("gelu", "tanh"),
    "gelu_pytorch_tanh": ("gelu", "tanh"),
    "relu": ("relu", "exact"),
}

_COMMON = (
    Weight("embed/tokens", "roberta.embeddings.word_embeddings.weight", VOCABULARY),
    Weight(
        "positions",
        "roberta.embeddings.position_embeddings.weight",
        plus_row="roberta.embeddings.token_type_embeddings.weight",
    ),
    Weight("blocks/attention/query", _SELF + "query.weight", HEADS_OUT),
    Weight("blocks/attention/key", _SELF + "key.weight", HEADS_OUT),
    Weight("blocks/attention/value", _SELF + "value.weight", HEADS_OUT),
    Weight("blocks/attention/query_bias", _SELF + "query.bias", HEADS_BIAS),
    Weight("blocks/attention/key_bias", _SELF + "key.bias", HEADS_BIAS),
    Weight("blocks/attention/value_bias", _SELF + "value.bias", HEADS_BIAS),
    Weight("blocks/attention/output", _LAYER + "attention.output.dense.weight", HEADS_IN),
    Weight("blocks/attention/output_bias", _LAYER + "attention.output.dense.bias"),
    Weight("blocks/mlp/up", _LAYER + "intermediate.dense.weight", TRANSPOSED),
    Weight("blocks/mlp/up_bias", _LAYER + "intermediate.dense.bias"),
    Weight("blocks/mlp/down", _LAYER + "output.dense.weight", TRANSPOSED),
    Weight("blocks/mlp/down_bias", _LAYER + "output.dense.bias"),
    Weight("head/transform/dense", "lm_head.dense.weight", TRANSPOSED),
    Weight("head/transform/dense_bias", "lm_head.dense.bias"),
    Weight("head/transform/norm/scale", "lm_head.layer_norm.weight"),
    Weight("head/transform/norm/bias", "lm_head.layer_norm.bias"),
    Weight("head/bias", "lm_head.bias", VOCABULARY),
)
NORM_RENAMES = ((r"LayerNorm\.weight$", "LayerNorm.gamma"), (r"LayerNorm\.bias$", "LayerNorm.beta"))
"""What files converted from TensorFlow call them."""

_COPIES = (
    ("lm_head.decoder.weight", "roberta.embeddings.word_embeddings.weight"),
    ("lm_head.decoder.bias", "lm_head.bias"),
)
_IGNORABLE = (
    r"roberta\.embeddings\.(position_ids|token_type_ids)",
    r"roberta\.pooler\.dense\.(weight|bias)",  # reads one token for a classifier, is no part of the language model
)


def encoder_spec(config: Config) -> dict[str, Any]:
    """Returns the fields that the encoders of the BERT family say in the same words; norms stand behind the layers."""
    # Untied, transformers gives the decoder a second bias, and versions differ in which of the two they use.
    config.refuse(tie_word_embeddings=True)
    config.refuse(is_decoder=False, add_cross_attention=False, position_embedding_type="absolute")
    mlp, gelu = config.choose("hidden_act", _ACTIVATIONS, "gelu")
    width, heads = config.need("hidden_size"), config.need("num_attention_heads")
    return dict(
        vocab_size=config.need("vocab_size"),
        num_layers=config.need("num_hidden_layers"),
        model_dim=width,
        num_heads=heads,
        head_dim=width // heads,
        mlp_dim=config.need("intermediate_size"),
        mlp=mlp,
        gelu=gelu,
        norm="layernorm",
        norm_eps=config.get("layer_norm_eps", 1e-12),
        norm_placement="post",
        embedding_norm=True,
        position="learned",
        max_positions=config.need("max_position_embeddings"),
        tied_logit_scale=False,
        use_bias=True,
        attention_scale="inverse_sqrt",
        head_transform=True,
        head_bias=True,
        embedding_std=0.02,
    )


def encoder_config(spec: TransformerSpec) -> dict[str, Any]:
    """Returns what the encoders of the BERT family say in the same words; inverse of `encoder_spec`."""
    activations = {value: key for key, value in reversed(_ACTIVATIONS.items())}
    return dict(
        vocab_size=spec.vocab_size,
        num_hidden_layers=spec.num_layers,
        hidden_size=spec.model_dim,
        num_attention_heads=spec.num_heads,
        intermediate_size=spec.mlp_dim,
        hidden_act=activations[spec.mlp, spec.gelu if spec.mlp == "gelu" else "exact"],
        layer_norm_eps=spec.norm_eps,
        max_position_embeddings=(spec.max_positions or 0) + spec.position_offset,
        tie_word_embeddings=spec.tied_embeddings,
    )


def _roberta_spec(config: Config) -> dict[str, Any]:
    fields = encoder_spec(config)
    padding = config.get("pad_token_id", 1)
    if type(padding) is not int or padding < 0:
        raise config.unsupported("pad_token_id", "positions are counted from the id of the padding")
    offset = padding + 1
    return fields | {"position_offset": offset, "max_positions": fields["max_positions"] - offset}


def _roberta_config(spec: TransformerSpec) -> dict[str, Any]:
    return encoder_config(spec) | {"pad_token_id": spec.position_offset - 1, "type_vocab_size": 1}


def _xl_spec(config: Config) -> dict[str, Any]:
    own = {"norm_placement": "pre", "embedding_norm": False, "norm_eps": config.get("layer_norm_eps", 1e-5)}
    return _roberta_spec(config) | own


ROBERTA = Family(
    name="roberta",
    description="RoBERTa and XLM-R with their masked language model",
    source="arXiv 1907.11692, 1911.02116",
    model_types=("roberta", "xlm-roberta", "camembert"),
    architectures=("RobertaForMaskedLM", "XLMRobertaForMaskedLM", "CamembertForMaskedLM"),
    prefix="roberta.",
    weights=(
        *_COMMON,
        Weight("embedding_norm/scale", "roberta.embeddings.LayerNorm.weight"),
        Weight("embedding_norm/bias", "roberta.embeddings.LayerNorm.bias"),
        Weight("blocks/attention_norm/scale", _LAYER + "attention.output.LayerNorm.weight"),
        Weight("blocks/attention_norm/bias", _LAYER + "attention.output.LayerNorm.bias"),
        Weight("blocks/mlp_norm/scale", _LAYER + "output.LayerNorm.weight"),
        Weight("blocks/mlp_norm/bias", _LAYER + "output.LayerNorm.bias"),
    ),
    copies=_COPIES,
    ignorable=_IGNORABLE,
    renames=NORM_RENAMES,
    spec=_roberta_spec,
    config=_roberta_config,
    causal=False,
)

XLM_ROBERTA_XL = Family(
    name="xlm-roberta-xl",
    description="XLM-R XL and XXL: XLM-R with norms in front of the layers",
    source="arXiv 2105.00572",
    model_types=("xlm-roberta-xl",),
    architectures=("XLMRobertaXLForMaskedLM",),
    prefix="roberta.",
    weights=(
        *_COMMON,
        Weight("blocks/attention_norm/scale", _LAYER + "attention.self_attn_layer_norm.weight"),
        Weight("blocks/attention_norm/bias", _LAYER + "attention.self_attn_layer_norm.bias"),
        Weight("blocks/mlp_norm/scale", _LAYER + "LayerNorm.weight"),
        Weight("blocks/mlp_norm/bias", _LAYER + "LayerNorm.bias"),
        Weight("final_norm/scale", "roberta.encoder.LayerNorm.weight"),
        Weight("final_norm/bias", "roberta.encoder.LayerNorm.bias"),
    ),
    copies=_COPIES,
    ignorable=_IGNORABLE,
    spec=_xl_spec,
    config=_roberta_config,
    causal=False,
)
