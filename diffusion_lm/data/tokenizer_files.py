"""Reads the tokenizer files of a Hugging Face folder without importing transformers."""

import codecs
import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypedDict

from diffusion_lm.core.errors import ConfigError, require

BPE, WORDPIECE, FAIRSEQ = ("vocab.json", "merges.txt"), ("vocab.txt",), ("sentencepiece.bpe.model",)
LAYOUTS = (("tokenizer.json",), FAIRSEQ, ("tokenizer.model",), ("spiece.model",), BPE, WORDPIECE)
"""Sets of files that define a tokenizer; the first complete set in a folder is used."""

FAMILIES: Mapping[tuple[str, ...], frozenset[str]] = {
    FAIRSEQ: frozenset({"xlmroberta", "xlmrobertaxl"}),
    ("tokenizer.model",): frozenset(
        {"llama", "codellama", "mistral", "mixtral", "gemma", "gemma2", "gemma3", "t5", "mt5", "umt5", "longt5"}
    ),
    ("spiece.model",): frozenset({"t5", "mt5", "umt5", "longt5"}),
    BPE: frozenset({"gpt2", "gptneo", "gptbigcode", "codegen", "opt", "roberta", "bart", "longformer", "led", "llama"}),
    WORDPIECE: frozenset({"bert", "distilbert", "electra", "convbert", "mobilebert", "retribert"}),
}
"""Model families whose tokenizers these files define completely. Other families have rules in Python code."""

GENERIC = frozenset({"", "pretrained", "tokenizersbackend"})
"""Tokenizer classes that do not identify a family."""

CONFIGS = ("tokenizer_config", "special_tokens_map", "added_tokens", "config", "generation_config")

MASK_IDS = ("mask_token_id", "mask_id")


class TokenizerContent(TypedDict, total=False):
    """`tokenizer` (an object as in tokenizer.json), or `sentencepiece` with `fairseq`."""

    tokenizer: dict[str, Any]
    sentencepiece: bytes
    fairseq: bool


@dataclasses.dataclass(frozen=True)
class TokenizerFiles:
    """Contents of the tokenizer files of a folder.

    Attributes:
      content: the tokenizer.
      added: spellings of the tokens after those of a SentencePiece model; "" for an unused id.
      candidates: spellings or ids of the token of each role, in order of precedence.
      decoder_start: id of the decoder's start token, if config.json has one.
    """

    content: TokenizerContent
    added: tuple[str, ...]
    candidates: Mapping[str, tuple[str | int, ...]]
    decoder_start: int | None


def find_layout(path: Path) -> tuple[Path, tuple[str, ...]]:
    """Returns the folder and the file names of the tokenizer at `path`, a folder or one of its files.

    Raises:
      ConfigError: there is no tokenizer.
    """
    if path.is_dir():
        for names in LAYOUTS:
            if all((path / name).is_file() for name in names):
                return path, names
        looked = ", ".join(" with ".join(names) for names in LAYOUTS)
        raise ConfigError(
            f"no tokenizer in {path}: looked for {looked}",
            fix="Download the tokenizer files into it, or give a SentencePiece .model file.",
        )
    for names in LAYOUTS:
        if path.name in names and all((path.parent / name).is_file() for name in names):
            return path.parent, names
    require(
        path.name not in BPE or not path.is_file(),
        f"{path} is incomplete: a BPE tokenizer consists of {' and '.join(BPE)}",
        fix="Put both files into one folder and give the folder.",
    )
    return path.parent, (path.name,)


