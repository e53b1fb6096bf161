"""Finds what a vocabulary cannot encode: characters of a text that are missing from decode(encode(text)).

A vocabulary without byte fallback maps unknown characters to UNK or drops them, and T5's normalisation maps line breaks
to spaces. A model can never generate such a target correctly, and no later metric shows why.

Changes made by the normalisation of the tokenizer (case, compatibility characters, repeated spaces) do not count as
losses. Line breaks, tabs and indentation do, because code and lists depend on them.
"""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence

from diffusion_lm.core.errors import ConfigError
from diffusion_lm.data.schema import LossSummary
from diffusion_lm.data.vocabulary import Vocabulary

EARLY = 1000
"""Number of targets after which `Losses` checks for the first time, before a large data set has been read."""

_LISTED = 12
_NAMES = {"\n": "newline", "\t": "tab"}


def unwritten(vocabulary: Vocabulary, text: str, tokens: Sequence[int] | None = None) -> Counter[str]:
    """Returns how often each character is lost. "indentation" counts lines, "unknown" counts other UNK tokens.

    Args:
      vocabulary: the vocabulary to check.
      text: the original text.
      tokens: the encoded `text`, if known; saves encoding it again.
    """
    wanted = text.strip()
    if tokens is not None and vocabulary.decode(tokens).strip() == wanted:
        return Counter()
    tokens = vocabulary.encode(text)
    # Some libraries decode UNK to " ⁇ " and others drop it, so it is removed before the comparison.
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
    """Formats lost characters for messages, the most frequent first: `newline 3, '{' 1`."""
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
            f"the vocabulary cannot encode all characters of {self.count:,} of {self.of:,} {part}{name}: "
            f"{characters(self.characters)}; first in {self.first}"
        )


class Losses:
    """Counts the texts of a data set that a vocabulary cannot encode, while the data set is written.

    Args:
      vocabulary: the vocabulary to check.
      name: "TASK/SPLIT", for messages.
      max_share: fraction of targets that may be lossy.
    """

    def __init__(self, vocabulary: Vocabulary, *, name: str, max_share: float):
        self._vocabulary, self._name, self._max_share = vocabulary, name, max_share
        self._parts: dict[str, _Part] = {}

    def add(self, part: str, number: int, text: str, tokens: Sequence[int] | None = None) -> None:
        """Counts one text, the part "inputs", "targets" or "suffixes" of example `number`.

        Raises:
          ConfigError: too many of the first `EARLY` targets are lossy.
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
        """Raises `ConfigError` if more than `max_share` of the targets are lossy."""
        found = self._parts.get("targets", _Part())
        if found.count > self._max_share * found.of:
            raise ConfigError(
                found.sentence("targets", f" of {self._name}"),
                where=f"GrainSource.max_lossy={self._max_share:g}, --max_lossy",
                fix="Use a vocabulary that can encode them, or increase max_lossy (1 = allow all).",
            )

    def summary(self) -> dict[str, LossSummary]:
        """Returns the losses of each part that has any, for `Manifest.unwritten`."""
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
        """Number of targets without text, such as unanswerable questions."""
        return self._parts.get("targets", _Part()).empty

    def sentences(self) -> list[str]:
        """Returns one message for each part with losses."""
        return loss_sentences(self._name, self.summary())


def loss_sentences(name: str, summary: Mapping[str, LossSummary]) -> list[str]:
    """Returns one message for each part of `Manifest.unwritten`; `name` is "TASK/SPLIT"."""
    parts = {
        part: _Part(count=one["count"], of=one["of"], characters=Counter(one["characters"]), first=one["first"])
        for part, one in summary.items()
    }
    return [f"{name}: {lossy.sentence(part, '')}" for part, lossy in parts.items()]
