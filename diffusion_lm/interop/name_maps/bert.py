"""BERT with its masked language model: as RoBERTa, but positions are counted from 0 and the head has other names.

Of token types only type 0 is read (a single text, no pairs); its vector is added to the table of positions.
"""

import dataclasses
from typing import Any

from diffusion_lm.interop.name_maps import roberta
from diffusion_lm.interop.name_maps.family import Config, Family
from diffusion_lm.nn.transformer import TransformerSpec

_HEAD = {
    "lm_head.dense.": "cls.predictions.transform.dense.",
    "lm_head.layer_norm.": "cls.predictions.transform.LayerNorm.",
    "lm_head.bias": "cls.predictions.bias",
    "roberta.": "bert.",
}


def _renamed(name: str) -> str:
    for old, new in _HEAD.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    raise AssertionError(name)


def _config(spec: TransformerSpec) -> dict[str, Any]:
    return roberta.encoder_config(spec) | {"type_vocab_size": 1}


def _spec(config: Config) -> dict[str, Any]:
    return roberta.encoder_spec(config)


FAMILY = Family(
    name="bert",
    description="BERT with its masked language model, for single texts",
    source="arXiv 1810.04805",
    model_types=("bert",),
    architectures=("BertForMaskedLM", "BertForPreTraining"),
    prefix="bert.",
    weights=tuple(
        dataclasses.replace(
            line,
            theirs=_renamed(line.theirs),
            plus_row=None if line.plus_row is None else _renamed(line.plus_row),
        )
        for line in roberta.ROBERTA.weights
    ),
    copies=(
        ("cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"),
        ("cls.predictions.decoder.bias", "cls.predictions.bias"),
    ),
    ignorable=(
        r"bert\.embeddings\.(position_ids|token_type_ids)",
        r"bert\.pooler\.dense\.(weight|bias)",
        r"cls\.seq_relationship\.(weight|bias)",  # says whether two texts belong together
    ),
    renames=roberta.NORM_RENAMES,
    spec=_spec,
    config=_config,
    causal=False,
)
