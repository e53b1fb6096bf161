"""T5, mT5 and umT5: encoder-decoders with relative position biases.

T5 and mT5 have one bias table per stack, which all its layers share; umT5 has one per layer. The head is the embedding
or a table of its own.
"""

import re
from collections.abc import Iterator
from typing import Any

from diffusion_lm.core.errors import ConfigError
from diffusion_lm.interop.name_maps.config_keys import BOOL, COUNT, LAYERS, POSITIVE, STRING, config_keys, off
from diffusion_lm.interop.name_maps.family import (
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

HEAD = "lm_head.weight"

_ACTIVATIONS = {
    "gated-gelu": ("geglu", "tanh"),
    "gated-gelu_new": ("geglu", "tanh"),
    "gated-silu": ("swiglu", "tanh"),
    "gelu_new": ("gelu", "tanh"),
    "gelu": ("gelu", "exact"),
    "relu": ("relu", "tanh"),
}
_NAMES = {shape: name for name, shape in reversed(_ACTIVATIONS.items())}


def _stack(path: str, stack: str, has_cross: bool) -> Iterator[Weight]:
    """Yields the lines of the encoder or the decoder."""
    # The sublayers of a block are numbered: self-attention 0, cross-attention 1, and the MLP comes last.
    block, mlp = f"{stack}.block.{{i}}.layer.", 2 if has_cross else 1
    bias = "SelfAttention.relative_attention_bias.weight"
    yield Weight(f"{path}relative_bias", f"{stack}.block.0.layer.0.{bias}")
    yield Weight(f"{path}blocks/attention/relative_bias", f"{block}0.{bias}")
    attentions = [("attention", f"{block}0", "SelfAttention"), ("cross_attention", f"{block}1", "EncDecAttention")]
    for name, layer, module in attentions if has_cross else attentions[:1]:
        yield Weight(f"{path}blocks/{name}_norm/scale", f"{layer}.layer_norm.weight")
        for array, tensor in (("query", "q"), ("key", "k"), ("value", "v")):
            yield Weight(f"{path}blocks/{name}/{array}", f"{layer}.{module}.{tensor}.weight", HEADS_OUT)
        yield Weight(f"{path}blocks/{name}/output", f"{layer}.{module}.o.weight", HEADS_IN)
    dense = f"{block}{mlp}.DenseReluDense."
    yield Weight(f"{path}blocks/mlp_norm/scale", f"{block}{mlp}.layer_norm.weight")
    yield Weight(f"{path}blocks/mlp/gate", dense + "wi_0.weight", TRANSPOSE, gated=True)
    yield Weight(f"{path}blocks/mlp/up", dense + "wi_1.weight", TRANSPOSE, gated=True)
    yield Weight(f"{path}blocks/mlp/up", dense + "wi.weight", TRANSPOSE, gated=False)
    yield Weight(f"{path}blocks/mlp/down", dense + "wo.weight", TRANSPOSE)
    yield Weight(f"{path}final_norm/scale", f"{stack}.final_layer_norm.weight")


_WEIGHTS = (
    Weight("embed/tokens", "shared.weight", VOCABULARY),
    *_stack("encoder/", "encoder", has_cross=False),
    *_stack("", "decoder", has_cross=True),
    Weight("head/tokens", HEAD, VOCABULARY),
)
_TIED = tuple((name, "shared.weight") for name in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", HEAD))
# Early files have a relative bias of cross-attention, which no version of the class reads.
_IGNORED_TENSORS = (r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",)


_KEYS = (
    *config_keys(COUNT, "vocab_size", "d_model", "num_heads", "d_kv", "d_ff"),
    *config_keys(LAYERS, "num_layers", "num_decoder_layers"),
    *config_keys(COUNT, "relative_attention_num_buckets", "relative_attention_max_distance"),
    *config_keys(STRING, "feed_forward_proj"),
    *config_keys(POSITIVE, "layer_norm_epsilon"),
    *config_keys(BOOL, "tie_word_embeddings"),
    *config_keys(BOOL, "is_encoder_decoder", "is_decoder", is_neutral=off),
)
_IGNORED_KEYS = (
    # transformers computes the first two from `feed_forward_proj`.
    *("dense_act_fn", "is_gated_act"),
    # T5 has relative positions, so the length of its pre-training sequences limits nothing.
    "n_positions",
    # The tokenizer's number of sentinel tokens.
    "extra_ids",
)


def _fields(config: CheckpointConfig, feed_forward: str) -> SpecFields:
    """Returns the fields that T5, mT5 and umT5 share.

    Args:
      config: the contents of config.json.
      feed_forward: default of `feed_forward_proj` in the family's class.
    """
    config.refuse(is_encoder_decoder=True, is_decoder=False)
    mlp, gelu = config.choose("feed_forward_proj", _ACTIVATIONS, feed_forward)
    layers = config.need("num_layers")
    if layers < 1:
        raise config.unsupported("num_layers", "an encoder-decoder needs at least one encoder layer")
    return dict(
        vocab_size=config.need("vocab_size"),
        num_layers=config.get("num_decoder_layers", layers),
        encoder_layers=layers,
        model_dim=config.need("d_model"),
        num_heads=config.need("num_heads"),
        head_dim=config.need("d_kv"),
        mlp_dim=config.need("d_ff"),
        mlp=mlp,
        gelu=gelu,
        norm_eps=config.get("layer_norm_epsilon", 1e-6),
        relative_buckets=config.get("relative_attention_num_buckets", 32),
        relative_max_distance=config.get("relative_attention_max_distance", 128),
        relative_bidirectional=False,
    )


def _by_version_5(config: CheckpointConfig) -> bool:
    """Returns whether transformers 5 wrote the file.

    It writes `tie_word_embeddings: true` for every T5, and ties those whose files have no head. Version 4 writes the
    truth.
    """
    version = re.match(r"\d+", str(config.get("transformers_version", "")))
    return version is not None and int(version[0]) >= 5


def _read_t5(config: CheckpointConfig) -> SpecFields:
    declared = config.get("tie_word_embeddings", True)
    scaled = config.get("scale_decoder_outputs", declared)
    tied = declared and (scaled or not _by_version_5(config) or HEAD not in config.tensors)
    # T5 1.0 is tied and scales its logits by D**-0.5, T5 1.1 is neither. A separate head with
    # scaled logits does not exist here.
    if scaled and not tied:
        raise config.unsupported("scale_decoder_outputs", "logits are scaled only where tie_word_embeddings is true")
    return _fields(config, "relu") | dict(tied_embeddings=tied, tied_logit_scale=scaled)


def _read_mt5(config: CheckpointConfig) -> SpecFields:
    version_5 = _by_version_5(config)
    tied = config.get("tie_word_embeddings", True) and not (version_5 and HEAD in config.tensors)
    # Version 4 scales the logits of a tied mT5 and version 5 does not: the version that wrote the file decides.
    return _fields(config, "gated-gelu") | dict(tied_embeddings=tied, tied_logit_scale=tied and not version_5)


def _read_umt5(config: CheckpointConfig) -> SpecFields:
    tied = config.get("tie_word_embeddings", True)
    if tied and _by_version_5(config) and HEAD in config.tensors:
        raise config.unsupported(
            "transformers_version", "transformers 5 scales the logits of an umT5 with a separate head, 4 does not"
        )
    own = dict(tied_embeddings=tied, tied_logit_scale=tied, relative_per_layer=True)
    return _fields(config, "gated-gelu") | own


def _write_common(spec: TransformerSpec) -> dict[str, Any]:
    return dict(
        is_encoder_decoder=True,
        vocab_size=spec.vocab_size,
        num_layers=spec.encoder_layers,
        num_decoder_layers=spec.num_layers,
        d_model=spec.model_dim,
        num_heads=spec.num_heads,
        d_kv=spec.head_dim,
        d_ff=spec.mlp_dim,
        feed_forward_proj=_NAMES[spec.mlp, spec.gelu if spec.mlp in ("geglu", "gelu") else "tanh"],
        layer_norm_epsilon=spec.norm_eps,
        relative_attention_num_buckets=spec.relative_buckets,
        relative_attention_max_distance=spec.relative_max_distance,
        tie_word_embeddings=spec.tied_embeddings,
    )


def _write_t5(spec: TransformerSpec) -> dict[str, Any]:
    return _write_common(spec) | {"scale_decoder_outputs": spec.tied_embeddings}


def _write_mt5(spec: TransformerSpec) -> dict[str, Any]:
    if spec.tied_embeddings:
        raise ConfigError(
            "transformers 4 scales the logits of an mT5 with tied embeddings, transformers 5 does not",
            where="TransformerSpec.tied_embeddings",
            fix="Export it with --layout t5.",
        )
    return _write_common(spec)


def _write_umt5(spec: TransformerSpec) -> dict[str, Any]:
    if not spec.tied_embeddings:
        raise ConfigError(
            "transformers 5 scales the logits of an umT5 with a separate head, transformers 4 does not",
            where="TransformerSpec.tied_embeddings",
            fix="Only an umT5 with tied embeddings can be exported.",
        )
    return _write_common(spec)


T5 = Family(
    name="t5",
    description="T5 1.0 and 1.1, Flan-T5, UL2 and ByT5; also T5X checkpoints of T5 and mT5",
    source="arXiv 1910.10683, 2105.13626",
    model_types=("t5",),
    architectures=("T5ForConditionalGeneration", "T5WithLMHeadModel", "T5Model"),
    prefix="",
    weights=_WEIGHTS,
    read_config=_read_t5,
    write_config=_write_t5,
    keys=(*_KEYS, *config_keys(BOOL, "scale_decoder_outputs")),
    ignored_keys=_IGNORED_KEYS,
    tied=_TIED,
    ignored_tensors=_IGNORED_TENSORS,
)

MT5 = Family(
    name="mt5",
    description="mT5, the multilingual T5 1.1",
    source="arXiv 2010.11934",
    model_types=("mt5",),
    architectures=("MT5ForConditionalGeneration", "MT5Model"),
    prefix="",
    weights=_WEIGHTS,
    read_config=_read_mt5,
    write_config=_write_mt5,
    keys=_KEYS,
    ignored_keys=_IGNORED_KEYS,
    tied=_TIED,
    ignored_tensors=_IGNORED_TENSORS,
)

UMT5 = Family(
    name="umt5",
    description="umT5: mT5 with a relative bias in each layer",
    source="arXiv 2304.09151",
    model_types=("umt5",),
    architectures=("UMT5ForConditionalGeneration", "UMT5Model"),
    prefix="",
    weights=_WEIGHTS,
    read_config=_read_umt5,
    write_config=_write_umt5,
    keys=_KEYS,
    ignored_keys=_IGNORED_KEYS,
    tied=_TIED,
    ignored_tensors=_IGNORED_TENSORS,
)
