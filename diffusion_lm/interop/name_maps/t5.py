"""T5: encoder and decoder with a relative bias for all of their layers or (umT5) for each, and a head, tied or not."""

import re
from collections.abc import Iterator
from typing import Any

from diffusion_lm.core.errors import ConfigError
from diffusion_lm.interop.name_maps.family import HEADS_IN, HEADS_OUT, TRANSPOSED, VOCABULARY, Config, Family, Weight
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


def _stream(ours: str, theirs: str, has_cross: bool) -> Iterator[Weight]:
    """Yields the lines of one stack; the layers of a block are numbered, and cross-attention moves the MLP to 2."""
    block, mlp = f"{theirs}.block.{{i}}.layer.", 2 if has_cross else 1
    bias = "SelfAttention.relative_attention_bias.weight"
    yield Weight(f"{ours}relative_bias", f"{theirs}.block.0.layer.0.{bias}")
    yield Weight(f"{ours}blocks/attention/relative_bias", f"{block}0.{bias}")
    attentions = [("attention", f"{block}0", "SelfAttention"), ("cross_attention", f"{block}1", "EncDecAttention")]
    for name, layer, module in attentions if has_cross else attentions[:1]:
        yield Weight(f"{ours}blocks/{name}_norm/scale", f"{layer}.layer_norm.weight")
        for array, tensor in (("query", "q"), ("key", "k"), ("value", "v")):
            yield Weight(f"{ours}blocks/{name}/{array}", f"{layer}.{module}.{tensor}.weight", HEADS_OUT)
        yield Weight(f"{ours}blocks/{name}/output", f"{layer}.{module}.o.weight", HEADS_IN)
    dense = f"{block}{mlp}.DenseReluDense."
    yield Weight(f"{ours}blocks/mlp_norm/scale", f"{block}{mlp}.layer_norm.weight")
    yield Weight(f"{ours}blocks/mlp/gate", dense + "wi_0.weight", TRANSPOSED, gated=True)
    yield Weight(f"{ours}blocks/mlp/up", dense + "wi_1.weight", TRANSPOSED, gated=True)
    yield Weight(f"{ours}blocks/mlp/up", dense + "wi.weight", TRANSPOSED, gated=False)
    yield Weight(f"{ours}blocks/mlp/down", dense + "wo.weight", TRANSPOSED)
    yield Weight(f"{ours}final_norm/scale", f"{theirs}.final_layer_norm.weight")


_WEIGHTS = (
    Weight("embed/tokens", "shared.weight", VOCABULARY),
    *_stream("encoder/", "encoder", has_cross=False),
    *_stream("", "decoder", has_cross=True),
    Weight("head/tokens", HEAD, VOCABULARY),
)
_COPIES = tuple(
    (name, "shared.weight") for name in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", HEAD)
)
# Early files have a bias of cross-attention, which no version of the network reads.
_IGNORABLE = (r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",)


def _fields(config: Config, feed_forward: str) -> dict[str, Any]:
    """Returns the fields that all of them say in the same words."""
    config.refuse(is_encoder_decoder=True, is_decoder=False)
    mlp, gelu = config.choose("feed_forward_proj", _ACTIVATIONS, feed_forward)
    layers = config.need("num_layers")
    if layers < 1:
        raise config.unsupported("num_layers", "an encoder-decoder has layers in its encoder")
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


def _since_5(config: Config) -> bool:
    """Whether transformers 5 wrote the file: it calls every T5 tied, and ties those whose head is not in the files."""
    version = re.match(r"\d+", str(config.get("transformers_version", "")))
    return version is not None and int(version[0]) >= 5


def _t5_spec(config: Config) -> dict[str, Any]:
    told = config.get("tie_word_embeddings", True)
    scaled = config.get("scale_decoder_outputs", told)
    tied = told and (scaled or not _since_5(config) or HEAD not in config.tensors)
    if scaled and not tied:
        raise config.unsupported("scale_decoder_outputs", "logits are scaled where tie_word_embeddings is true")
    return _fields(config, "relu") | dict(tied_embeddings=tied, tied_logit_scale=scaled)


def _mt5_spec(config: Config) -> dict[str, Any]:
    since_5 = _since_5(config)
    tied = config.get("tie_word_embeddings", True) and not (since_5 and HEAD in config.tensors)
    return _fields(config, "gated-gelu") | dict(tied_embeddings=tied, tied_logit_scale=tied and not since_5)


def _umt5_spec(config: Config) -> dict[str, Any]:
    tied = config.get("tie_word_embeddings", True)
    if tied and _since_5(config) and HEAD in config.tensors:
        raise config.unsupported(
            "transformers_version", "transformers 5 scales the logits of an umT5 that has a head of its own, 4 does not"
        )
    own = dict(tied_embeddings=tied, tied_logit_scale=tied, relative_per_layer=True)
    return _fields(config, "gated-gelu") | own


def _config(spec: TransformerSpec) -> dict[str, Any]:
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


def _t5_config(spec: TransformerSpec) -> dict[str, Any]:
    return _config(spec) | {"scale_decoder_outputs": spec.tied_embeddings}


def _mt5_config(spec: TransformerSpec) -> dict[str, Any]:
    if spec.tied_embeddings:
        raise ConfigError(
            "transformers 4 scales the logits of an mT5 whose embeddings are tied and transformers 5 does not",
            where="TransformerSpec.tied_embeddings",
            fix="Export it as t5.",
        )
    return _config(spec)


def _umt5_config(spec: TransformerSpec) -> dict[str, Any]:
    if not spec.tied_embeddings:
        raise ConfigError(
            "transformers 5 scales the logits of an umT5 that has a head of its own and transformers 4 does not",
            where="TransformerSpec.tied_embeddings",
            fix="Export networks of this kind whose embeddings are tied.",
        )
    return _config(spec)


T5 = Family(
    name="t5",
    description="T5 1.0 and 1.1, Flan-T5, UL2 and ByT5, and what T5X stores of T5 and mT5",
    source="arXiv 1910.10683, 2105.13626",
    model_types=("t5",),
    architectures=("T5ForConditionalGeneration", "T5WithLMHeadModel", "T5Model"),
    prefix="",
    weights=_WEIGHTS,
    copies=_COPIES,
    ignorable=_IGNORABLE,
    spec=_t5_spec,
    config=_t5_config,
)

MT5 = Family(
    name="mt5",
    description="mT5, the multilingual T5 1.1",
    source="arXiv 2010.11934",
    model_types=("mt5",),
    architectures=("MT5ForConditionalGeneration", "MT5Model"),
    prefix="",
    weights=_WEIGHTS,
    copies=_COPIES,
    ignorable=_IGNORABLE,
    spec=_mt5_spec,
    config=_mt5_config,
)

UMT5 = Family(
    name="umt5",
    description="umT5, an mT5 whose layers each have a relative bias",
    source="arXiv 2304.09151",
    model_types=("umt5",),
    architectures=("UMT5ForConditionalGeneration", "UMT5Model"),
    prefix="",
    weights=_WEIGHTS,
    copies=_COPIES,
    ignorable=_IGNORABLE,
    spec=_umt5_spec,
    config=_umt5_config,
)
