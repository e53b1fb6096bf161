"""Encodes and decodes text: a SentencePiece model, or a model of the `tokenizers` library."""

import functools
import json
from collections.abc import Collection, Mapping
from typing import Any, Protocol

from diffusion_lm.core.errors import ConfigError, require


class TokenModel(Protocol):
    """A tokenizer without special-token logic.

    Attributes:
      kind: name of the algorithm, for messages.
      size: one more than the largest id.
      roles: ids of the special tokens that the model itself declares, by `bos`, `eos`, `pad`, `unk` and `mask`.
    """

    kind: str
    size: int
    roles: Mapping[str, int]

    def encode(self, text: str) -> list[int]:
        """Returns the ids of `text`, without BOS and EOS."""

    def decode(self, tokens: list[int]) -> str:
        """Returns the text of ids below `size`; special tokens are dropped, incomplete UTF-8 becomes U+FFFD."""

    def normalise(self, text: str) -> str:
        """Returns the normalised `text` that the model splits into tokens."""

    def find(self, piece: str) -> int | None:
        """Returns the id of the token spelled `piece`, or None."""

    def spelling(self, token: int) -> str:
        """Returns the model's spelling of a token, "" for an unused id."""

    def piece(self, token: int) -> str:
        """Returns the SentencePiece spelling of a token: its text, with `"▁"` for a space."""

    def inner(self, piece: str) -> str:
        """Returns the model's spelling of `piece` inside a word."""

    def is_special(self, token: int) -> bool:
        """Returns whether the model declares a token as special, that is, not ordinary text."""


class SentencePieceModel:
    """A serialised SentencePiece model.

    Args:
      proto: the serialised model.
      fairseq: use the ids of XLM-R (Conneau et al., arXiv 1911.02116): `<s> <pad> </s> <unk>`, then the pieces of the
        model from its fourth on, then `<mask>`.
    """

    def __init__(self, proto: bytes, *, fairseq: bool = False):
        import sentencepiece

        sentencepiece.set_min_log_level(1)  # otherwise it logs every load to stderr
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=proto)
        except RuntimeError as error:
            raise ConfigError(
                "the vocabulary file is not a SentencePiece model", fix="Give a SentencePiece .model file."
            ) from error
        processor = self._processor
        pieces = processor.get_piece_size()
        own: dict[str, int | None] = {"bos": processor.bos_id(), "eos": processor.eos_id(), "pad": processor.pad_id()}
        own |= {"unk": processor.unk_id(), "mask": self._native("<mask>")}
        self.kind = "SentencePiece"
        self._order: list[Any] | None = None  # per id: an id of SentencePiece, or the spelling of a token that it lacks
        self.roles: Mapping[str, int] = {role: token for role, token in own.items() if token is not None and token >= 0}
        if fairseq:
            self._order = [own["bos"], "<pad>", own["eos"], own["unk"], *range(3, pieces), "<mask>"]
            self._ids = {token: number for number, token in enumerate(self._order)}
            self.roles = {"bos": 0, "pad": 1, "eos": 2, "unk": 3, "mask": pieces + 1}
        self.size = pieces if self._order is None else len(self._order)

    def encode(self, text: str) -> list[int]:
        """See `TokenModel.encode`."""
        tokens = self._processor.encode(text)
        return tokens if self._order is None else [self._ids[token] for token in tokens]

    def decode(self, tokens: list[int]) -> str:
        """See `TokenModel.decode`; UNK becomes " ⁇ "."""
        if self._order is not None:
            tokens = [native for native in map(self._order.__getitem__, tokens) if isinstance(native, int)]
        return self._processor.decode(tokens)

    def normalise(self, text: str) -> str:
        """See `TokenModel.normalise`."""
        return self._processor.normalize(text).replace("\u2581", " ")

    def find(self, piece: str) -> int | None:
        """See `TokenModel.find`."""
        if self._order is not None and piece in self._ids:
            return self._ids[piece]
        token = self._native(piece)
        return token if self._order is None or token is None else self._ids[token]

    def spelling(self, token: int) -> str:
        """See `TokenModel.spelling`."""
        native = token if self._order is None else self._order[token]
        return native if isinstance(native, str) else self._processor.id_to_piece(native)

    piece = spelling

    def inner(self, piece: str) -> str:
        """See `TokenModel.inner`."""
        return piece

    def is_special(self, token: int) -> bool:
        """Returns True: the library does not distinguish user-defined symbols from ordinary pieces."""
        return True

    def _native(self, piece: str) -> int | None:
        token = self._processor.piece_to_id(piece)
        return token if self._processor.id_to_piece(token) == piece else None


