"""Converts the tokenizer of a GGUF file to the files of a Hugging Face folder, which `Vocabulary.load` reads."""

import json
from collections.abc import Mapping
from typing import Any

from diffusion_lm.interop.name_maps.family import JsonObject

# llama.cpp's numbers of token types (`tokenizer.ggml.token_type`); the same as SentencePiece's.
_NORMAL, _CONTROL, _USER_DEFINED, _BYTE = 1, 3, 4, 6
_ROLES = {"bos": "bos_token", "eos": "eos_token", "padding": "pad_token", "unknown": "unk_token", "mask": "mask_token"}

# Pre-tokenizer pattern of LLaMA 3 and Qwen 2, which differ in how they group digits (`%s`).
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _byte_level(use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _split(digits: str) -> list[dict[str, Any]]:
    pattern = {"Regex": _WORDS % digits}
    return [
        {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False},
        _byte_level(use_regex=False),
    ]


_PRE_TOKENIZERS: Mapping[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "gpt-2": ([_byte_level(use_regex=True)], {}),
    "smollm": ([{"type": "Digits", "individual_digits": True}, _byte_level(use_regex=True)], {}),
    "llama-bpe": (_split(r"\p{N}{1,3}"), {"ignore_merges": True}),
    "qwen2": (_split(r"\p{N}"), {"normalizer": {"type": "NFC"}}),
}
"""By `tokenizer.ggml.pre`: the pre-tokenizers, and other keys of tokenizer.json that differ from GPT-2's."""


def tokenizer_files(values: JsonObject) -> tuple[dict[str, bytes], str]:
    """Returns the files by name, and one line that describes them or says why there are none.

    Args:
      values: the metadata of the file.
    """
    tokens = values.get("tokenizer.ggml.tokens")
    kind, pre = values.get("tokenizer.ggml.model"), values.get("tokenizer.ggml.pre", "default")
    if not tokens:
        return {}, "none in the file"
    if kind == "gpt2" and pre in _PRE_TOKENIZERS:
        files = {"tokenizer.json": _json(_byte_level_bpe(values, tokens, pre))}
        description = f"byte-level BPE ({pre}), {len(tokens):,} tokens"
    elif kind == "llama" and "tokenizer.ggml.scores" in values:
        files = {"tokenizer.model": _sentencepiece(values, tokens)}
        description = f"SentencePiece BPE, {len(tokens):,} tokens"
    else:
        which = f"pre-tokenizer {pre!r}" if kind == "gpt2" else f"kind {kind!r}"
        return (
            {},
            f"not written: its {which} is not supported; use the tokenizer.json that the model was published with",
        )
    named = {key: tokens[token] for role, key in _ROLES.items() if (token := _role(values, role)) is not None}
    return files | {"tokenizer_config.json": _json(named)}, description


def _role(values: JsonObject, name: str) -> int | None:
    """Returns the id of a special token; None if the metadata name none or one outside of the vocabulary."""
    token = values.get(f"tokenizer.ggml.{name}_token_id")
    return token if token is not None and 0 <= token < len(values["tokenizer.ggml.tokens"]) else None


def _json(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False, allow_nan=False).encode()


def _byte_level_bpe(values: JsonObject, tokens: list[str], pre: str) -> dict[str, Any]:
    steps, other = _PRE_TOKENIZERS[pre]
    types = values.get("tokenizer.ggml.token_type") or [_NORMAL] * len(tokens)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
        {"id": number, "content": token, **flags, "special": kind == _CONTROL}
        for number, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (_CONTROL, _USER_DEFINED)
    ]
    absent = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")
    model = dict.fromkeys(absent) | {
        "type": "BPE",
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": other.get("ignore_merges", False),
        "vocab": {token: number for number, token in enumerate(tokens)},
        "merges": [merge.split(" ", 1) for merge in values.get("tokenizer.ggml.merges", ())],
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": other.get("normalizer"),
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "post_processor": None,
        "decoder": {**_byte_level(use_regex=True), "add_prefix_space": True},
        "model": model,
    }


def _sentencepiece(values: JsonObject, tokens: list[str]) -> bytes:
    """Returns a SentencePiece model. The file has its pieces, scores and types in the same order."""
    from sentencepiece import sentencepiece_model_pb2

    messages: Any = sentencepiece_model_pb2

    proto = messages.ModelProto()
    scores = values["tokenizer.ggml.scores"]
    types = values.get("tokenizer.ggml.token_type") or [_NORMAL] * len(tokens)
    for piece, score, kind in zip(tokens, scores, types, strict=True):
        proto.pieces.add(piece=piece, score=score, type=kind)
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    trainer.model_type = messages.TrainerSpec.BPE
    trainer.vocab_size = len(tokens)
    trainer.byte_fallback = _BYTE in types
    for role, key in _ROLES.items():
        token = _role(values, role)
        if key in ("bos_token", "eos_token", "pad_token", "unk_token") and token is not None:
            setattr(trainer, f"{key.removesuffix('_token')}_piece", tokens[token])
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = values.get("tokenizer.ggml.add_space_prefix", True)
    normalizer.remove_extra_whitespaces = values.get("tokenizer.ggml.remove_extra_whitespaces", False)
    return proto.SerializeToString()