def read_files(
    folder: Path, names: tuple[str, ...], size_of_sentencepiece: Callable[[TokenizerContent], int]
) -> TokenizerFiles:
    """Reads a tokenizer and the configuration files in the same folder that describe its tokens.

    Args:
      folder: the folder of the files.
      names: the file names of the tokenizer, from `find_layout`.
      size_of_sentencepiece: `f(content) -> number of tokens` of a SentencePiece model; added tokens come after these.

    Raises:
      ConfigError: a file cannot be read, or the files do not define the tokenizers of this family completely.
    """
    # Configuration files next to a file with an unusual name may belong to another tokenizer.
    read = {name: _json(folder / f"{name}.json") if names in LAYOUTS else {} for name in CONFIGS}
    config, tokenizer_config = read["config"], read["tokenizer_config"]
    family = _family(tokenizer_config.get("tokenizer_class"))
    family = _family(config.get("model_type")) if family in GENERIC else family
    require(
        names not in FAMILIES or not family or family in FAMILIES[names],
        f"{' and '.join(names)} do not define the tokenizer of {family!r} completely",
        where=str(folder),
        fix="Add the tokenizer.json of the model (save_pretrained of its fast tokenizer writes it).",
    )
    extra = _added_tokens(read)
    added: tuple[str, ...] = ()
    if _bytes(folder / names[0]).startswith(b"{") and names != BPE:
        content: TokenizerContent = {"tokenizer": _json(folder / names[0])}
        require(
            "model" in content["tokenizer"],
            f"{names[0]} contains no tokenizer",
            where=str(folder),
            fix="Download it again.",
        )
    elif names == BPE:
        content = {"tokenizer": _byte_level_bpe(folder, tokenizer_config, extra)}
    elif names == WORDPIECE:
        content = {"tokenizer": _word_piece(folder, tokenizer_config, extra)}
    else:
        content = {"sentencepiece": _bytes(folder / names[0]), "fairseq": names == FAIRSEQ}
        sentinels = 0
        if names == ("spiece.model",):
            sentinels = int(tokenizer_config.get("extra_ids", 100 if family in ("", "t5", "longt5") else 0))
        added = _added_after(size_of_sentencepiece(content), extra, sentinels)
    return TokenizerFiles(content, added, _candidates(read), config.get("decoder_start_token_id"))


def _bytes(path: Path) -> bytes:
    try:
        # Some editors write a byte order mark. No SentencePiece model begins with these bytes.
        return path.read_bytes().removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        raise ConfigError(
            f"cannot read the vocabulary {path}",
            fix="Give a SentencePiece .model file, or a folder with the tokenizer files of a model.",
        ) from error


