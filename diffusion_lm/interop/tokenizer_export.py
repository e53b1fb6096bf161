"""Writes a vocabulary as the tokenizer files that `transformers` reads: tokenizer.json, tokenizer_config.json.

A `Vocabulary` is a `tokenizer.json` with further tokens after it, or a SentencePiece model. The latter is converted to
a `tokenizer.json` (pieces, normalisation, white space), because each class that reads a bare `tokenizer.model` expects
the model of its own family. The result is then checked: all pieces and some difficult texts must get the ids that the
vocabulary gives. One difference remains, as with all tokenizers of transformers. Text that spells a special token (or a
byte, `<0x41>`) becomes that token, which never happens with a `Vocabulary`.
"""

import base64
import json
import re
from typing import Any

from diffusion_lm.core.errors import ConfigError
from diffusion_lm.data.vocabulary import Vocabulary
from diffusion_lm.interop.name_maps.family import JsonObject

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
    """Returns the files by name; a vocabulary that is a plain SentencePiece model gives tokenizer.model too.

    Raises:
      ConfigError: no tokenizer.json encodes like this vocabulary.
    """
    files = {}
    if vocabulary.model.startswith(b"{"):
        content = json.loads(vocabulary.model)
        if "tokenizer" in content:
            tokenizer = _without_additions(content["tokenizer"])
        elif content["fairseq"]:
            raise _cannot("its ids are fairseq's; copy the files of the original model")
        else:
            tokenizer = _from_sentencepiece(base64.b64decode(content["sentencepiece"]))
        added = content["added"]
    else:
        files[SENTENCEPIECE] = vocabulary.model
        tokenizer, added = _from_sentencepiece(vocabulary.model), ()
    base = vocabulary.report.base_size
    known = {token["id"] for token in tokenizer["added_tokens"]}
    first = vocabulary.size - len(added)
    tokenizer["added_tokens"] += [_added(first + n, spelling) for n, spelling in enumerate(added) if spelling]
    roles = {role.name: role for role in vocabulary.report.roles}
    # Only tokens that exist for their role become special. An ordinary token that serves as MASK stays ordinary text.
    for role in roles.values():
        if role.how == "found" and role.token not in known and role.token < base:
            tokenizer["added_tokens"].append(_added(role.token, role.piece))
    tokenizer["added_tokens"].sort(key=lambda token: token["id"])
    text = json.dumps(tokenizer, ensure_ascii=False, allow_nan=False)
    _check_encoding(text, vocabulary)
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


def _without_additions(tokenizer: JsonObject) -> dict[str, Any]:
    """Returns a tokenizer.json that adds no special tokens, and neither truncates nor pads."""
    return {**tokenizer, "post_processor": None, "truncation": None, "padding": None}


def _added(token: int, spelling: str, special: bool = True) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": token, "content": spelling, **flags, "special": special}


def _from_sentencepiece(proto: bytes) -> dict[str, Any]:
    """Returns the contents of a tokenizer.json that encodes like the SentencePiece model."""
    from sentencepiece import sentencepiece_model_pb2

    messages: Any = sentencepiece_model_pb2
    model = messages.ModelProto()
    model.ParseFromString(proto)
    pieces, trainer, normalizer = list(model.pieces), model.trainer_spec, model.normalizer_spec
    if trainer.model_type not in (_UNIGRAM, _BPE):
        raise _cannot("only unigram and BPE models of SentencePiece can be converted")
    unknown = next(number for number, piece in enumerate(pieces) if piece.type == _UNKNOWN)
    if trainer.model_type == _UNIGRAM:
        # `tokenizers` derives the score of unknown text from the lowest score of all pieces, SentencePiece from that of
        # normal pieces. So the other pieces get the lowest score of a normal one.
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
        "pre_tokenizer": _split_at_symbols(pieces),
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": kind,
    }


def _split_at_symbols(pieces: list[Any]) -> dict[str, Any] | None:
    """Returns a pre-tokenizer that splits at user-defined symbols, which SentencePiece never merges with other text."""
    # Longest first, so that a symbol is not split by another one that it contains.
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
    """Returns a BPE model with explicit merges, which a SentencePiece model does not store.

    Each way to split a piece into two other pieces is a merge. Merges are ordered by the score of the piece they make,
    because SentencePiece always merges the pair with the best result.
    """
    ids = {piece.piece: number for number, piece in enumerate(pieces)}
    merges = []
    for number, piece in enumerate(pieces):
        if piece.type != _NORMAL:
            continue
        text = piece.piece
        halves = [(text[:cut], text[cut:]) for cut in range(1, len(text))]
        known = [(left, right) for left, right in halves if left in ids and right in ids]
        merges += [(-piece.score, number, ids[left], ids[right], left, right) for left, right in known]
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


def _check_encoding(text: str, vocabulary: Vocabulary) -> None:
    """Raises `ConfigError` if the tokenizer encodes unlike the vocabulary, or gives a special token another id."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_str(text)
    for role in vocabulary.report.roles:
        if tokenizer.token_to_id(role.piece) != role.token:
            raise _cannot(
                f"{role.piece!r} would have the id {tokenizer.token_to_id(role.piece)} instead of {role.token}"
            )
    # Special tokens are left out: their text becomes the token in transformers, and never in a `Vocabulary`.
    special = {token["id"] for token in json.loads(text)["added_tokens"]}
    spellings = {token: vocabulary.piece(token) for token in range(vocabulary.size) if token not in special}
    pieces = [piece.replace("▁", " ") for piece in spellings.values() if not _BYTE.fullmatch(piece)]
    spelled = ["".join(pieces[start : start + 16]) for start in range(0, len(pieces), 16)]
    for probe in (*_PROBES, *spelled):
        ours, theirs = vocabulary.encode(probe), tokenizer.encode(probe, add_special_tokens=False).ids
        if ours != theirs:
            raise _cannot(f"{probe[:40]!r} would give {theirs[:8]} instead of {ours[:8]}")


def _cannot(reason: str) -> ConfigError:
    return ConfigError(
        f"this vocabulary cannot be written as a tokenizer.json: {reason}",
        where="Vocabulary",
        fix="Use the tokenizer files of the original model.",
    )
