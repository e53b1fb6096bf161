"""SentencePiece vocabularies without TensorFlow."""

import dataclasses
import functools
import hashlib
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from diffusion_lm.core.errors import ConfigError
from diffusion_lm.core.special import SpecialTokens

_SENTINEL = re.compile(r"▁?<extra_id_(\d+)>")


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """A SentencePiece model and the special tokens found in it.

    Attributes:
      model: the serialised SentencePiece model (sentinels that SeqIO appended included). Two vocabularies are equal
        when their models are.
    """

    model: bytes = dataclasses.field(repr=False)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Vocabulary":
        """Returns the vocabulary of a `.model` file; raises `ConfigError` where the file is missing."""
        try:
            return cls(Path(path).read_bytes())
        except OSError as error:
            raise ConfigError(
                f"cannot read the vocabulary {os.fspath(path)!r}", fix="Give the path of a SentencePiece .model file."
            ) from error

    @functools.cached_property
    def processor(self) -> Any:
        """The SentencePiece processor."""
        import sentencepiece

        sentencepiece.set_min_log_level(1)  # it reports every load on stderr
        try:
            return sentencepiece.SentencePieceProcessor(model_proto=self.model)
        except RuntimeError as error:
            raise ConfigError(
                "the vocabulary file is no SentencePiece model", fix="Train one, or name another file."
            ) from error

    @functools.cached_property
    def sha256(self) -> str:
        """Hash of the model: what "the same vocabulary" means everywhere."""
        return hashlib.sha256(self.model).hexdigest()

    @property
    def size(self) -> int:
        """Number of tokens."""
        return self.processor.get_piece_size()

    def __len__(self) -> int:
        return self.size

    @functools.cached_property
    def specials(self) -> SpecialTokens:
        """The special tokens. A model without BOS (T5's) opens streams with PAD; one without PAD pads with UNK."""
        processor = self.processor
        pad_id = processor.pad_id() if processor.pad_id() >= 0 else processor.unk_id()
        if processor.eos_id() < 0:
            raise ConfigError("the vocabulary has no end-of-sequence token", fix="Train it with an eos_id.")
        return SpecialTokens(
            vocab_size=self.size,
            pad_id=pad_id,
            eos_id=processor.eos_id(),
            bos_id=processor.bos_id() if processor.bos_id() >= 0 else pad_id,
            mask_id=self._piece("<mask>"),
        )

    @property
    def unk_id(self) -> int | None:
        """The token of what cannot be spelt; None where everything can."""
        return self.processor.unk_id() if self.processor.unk_id() >= 0 else None

    @functools.cached_property
    def sentinel_ids(self) -> tuple[int, ...]:
        """Ids of `<extra_id_0>`, `<extra_id_1>`, ... for span corruption; empty where the model has none."""
        found = {}
        for token in range(self.size):
            match = _SENTINEL.fullmatch(self.processor.id_to_piece(token))
            if match:
                found[int(match[1])] = token
        return tuple(found[number] for number in sorted(found))

    def encode(self, text: str) -> list[int]:
        """Returns the tokens of `text`, without BOS and EOS."""
        return self.processor.encode(text)

    def decode(self, tokens: Iterable[int]) -> str:
        """Returns the text before the first EOS. Special tokens and ids outside the vocabulary are dropped."""
        specials = self.specials
        dropped = {specials.pad_id, specials.bos_id, specials.mask_id}
        kept: list[int] = []
        for token in map(int, tokens):
            if token == specials.eos_id:
                break
            if 0 <= token < specials.vocab_size and token not in dropped:
                kept.append(token)
        return self.processor.decode(kept)

    def decode_all(self, rows: Iterable[Sequence[int]]) -> list[str]:
        """Returns the text of each row of tokens."""
        return [self.decode(row) for row in rows]

    def piece(self, token: int) -> str:
        """Returns one token as the vocabulary spells it (`"▁the"`); PAD and ids outside of it are empty."""
        specials = self.specials
        if token == specials.pad_id or not 0 <= token < specials.vocab_size:
            return ""
        return self.processor.id_to_piece(token)

    def _piece(self, piece: str) -> int | None:
        token = self.processor.piece_to_id(piece)
        return token if self.processor.id_to_piece(token) == piece else None