def _json(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file, or {} if the file does not exist."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(_bytes(path))
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON", fix="Download it again.") from error
    require(isinstance(value, dict), f"{path} does not contain a JSON object", fix="Download it again.")
    return value


def _family(name: object) -> str:
    """Maps `"XLMRobertaTokenizerFast"` and `"xlm-roberta"` to `"xlmroberta"`."""
    return re.sub(r"tokenizer(fast)?$|[^a-z0-9]", "", re.sub(r"[-_]", "", str(name or "").lower()))


def _spelling(token: Any) -> Any:
    """Returns the spelling of a token, which is a string or an object with "content"."""
    return token.get("content") if isinstance(token, dict) else token


def _added_tokens(read: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[int, bool]]:
    """Returns spelling -> (id, whether it is special) for the tokens that the configuration files add."""
    found = {spelling: (token, False) for spelling, token in read["added_tokens"].items()}
    for token, entry in (read["tokenizer_config"].get("added_tokens_decoder") or {}).items():
        found[_spelling(entry)] = (int(token), bool(isinstance(entry, dict) and entry.get("special")))
    special = {name for names in _named(read).values() for name in names}
    return {spelling: (token, mark or spelling in special) for spelling, (token, mark) in found.items()}


def _named(read: Mapping[str, Mapping[str, Any]]) -> dict[str, list[str]]:
    """Returns the spellings of each role in the tokenizer configuration; [CLS] counts as BOS and [SEP] as EOS."""
    keys = {
        "bos": ("bos_token", "cls_token"),
        "eos": ("eos_token", "sep_token"),
        "pad": ("pad_token",),
        "unk": ("unk_token",),
        "mask": ("mask_token",),
    }
    return {
        role: [
            spelling
            for key in names
            for file in ("tokenizer_config", "special_tokens_map")
            if isinstance(spelling := _spelling(read[file].get(key)), str) and spelling
        ]
        for role, names in keys.items()
    }


def _candidates(read: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[str | int, ...]]:
    """Returns the spellings in the tokenizer configuration, then the ids in the model configuration."""
    candidates: dict[str, tuple[str | int, ...]] = {}
    for role, names in _named(read).items():
        keys = MASK_IDS if role == "mask" else (f"{role}_token_id",)
        values = [read[file].get(key) for file in ("config", "generation_config") for key in keys]
        ids = [value[0] if isinstance(value, list) and value else value for value in values]
        candidates[role] = (*names, *(token for token in ids if isinstance(token, int)))
    return candidates


def _added_after(size: int, extra: Mapping[str, tuple[int, bool]], sentinels: int) -> tuple[str, ...]:
    """Returns the tokens from id `size` on: T5's sentinels in descending order, then those that the files add."""
    ids = {size + sentinels - 1 - number: f"<extra_id_{number}>" for number in range(sentinels)}
    ids |= {token: spelling for spelling, (token, _) in extra.items() if token >= size}
    return tuple(ids.get(token, "") for token in range(size, max(ids, default=size - 1) + 1))


def _lines(path: Path) -> list[str]:
    """Returns the lines of a file. Only line feeds end a line, because tokens may contain other separators."""
    try:
        text = _bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        line = _bytes(path)[: error.start].count(b"\n") + 1
        raise ConfigError(f"{path}, line {line}, is not UTF-8", fix="Download it again.") from error
    lines = text.replace("\r\n", "\n").split("\n")
    return lines[:-1] if lines and not lines[-1] else lines


def _tokenizer(added: Iterable[tuple[str, int, bool]], **parts: Any) -> dict[str, Any]:
    """Returns an object as in tokenizer.json."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False}
    tokens = [
        {"id": token, "content": spelling, **flags, "normalized": not special, "special": special}
        for spelling, token, special in sorted(added, key=lambda entry: entry[1])
    ]
    none = {"truncation": None, "padding": None, "normalizer": None, "post_processor": None}
    return {"version": "1.0", **none, "added_tokens": tokens, **parts}


def _byte_level_bpe(
    folder: Path, tokenizer_config: Mapping[str, Any], extra: Mapping[str, tuple[int, bool]]
) -> dict[str, Any]:
    """Returns GPT-2's tokenizer. Longer tokens that no merge produces must be special tokens."""
    vocabulary: dict[str, int] = _json(folder / "vocab.json")
    merges = [line.split(" ") for line in _lines(folder / "merges.txt") if line and not line.startswith("#version")]
    require(
        all(len(pair) == 2 for pair in merges) and not any(token.endswith("</w>") for token in vocabulary),
        "vocab.json and merges.txt do not define a byte-level BPE",
        where=str(folder),
        fix="Add the tokenizer.json of the model.",
    )
    made = {"".join(pair) for pair in merges}
    special = [(token, number, True) for token, number in vocabulary.items() if len(token) > 1 and token not in made]
    added = [(token, number, mark) for token, (number, mark) in extra.items() if token not in vocabulary]
    byte_level = {"type": "ByteLevel", "trim_offsets": True, "use_regex": True}
    model: dict[str, Any] = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None}
    model |= {"end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
    return _tokenizer(
        special + added,
        pre_tokenizer={**byte_level, "add_prefix_space": bool(tokenizer_config.get("add_prefix_space", False))},
        decoder={**byte_level, "add_prefix_space": True},
        model={**model, "vocab": vocabulary, "merges": merges},
    )


def _word_piece(
    folder: Path, tokenizer_config: Mapping[str, Any], extra: Mapping[str, tuple[int, bool]]
) -> dict[str, Any]:
    """Returns BERT's tokenizer. Without `do_lower_case` it is uncased if no token has an ASCII capital."""
    tokens = _lines(folder / "vocab.txt")
    vocabulary = {token: number for number, token in enumerate(tokens)}
    special = [token for token in tokens if re.fullmatch(r"\[(PAD|UNK|CLS|SEP|MASK)\]", token)]
    lower = tokenizer_config.get("do_lower_case")
    if lower is None:
        lower = not any(re.search("[A-Z]", token) for token in tokens if not token.startswith("["))
    normalizer = {
        "type": "BertNormalizer",
        "clean_text": True,
        "handle_chinese_chars": bool(tokenizer_config.get("tokenize_chinese_chars", True)),
        "strip_accents": tokenizer_config.get("strip_accents"),
        "lowercase": bool(lower),
    }
    added = [(token, number, mark) for token, (number, mark) in extra.items() if token not in vocabulary]
    model = {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##"}
    return _tokenizer(
        [(token, vocabulary[token], True) for token in special] + added,
        normalizer=normalizer,
        pre_tokenizer={"type": "BertPreTokenizer"},
        decoder={"type": "WordPiece", "prefix": "##", "cleanup": True},
        model={**model, "max_input_chars_per_word": 100, "vocab": vocabulary},
    )
