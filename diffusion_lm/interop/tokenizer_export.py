"""A vocabulary as the tokenizer files that `transformers` reads: tokenizer.json, its roles, a SentencePiece model.

A `Vocabulary` of ours is a `tokenizer.json` with tokens behind it, or a SentencePiece model. The second is written as a
`tokenizer.json` too (its pieces, its normalisation, its white space), since the classes that read a bare
`tokenizer.model` each expect the one of their own family. What is written is then tried: on every piece of text and on
a few awkward texts it must give the ids that the vocabulary gives. One thing differs, as with every tokenizer of
transformers: text that spells a special token (or a byte, `<0x41>`) becomes it, and with a `Vocabulary` it never does.
"""

import base64
import json
import re
from typing import Any

from diffusion_lm.core.errors import ConfigError
from diffusion_lm.data.vocabulary import Vocabulary

TOKENIZER_JSON, TOKENIZER_CONFIG, SENTENCEPIECE = "tokenizer.json", "tokenizer_config.json", "tokenizer.model"

_UNIGRAM, _BPE = 1, 2  # TrainerSpec.ModelType of sentencepiece_model.proto
_NORMAL, _UNKNOWN, _CONTROL, _USER = 1, 2, 3, 4  # SentencePiece.Type of it
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")

_PROBES = (
    "The quick brown fox, 1,024 times; naïve café.",
    " leading  and   runs of spaces ",
    "line one\nline two\n\n\tindented = f(x)\n",
    "日本語 и русский 🙂",
    "",
)


def tokenizer_files(vocabulary: Vocabulary) -> dict[str, bytes]:
    """Returns the files by name: tokenizer.json, tokenizer_config.json and, of a plain SentencePiece model, that too.

    Raises:
      ConfigError: no tokenizer.json encodes as this vocabulary does.
    """
    files = {}
    if vocabulary.model.startswith(b"{"):
        content = json.loads(vocabulary.model)
        if "tokenizer" in content:
            whole = _without_additions(content["tokenizer"])
        elif content["fairseq"]:
            raise _cannot("it is numbered as fairseq does; copy the files of the original")
        else:
            whole = _from_sentencepiece(base64.b64decode(content["sentencepiece"]))
        behind = content["added"]
    else:
        files[SENTENCEPIECE] = vocabulary.model
        whole, behind = _from_sentencepiece(vocabulary.model), ()
    base = vocabulary.report.base_size
    known = {token["id"] for token in whole["added_tokens"]}
    first = vocabulary.size - len(behind)
    whole["added_tokens"] += [_added(first + n, spelling) for n, spelling in enumerate(behind) if spelling]
    roles = {role.name: role for role in vocabulary.report.roles}
    # A token of another use that serves as MASK stays a token of text.
    for role in roles.values():
        if role.how == "found" and role.token not in known and role.token < base:
            whole["added_tokens"].append(_added(role.token, role.piece))
    whole["added_tokens"].sort(key=lambda token: token["id"])
    text = json.dumps(whole, ensure_ascii=False, allow_nan=False)
    _try(text, vocabulary)
    named = {f"{name}_token": role.piece for name, role in roles.items() if role.how != "reused" or name == "mask"}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        **named,
    }
    files[TOKENIZER_JSON] = text.encode()
    files[TOKENIZER_CONFIG] = (
        json.dumps(config, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
    ).encode()
    return files


def _without_additions(tokenizer: dict[str, Any]) -> dict[str, Any]:
    """Returns a tokenizer.json that adds nothing around a text, cuts nothing and pads nothing."""
    return {**tokenizer, "post_processor": None, "truncation": None, "padding": None}


def _added(token: int, spelling: str, special: bool = True) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": token, "content": spelling, **flags, "special": special}


def _from_sentencepiece(proto: bytes) -> dict[str, Any]:
    """Returns an object as in tokenizer.json that splits text as the SentencePiece model does."""
    from sentencepiece import sentencepiece_model_pb2

    messages: Any = sentencepiece_model_pb2
    model = messages.ModelProto()
    model.ParseFromString(proto)
    pieces, trainer, normalizer = list(model.pieces), model.trainer_spec, model.normalizer_spec
    if trainer.model_type not in (_UNIGRAM, _BPE):
        raise _cannot("only unigram and BPE models of SentencePiece have a counterpart")
    unknown = next(number for number, piece in enumerate(pieces) if piece.type == _UNKNOWN)
    if trainer.model_type == _UNIGRAM:
        # The library scores what it does not know from the lowest score of all; SentencePiece looks at normal pieces.
        lowest = min(piece.score for piece in pieces if piece.type == _NORMAL)
        scores = [[piece.piece, piece.score if piece.type in (_NORMAL, _USER) else lowest] for piece in pieces]
        kind: dict[str, Any] = {"type": "Unigram", "unk_id": unknown, "vocab": scores}
    else:
        kind = _bpe(pieces, unknown)
    kind["byte_fallback"] = trainer.byte_fallback
    parts: list[dict[str, Any]] = []
    if normalizer.precompiled_charsmap:
        table = base64.b64encode(normalizer.precompiled_charsmap).decode()
        parts.append({"type": "Precompiled", "precompiled_charsmap": table})
    if normalizer.remove_extra_whitespaces:
        parts += [{"type": "Strip", "strip_left": True, "strip_right": True}]
        parts += [{"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}]
    if normalizer.add_dummy_prefix:
        parts.append({"type": "Prepend", "prepend": "▁"})
    parts.append({"type": "Replace", "pattern": {"String": " "}, "content": "▁"})
    decoders: list[dict[str, Any]] = [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}]
    decoders += [{"type": "ByteFallback"}, {"type": "Fuse"}]
    if normalizer.add_dummy_prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    symbols = [_added(number, piece.piece) for number, piece in enumerate(pieces) if piece.type in (_CONTROL, _UNKNOWN)]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": symbols,
        "normalizer": {"type": "Sequence", "normalizers": parts},
        "pre_tokenizer": _kept_whole(pieces),
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": kind,
    }


def _kept_whole(pieces: list[Any]) -> dict[str, Any] | None:
    """Returns what parts a text at the symbols of the user, which SentencePiece never joins with anything."""
    symbols = sorted((piece.piece for piece in pieces if piece.type == _USER), key=len, reverse=True)
    if not symbols:
        return None
    return {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"String": symbol}, "behavior": "Isolated", "invert": False}
            for symbol in symbols
        ],
    }


