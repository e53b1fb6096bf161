"""RoBERTa, XLM-R and XLM-R-XL: encoders whose learned positions start at the id of the padding token + 1.

transformers counts only real tokens, so padding never shifts a position. `positions` and `segment_ids` count the same
way here, and `TransformerSpec.position_offset` holds the start. These models have token type 0 only; its vector is
added to the position table.
"""

from typing import Any

from diffusion_lm.interop.name_maps.config_keys import BOOL, COUNT, LAYERS, POSITIVE, STRING, config_keys, off
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
        add_row="roberta.embeddings.token_type_embeddings.weight",
    ),
    Weight("blocks/attention/query", _SELF + "query.weight", HEADS_OUT),
    Weight("blocks/attention/key", _SELF + "key.weight", HEADS_OUT),
    Weight("blocks/attention/value", _SELF + "value.weight", HEADS_OUT),
    Weight("blocks/attention/query_bias", _SELF + "query.bias", HEADS_BIAS),
    Weight("blocks/attention/key_bias", _SELF + "key.bias", HEADS_BIAS),
    Weight("blocks/attention/value_bias", _SELF + "value.bias", HEADS_BIAS),
    Weight("blocks/attention/output", _LAYER + "attention.output.dense.weight", HEADS_IN),
    Weight("blocks/attention/output_bias", _LAYER + "attention.output.dense.bias"),
    Weight("blocks/mlp/up", _LAYER + "intermediate.dense.weight", TRANSPOSE),
    Weight("blocks/mlp/up_bias", _LAYER + "intermediate.dense.bias"),
    Weight("blocks/mlp/down", _LAYER + "output.dense.weight", TRANSPOSE),
    Weight("blocks/mlp/down_bias", _LAYER + "output.dense.bias"),
    Weight("head/transform/dense", "lm_head.dense.weight", TRANSPOSE),
    Weight("head/transform/dense_bias", "lm_head.dense.bias"),
    Weight("head/transform/norm/scale", "lm_head.layer_norm.weight"),
    Weight("head/transform/norm/bias", "lm_head.layer_norm.bias"),
    Weight("head/bias", "lm_head.bias", VOCABULARY),
)
OLD_NORM_NAMES = ((r"LayerNorm\.weight$", "LayerNorm.gamma"), (r"LayerNorm\.bias$", "LayerNorm.beta"))
"""Names of the norms in files that were converted from TensorFlow."""

_TIED = (
    ("lm_head.decoder.weight", "roberta.embeddings.word_embeddings.weight"),
    ("lm_head.decoder.bias", "lm_head.bias"),
)
_IGNORED_TENSORS = (
    r"roberta\.embeddings\.(position_ids|token_type_ids)",
    r"roberta\.pooler\.dense\.(weight|bias)",  # the input of a classifier, not of the language model
)


def _absolute_or_rope(value: object) -> bool:
    return value in ("absolute", "rope")


ENCODER_KEYS = (
    *config_keys(COUNT, "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads"),
    *config_keys(COUNT, "max_position_embeddings", "type_vocab_size"),
    *config_keys(LAYERS, "num_hidden_layers"),
    *config_keys(STRING, "hidden_act"),
    *config_keys(POSITIVE, "layer_norm_eps"),
    *config_keys(BOOL, "tie_word_embeddings"),
    *config_keys(BOOL, "is_decoder", "add_cross_attention", is_neutral=off),
    *config_keys(STRING, "position_embedding_type", is_neutral=_absolute_or_rope),
)
IGNORED_KEYS = (
    "type_vocab_size",  # the shape of the tensor of token types gives it
    *("pooler_.*", "classifier_.*", "directionality"),
)


def encoder_spec(config: CheckpointConfig) -> SpecFields:
    """Returns the fields that BERT and RoBERTa share; norms come after the sublayers (post-norm)."""
    # With an untied head, transformers gives the decoder a second bias, and versions differ in which one they use.
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
    """Returns the keys that BERT and RoBERTa share; inverse of `encoder_spec`."""
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


def _read_roberta(config: CheckpointConfig) -> SpecFields:
    fields = encoder_spec(config)
    padding = config.get("pad_token_id", 1)
    if type(padding) is not int or padding < 0:
        raise config.unsupported("pad_token_id", "positions start at the id of the padding token + 1")
    offset = padding + 1
    return fields | {"position_offset": offset, "max_positions": fields["max_positions"] - offset}


def _write_roberta(spec: TransformerSpec) -> dict[str, Any]:
    return encoder_config(spec) | {"pad_token_id": spec.position_offset - 1, "type_vocab_size": 1}


def _read_xl(config: CheckpointConfig) -> SpecFields:
    own = {"norm_placement": "pre", "embedding_norm": False, "norm_eps": config.get("layer_norm_eps", 1e-5)}
    return _read_roberta(config) | own


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
    read_config=_read_roberta,
    write_config=_write_roberta,
    keys=ENCODER_KEYS,
    ignored_keys=IGNORED_KEYS,
    tied=_TIED,
    ignored_tensors=_IGNORED_TENSORS,
    old_names=OLD_NORM_NAMES,
    causal=False,
)

XLM_ROBERTA_XL = Family(
    name="xlm-roberta-xl",
    description="XLM-R XL and XXL: XLM-R with pre-norm layers",
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
    read_config=_read_xl,
    write_config=_write_roberta,
    keys=ENCODER_KEYS,
    ignored_keys=IGNORED_KEYS,
    tied=_TIED,
    ignored_tensors=_IGNORED_TENSORS,
    causal=False,
)
