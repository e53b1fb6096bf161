"""BERT with its masked language model: as RoBERTa, but positions start at 0 and the head has other names.

Inputs are single texts, so only token type 0 is used; its vector is added to the position table.
"""

import dataclasses
from typing import Any

from diffusion_lm.interop.name_maps import roberta
from diffusion_lm.interop.name_maps.family import Family
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


def _write_config(spec: TransformerSpec) -> dict[str, Any]:
    return roberta.encoder_config(spec) | {"type_vocab_size": 1}


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
            tensor=_renamed(line.tensor),
            add_row=None if line.add_row is None else _renamed(line.add_row),
        )
        for line in roberta.ROBERTA.weights
    ),
    read_config=roberta.encoder_spec,
    write_config=_write_config,
    keys=roberta.ENCODER_KEYS,
    ignored_keys=roberta.IGNORED_KEYS,
    tied=(
        ("cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"),
        ("cls.predictions.decoder.bias", "cls.predictions.bias"),
    ),
    ignored_tensors=(
        r"bert\.embeddings\.(position_ids|token_type_ids)",
        r"bert\.pooler\.dense\.(weight|bias)",
        r"cls\.seq_relationship\.(weight|bias)",  # next sentence prediction
    ),
    old_names=roberta.OLD_NORM_NAMES,
    causal=False,
)
