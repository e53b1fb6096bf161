"""What a vocabulary cannot write: characters of a text that are not in decode(encode(text)).

A vocabulary without bytes turns a character that it lacks into UNK, or drops it; models with T5's normalisation turn
line breaks into spaces. A target that is stored so can never be generated right, and nothing later shows why.

What a tokenizer's own normalisation changes (case, compatibility characters, repeated spaces) is no loss. Line breaks,
tabs and the indentation of lines are, since code and lists mean something else without them.
"""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from diffusion_lm.core.errors import ConfigError
from diffusion_lm.data.vocabulary import Vocabulary

EARLY = 1000
"""Targets after which a vocabulary that fails is refused, so that a large data set is not read to its end first."""

_LISTED = 12
_NAMES = {"\n": "newline", "\t": "tab"}


def unwritten(vocabulary: Vocabulary, text: str, tokens: Sequence[int] | None = None) -> Counter[str]:
    """Returns how many of each character are lost; "indentation" counts lines, "unknown" unnamed UNK tokens.

    Args:
      vocabulary: writes the text.
      text: what should come back.
      tokens: `text` as it was encoded, where that is known; saves encoding it again.
    """
    wanted = text.strip()
    if tokens is not None and vocabulary.decode(tokens).strip() == wanted:
        return Counter()
    tokens = vocabulary.encode(text)
    # UNK is spelt " ⁇ " by some libraries and left out by others: without it only real characters are compared.
    decoded = vocabulary.decode([token for token in tokens if token != vocabulary.unk_id]).strip()
    if decoded == wanted:
        return Counter()
    lost = _visible(vocabulary.normalise(text)) - _visible(vocabulary.normalise(decoded))
    if not lost and vocabulary.unk_id in tokens:
        lost["unknown"] = tokens.count(vocabulary.unk_id)
    lost.update({mark: count for mark in _NAMES if (count := wanted.count(mark) - decoded.count(mark)) > 0})
    lines, written = wanted.split("\n"), decoded.split("\n")
    if len(lines) == len(written):
        shorter = sum(_indent(there) < _indent(line) for line, there in zip(lines, written, strict=True))
        lost.update({"indentation": shorter} if shorter else {})
    return lost


def _visible(text: str) -> Counter[str]:
    return Counter(character for character in text if not character.isspace())


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip(" ")) if line.strip() else 0


def characters(lost: Mapping[str, int]) -> str:
    """Returns lost characters for a sentence, the most frequent first: `newline 3, '{' 1`."""
    ordered = sorted(lost.items(), key=lambda item: -item[1])
    shown = [f"{_NAMES.get(one, one if len(one) > 1 else repr(one))} {count:,}" for one, count in ordered[:_LISTED]]
    return ", ".join(shown) + (f" and {len(ordered) - _LISTED} others" if len(ordered) > _LISTED else "")


@dataclasses.dataclass
class _Part:
    count: int = 0
    of: int = 0
    empty: int = 0
    characters: Counter[str] = dataclasses.field(default_factory=Counter)
    first: str = ""

    def sentence(self, part: str, name: str) -> str:
        return (
            f"the vocabulary cannot write {self.count:,} of {self.of:,} {part}{name} whole: "
            f"{characters(self.characters)}; first in {self.first}"
        )


class Losses:
    """Counts what a vocabulary loses of a data set while it is written.

    Args:
      vocabulary: writes the texts.
      name: "TASK/SPLIT".
      most: share of the targets that may be lossy.
    """

    def __init__(self, vocabulary: Vocabulary, *, name: str, most: float):
        self._vocabulary, self._name, self._most = vocabulary, name, most
        self._parts: dict[str, _Part] = {}

    def add(self, part: str, number: int, text: str, tokens: Sequence[int] | None = None) -> None:
        """Looks at "inputs", "targets" or "suffixes" of example `number`.

        Raises:
          ConfigError: the first `EARLY` targets are lossy beyond the share.
        """
        found = self._parts.setdefault(part, _Part())
        lost = unwritten(self._vocabulary, text, tokens)
        found.of += 1
        found.empty += not text.strip()
        if lost:
            found.characters.update(lost)
            shown = text if len(text) <= 60 else text[:57] + "..."
            found.first = found.first or f"example {number}: '" + shown.replace("\n", "\\n").replace("\t", "\\t") + "'"
            found.count += 1
        if part == "targets" and found.of == EARLY:
            self.check()

    def check(self) -> None:
        """Raises `ConfigError` where more of the targets are lossy than may be."""
        found = self._parts.get("targets", _Part())
        if found.count > self._most * found.of:
            raise ConfigError(
                found.sentence("targets", f" of {self._name}"),
                where=f"GrainSource.max_lossy = {self._most:g}, --max_lossy",
                fix="Use a vocabulary that writes them, or allow a larger share (1 = all).",
            )

    def summary(self) -> dict[str, Any]:
        """Returns what the manifest keeps: for each part with a loss its count, of how many, and the characters."""
        return {
            part: {
                "count": found.count,
                "of": found.of,
                "characters": dict(found.characters.most_common(_LISTED)),
                "first": found.first,
            }
            for part, found in sorted(self._parts.items())
            if found.count
        }

    @property
    def empty_targets(self) -> int:
        """Targets without text: questions without an answer."""
        return self._parts.get("targets", _Part()).empty

    def sentences(self) -> list[str]:
        """Returns a sentence for each part with a loss."""
        return loss_sentences(self._name, self.summary())


def loss_sentences(name: str, summary: Mapping[str, Any]) -> list[str]:
    """Returns a sentence for each part of a summary that a manifest keeps."""
    return [
        f"{name}: {_Part(**{**found, 'characters': Counter(found['characters'])}).sentence(part, '')}"
        for part, found in summary.items()
    ]