def _bpe(pieces: list[Any], unknown: int) -> dict[str, Any]:
    """Returns a BPE model: every way to halve a piece into two others is a merge, in the order of the scores."""
    ids = {piece.piece: number for number, piece in enumerate(pieces)}
    merges = []
    for number, piece in enumerate(pieces):
        if piece.type != _NORMAL:
            continue
        text = piece.piece
        halves = [(text[:cut], text[cut:]) for cut in range(1, len(text))]
        whole = [(left, right) for left, right in halves if left in ids and right in ids]
        merges += [(-piece.score, number, ids[left], ids[right], left, right) for left, right in whole]
    pairs = [[left, right] for *_, left, right in sorted(merges)]
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": pieces[unknown].piece,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "ignore_merges": False,
        "vocab": ids,
        "merges": pairs,
    }


def _try(text: str, vocabulary: Vocabulary) -> None:
    """Raises `ConfigError` where the tokenizer does not encode as the vocabulary, or numbers a role otherwise."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_str(text)
    for role in vocabulary.report.roles:
        if tokenizer.token_to_id(role.piece) != role.token:
            raise _cannot(f"{role.piece!r} would have the id {tokenizer.token_to_id(role.piece)} and not {role.token}")
    special = {token["id"] for token in json.loads(text)["added_tokens"]}
    spellings = {token: vocabulary.piece(token) for token in range(vocabulary.size) if token not in special}
    pieces = [piece.replace("▁", " ") for piece in spellings.values() if not _BYTE.fullmatch(piece)]
    spelled = ["".join(pieces[start : start + 16]) for start in range(0, len(pieces), 16)]
    for probe in (*_PROBES, *spelled):
        ours, theirs = vocabulary.encode(probe), tokenizer.encode(probe, add_special_tokens=False).ids
        if ours != theirs:
            raise _cannot(f"{probe[:40]!r} would give {theirs[:8]} and not {ours[:8]}")


def _cannot(why: str) -> ConfigError:
    return ConfigError(
        f"this vocabulary cannot be written as a tokenizer.json: {why}",
        where="Vocabulary",
        fix="Give the files of the original to whoever uses the model.",
    )
