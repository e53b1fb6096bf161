"""The tokenizer of a GGUF file as the files of a Hugging Face folder, which `Vocabulary.load` reads."""

import json
from collections.abc import Mapping
from typing import Any

FOLDER = "tokenizer"
"""Where a run folder keeps them."""

_CONTROL, _USER_DEFINED = 3, 4
_ROLES = {"bos": "bos_token", "eos": "eos_token", "padding": "pad_token", "unknown": "unk_token", "mask": "mask_token"}

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
"""How `tokenizer.ggml.pre` cuts a text before merging: the steps, and what else differs from GPT-2."""


def tokenizer_files(values: Mapping[str, Any]) -> tuple[dict[str, bytes], str]:
    """Returns the files, by name, and one line that says what they are, or why there are none.

    Args:
      values: the metadata of the file.
    """
    tokens = values.get("tokenizer.ggml.tokens")
    kind, pre = values.get("tokenizer.ggml.model"), values.get("tokenizer.ggml.pre", "default")
    if not tokens:
        return {}, "none in the file"
    if kind == "gpt2" and pre in _PRE_TOKENIZERS:
        files = {"tokenizer.json": _json(_byte_level_bpe(values, tokens, pre))}
        made = f"byte-level BPE ({pre}), {len(tokens):,} tokens"
    elif kind == "llama" and "tokenizer.ggml.scores" in values:
        files = {"tokenizer.model": _sentencepiece(values, tokens)}
        made = f"SentencePiece BPE, {len(tokens):,} tokens"
    else:
        which = f"pre-tokenizer {pre!r}" if kind == "gpt2" else f"kind {kind!r}"
        return {}, f"left out: its {which} is unknown here; take the tokenizer.json that the model was published with"
    named = {ours: tokens[token] for theirs, ours in _ROLES.items() if (token := _role(values, theirs)) is not None}
    return files | {"tokenizer_config.json": _json(named)}, made


def _role(values: Mapping[str, Any], name: str) -> int | None:
    token = values.get(f"tokenizer.ggml.{name}_token_id")
    return token if token is not None and 0 <= token < len(values["tokenizer.ggml.tokens"]) else None


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, allow_nan=False).encode()


def _byte_level_bpe(values: Mapping[str, Any], tokens: list[str], pre: str) -> dict[str, Any]:
    steps, other = _PRE_TOKENIZERS[pre]
    types = values.get("tokenizer.ggml.token_type") or [1] * len(tokens)
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


def _sentencepiece(values: Mapping[str, Any], tokens: list[str]) -> bytes:
    """Returns a SentencePiece model: the file has its pieces, scores and types, which are numbered alike."""
    from sentencepiece import sentencepiece_model_pb2

    messages: Any = sentencepiece_model_pb2

    proto = messages.ModelProto()
    scores = values["tokenizer.ggml.scores"]
    types = values.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    for piece, score, kind in zip(tokens, scores, types, strict=True):
        proto.pieces.add(piece=piece, score=score, type=kind)
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    trainer.model_type = messages.TrainerSpec.BPE
    trainer.vocab_size = len(tokens)
    trainer.byte_fallback = 6 in types
    for theirs, ours in _ROLES.items():
        token = _role(values, theirs)
        if ours in ("bos_token", "eos_token", "pad_token", "unk_token") and token is not None:
            setattr(trainer, f"{ours.removesuffix('_token')}_piece", tokens[token])
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = values.get("tokenizer.ggml.add_space_prefix", True)
    normalizer.remove_extra_whitespaces = values.get("tokenizer.ggml.remove_extra_whitespaces", False)
    return proto.SerializeToString()
