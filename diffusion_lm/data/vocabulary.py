"""Vocabularies without TensorFlow: SentencePiece models, and the tokenizer files of Hugging Face folders."""

import base64
import dataclasses
import functools
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusion_lm.core.errors import ConfigError, require
from diffusion_lm.core.special import SpecialTokens
from diffusion_lm.data.token_roles import ROLES, Role, VocabularyReport, assign_roles, native_roles
from diffusion_lm.data.tokenizer_files import find_layout, read_files
from diffusion_lm.data.tokenizer_models import SentencePieceModel, TokenizersModel, TokenModel, spelled_out

VOCABULARY_VARIABLE = "DIFFUSION_LM_VOCABULARY"
"""Environment variable: path of the vocabulary of tasks on real data."""
MASK_VARIABLE = "DIFFUSION_LM_MASK_TOKEN"
"""Environment variable: id or spelling of the token of that vocabulary to use as MASK."""

_SENTINEL = re.compile(r"▁?<extra_id_(\d+)>")
_FORMAT = "diffusion_lm vocabulary 1"
_PREFIX = b'{"format": "diffusion_lm vocabulary'


class VocabularyNotNamed(ConfigError):
    """Nothing says which vocabulary a task uses. New data cannot be written; finished data can still be read."""


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """A tokeniser and the special tokens found in it or added to it.

    Text never becomes a special token, however it is spelt, except for UNK.

    Attributes:
      model: the whole vocabulary as bytes: a serialised SentencePiece model (sentinels that SeqIO appended included),
        or the JSON text that `load` makes of other tokenizer files. Two vocabularies are equal when these are.
    """

    model: bytes = dataclasses.field(repr=False)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, mask: str | int | None = None) -> "Vocabulary":
        """Returns the vocabulary of a file or folder, with all the special tokens that diffusion needs.

        A folder holds tokenizer.json, or sentencepiece.bpe.model, tokenizer.model or spiece.model, or vocab.json with
        merges.txt, or vocab.txt; tokenizer_config.json, special_tokens_map.json, added_tokens.json, config.json and
        generation_config.json beside them say which token is which. EOS, PAD and MASK that are not there are added
        behind the ids (see `report`); a SentencePiece model that lacks nothing stays the bytes that it is.

        Args:
          path: one of these files, a folder of them, any SentencePiece `.model`, or a file with the bytes of another
            `Vocabulary.model`.
          mask: a token that becomes MASK although it is another: its id, its spelling, or a text of one token. Text
            that would give it is spelt with shorter tokens.

        Raises:
          ConfigError: there is no tokeniser, or not enough of it, or `mask` is no token of it.
        """
        try:
            return cls._load(Path(path), mask)
        except ConfigError as error:
            if error.where == "mask" or os.fspath(path) in str(error):
                raise
            raise ConfigError(error.what, where=os.fspath(path), fix=error.fix) from error
        # The files are a stranger's, and what the readers raise about damaged ones is of every kind: `tokenizers` has
        # the class Exception alone, SentencePiece RuntimeError, and values of another type give TypeError.
        except Exception as error:
            raise ConfigError(
                f"the vocabulary {os.fspath(path)!r} is damaged: {_first_line(error)}",
                fix="Download its files again.",
            ) from error

    @classmethod
    def _load(cls, path: Path, mask: str | int | None) -> "Vocabulary":
        folder, names = find_layout(path)
        stored = cls((folder / names[0]).read_bytes()) if (folder / names[0]).is_file() else None
        if stored is not None and stored.model.startswith(_PREFIX):
            require(
                mask is None or stored._opened.roles["mask"] == (mask, "reused"),
                f"the vocabulary {str(path)!r} has its MASK already",
                where="mask",
                fix="Load the tokenizer files that it was made of.",
            )
            return stored
        files = read_files(folder, names, lambda content: _open_content(content).size)
        model = files.content.get("sentencepiece", b"")
        added, roles = assign_roles(
            _open_content(files.content), files.candidates, files.added, decoder_start=files.decoder_start, mask=mask
        )
        for token in files.content.get("tokenizer", {}).get("added_tokens") or ():
            token["special"] = token["special"] or token["id"] in {number for number, _ in roles.values()}
        if model and not files.content["fairseq"] and not added:
            plain = cls(model)
            if plain._opened.roles == roles:
                return plain
        content: dict[str, Any] = {"format": _FORMAT, **files.content, "added": added, "roles": roles}
        if model:
            content["sentencepiece"] = base64.b64encode(model).decode()
        return cls(json.dumps(content, allow_nan=False).encode())

    @functools.cached_property
    def _opened(self) -> "_Opened":
        if not self.model.startswith(b"{"):
            model = SentencePieceModel(self.model)
            return _Opened(model, (), native_roles(model))
        try:
            content = json.loads(self.model)
            require(content["format"] == _FORMAT, f"the vocabulary has the format {content['format']!r}")
        except (ValueError, KeyError) as error:
            raise ConfigError("the vocabulary file is unreadable", fix="Make it again with Vocabulary.load.") from error
        if "sentencepiece" in content:
            content["sentencepiece"] = base64.b64decode(content["sentencepiece"])
        roles = {name: (token, how) for name, (token, how) in content["roles"].items()}
        return _Opened(_open_content(content), tuple(content["added"]), roles)

    @functools.cached_property
    def sha256(self) -> str:
        """Hash of the model: what "the same vocabulary" means everywhere."""
        return hashlib.sha256(self.model).hexdigest()

    @property
    def size(self) -> int:
        """Number of tokens."""
        return self._opened.model.size + len(self._opened.added)

    def __len__(self) -> int:
        return self.size

    @functools.cached_property
    def specials(self) -> SpecialTokens:
        """The special tokens. One without BOS opens streams with PAD (T5) or EOS (GPT-2)."""
        ids = {f"{name}_id": token for name, (token, _) in self._opened.roles.items() if name != "unk"}
        return SpecialTokens(vocab_size=self.size, **ids)  # type: ignore[arg-type]

    @property
    def unk_id(self) -> int | None:
        """The token of what cannot be spelt; None where everything can."""
        return self._opened.roles["unk"][0] if "unk" in self._opened.roles else None

    @functools.cached_property
    def report(self) -> VocabularyReport:
        """What the vocabulary consists of, and where its special tokens come from."""
        roles = self._opened.roles
        listed = tuple(
            Role(name, roles[name][0], self._spelling(roles[name][0]), roles[name][1])
            for name in ROLES
            if name in roles
        )
        ours = sum(how == "added" for _, how in roles.values())
        return VocabularyReport(self._opened.model.kind, self.size, self.size - ours, listed)

    @functools.cached_property
    def sentinel_ids(self) -> tuple[int, ...]:
        """Ids of `<extra_id_0>`, `<extra_id_1>`, ... for span corruption; empty where the model has none."""
        found = {}
        for token in range(self.size):
            match = _SENTINEL.fullmatch(self._spelling(token))
            if match:
                found[int(match[1])] = token
        return tuple(found[number] for number in sorted(found))

    def encode(self, text: str) -> list[int]:
        """Returns the tokens of `text`, without BOS and EOS."""
        tokens = self._opened.model.encode(text)
        if self._reserved.isdisjoint(tokens):
            return tokens
        return [part for token in tokens for part in self._spelled_out.get(token, [token])]

    def decode(self, tokens: Iterable[int]) -> str:
        """Returns the text before the first EOS. Special tokens and ids outside the vocabulary are dropped."""
        specials, size = self.specials, self._opened.model.size
        kept: list[int] = []
        for token in map(int, tokens):
            if token == specials.eos_id:
                break
            if 0 <= token < size and token not in (specials.pad_id, specials.bos_id, specials.mask_id):
                kept.append(token)
        return self._opened.model.decode(kept)

    def decode_all(self, rows: Iterable[Sequence[int]]) -> list[str]:
        """Returns the text of each row of tokens."""
        return [self.decode(row) for row in rows]

    def normalise(self, text: str) -> str:
        """Returns `text` as the tokenizer changes it before it splits it: case, compatibility characters, spaces."""
        return self._opened.model.normalise(text)

    def piece(self, token: int) -> str:
        """Returns one token as SentencePiece would spell it (`"▁the"`); PAD and ids outside of it are empty."""
        if token == self.specials.pad_id or not 0 <= token < self.size:
            return ""
        model = self._opened.model
        return model.piece(token) if token < model.size else self._spelling(token)

    def _spelling(self, token: int) -> str:
        opened = self._opened
        return opened.model.spelling(token) if token < opened.model.size else opened.added[token - opened.model.size]

    @functools.cached_property
    def _reserved(self) -> frozenset[int]:
        """What text must not become. Where UNK stands for PAD, text that cannot be spelt does become it."""
        roles = {name: token for name, (token, _) in self._opened.roles.items()}
        unknown = roles.pop("unk", None)
        return frozenset(token for name, token in roles.items() if name != "pad" or token != unknown)

    @functools.cached_property
    def _spelled_out(self) -> dict[int, list[int]]:
        model = self._opened.model
        return {token: spelled_out(model, token, self._reserved) for token in self._reserved if token < model.size}


def requested_mask() -> str | int | None:
    """Returns `$DIFFUSION_LM_MASK_TOKEN`: an id, the spelling of a token, or None if it is not set."""
    mask = os.environ.get(MASK_VARIABLE) or None
    return int(mask) if mask and mask.isdigit() else mask


@dataclasses.dataclass(frozen=True)
class _Opened:
    """A tokeniser in memory, the tokens behind its ids, and `{role: (id, how)}`."""

    model: TokenModel
    added: tuple[str, ...]
    roles: Mapping[str, tuple[int, str]]


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _open_content(content: Mapping[str, Any]) -> TokenModel:
    if "tokenizer" in content:
        return TokenizersModel(content["tokenizer"])
    return SentencePieceModel(content["sentencepiece"], fairseq=content["fairseq"])