class TokenizersModel:
    """A tokenizer of the `tokenizers` library.

    Args:
      content: the object in `tokenizer.json`. Its template, truncation and padding are ignored, and text that spells a
        special token is encoded as ordinary text.
    """

    def __init__(self, content: Mapping[str, Any]):
        import tokenizers

        wrong = dict(where="tokenizer.json", fix="Use the file that was published with the model.")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(content, allow_nan=False))
        except Exception as error:  # the library raises the class Exception itself
            raise ConfigError(f"the tokenizers library cannot read the vocabulary: {error}", **wrong) from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        added = content.get("added_tokens") or ()
        for token in added:
            require(
                self._tokenizer.token_to_id(token["content"]) == token["id"],
                f"token {token['content']!r} cannot have the id {token['id']}, because smaller ids are unused",
                **wrong,
            )
        self._added = {token["id"]: token["content"] for token in added}
        self._special = {token["id"] for token in added if token["special"]}
        model, decoder = content["model"], json.dumps(content.get("decoder"), allow_nan=False)
        self.kind = str(model.get("type", "tokenizers"))
        self._byte_level = '"ByteLevel"' in decoder
        self._prefix = (model.get("continuing_subword_prefix") or "") if self.kind == "WordPiece" else ""
        self.size = 1 + max(self._tokenizer.get_vocab(True).values(), default=-1)
        unknown = model.get("unk_id")
        if unknown is None and model.get("unk_token"):
            unknown = self._tokenizer.token_to_id(model["unk_token"])
        self.roles: Mapping[str, int] = {} if unknown is None else {"unk": unknown}

    def encode(self, text: str) -> list[int]:
        """See `TokenModel.encode`."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, tokens: list[int]) -> str:
        """See `TokenModel.decode`."""
        return self._tokenizer.decode(tokens, skip_special_tokens=True)

    def normalise(self, text: str) -> str:
        """See `TokenModel.normalise`."""
        own = self._tokenizer.normalizer
        return text if own is None else own.normalize_str(text).replace("\u2581", " ")

    def find(self, piece: str) -> int | None:
        """See `TokenModel.find`."""
        return self._tokenizer.token_to_id(piece)

    def spelling(self, token: int) -> str:
        """See `TokenModel.spelling`."""
        return self._tokenizer.id_to_token(token) or ""

    def piece(self, token: int) -> str:
        """See `TokenModel.piece`; a byte that is not a whole character becomes U+FFFD."""
        spelling = self.spelling(token)
        if token in self._added or not spelling:
            return spelling
        if self._byte_level:
            table = _byte_of_letter()
            text = bytes(table[letter] for letter in spelling if letter in table).decode(errors="replace")
            return text.replace(" ", "▁")
        if self._prefix:
            return spelling.removeprefix(self._prefix) if spelling.startswith(self._prefix) else f"▁{spelling}"
        return spelling

    def inner(self, piece: str) -> str:
        """See `TokenModel.inner`."""
        return self._prefix + piece

    def is_special(self, token: int) -> bool:
        """See `TokenModel.is_special`."""
        return token in self._special


def spelled_out(model: TokenModel, token: int, forbidden: Collection[int]) -> list[int]:
    """Returns the shortest sequence of tokens with the text of `token`, without tokens in `forbidden`.

    A character without a token becomes byte tokens, or else UNK.
    """
    spelling = model.spelling(token)

    def allowed(piece: str) -> list[int] | None:
        found = model.find(piece)
        return None if found is None or found in forbidden else [found]

    def letter(text: str) -> list[int]:
        found = [allowed(f"<0x{byte:02X}>") for byte in text.encode()]
        if all(found):
            return [one for part in found if part for one in part]
        unknown = model.roles.get("unk")
        return [] if unknown is None or unknown in forbidden else [unknown]

    # shortest[i] is the best segmentation of spelling[i:], computed from the end.
    shortest: dict[int, list[int]] = {len(spelling): []}
    for start in reversed(range(len(spelling))):
        ways = []
        for end in range(len(spelling), start, -1):
            piece = spelling[start:end]
            first = allowed(model.inner(piece) if start else piece)
            if first is not None:
                ways.append(first + shortest[end])
        shortest[start] = min(ways, key=len) if ways else letter(spelling[start]) + shortest[start + 1]
    return shortest[0]


@functools.cache
def _byte_of_letter() -> dict[str, int]:
    """Returns the byte of each letter in GPT-2's alphabet: printable Latin-1, then U+0100 onwards for other bytes."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}
