"""Prepares samples of all arms side by side, and the playback of the denoising steps."""

import itertools
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from markupsafe import Markup

from diffusion_lm.recipes.charts import change_map
from diffusion_lm.recipes.formatting import is_number
from diffusion_lm.recipes.records import ArmCard, JsonObject, Playback, Sample

# These limits keep the page below one megabyte for any input.
MAX_OUTPUTS = 150  # outputs shown in all, over tasks and arms
MAX_CARDS = 8  # examples shown per task
MAX_TEXT = 1000  # characters shown of one output
MAX_INPUT = 2000
MAX_FRAMES = 40
MAX_POSITIONS = 256
_SCATTERED = 60  # maximum number of segments; an output with more is shown without marks
_WORD = re.compile(r"\n[ \t]*|\w+|[^\w\s]")  # an indented line start counts as a word: it does in Python
_RELATED = 0.3  # minimum fraction of an output that must match the reference for its differences to be marked

Segments = list[tuple[str, str]]


class Output(NamedTuple):
    """One arm's completion, as segments (text, kind) from `differences`."""

    arm: ArmCard
    segments: Segments
    score: str
    exact: bool


class SampleCard(NamedTuple):
    """One example with every arm's completion; `code` selects a monospaced font."""

    input: str
    reference: str
    outputs: list[Output]
    code: bool


class Player(NamedTuple):
    """A playback in the form that the page draws.

    Attributes:
      input, reference: the example.
      labels: name of each frame.
      pieces: distinct (text, kind) of the tokens; kind is "", "pad", "eos" or "newline".
      frames: for each frame, indices into `pieces`.
      changed: for each frame, the positions that differ from the previous frame.
      drawing: the change map.
    """

    input: str
    reference: str
    labels: list[str]
    pieces: list[tuple[str, str]]
    frames: list[list[int]]
    changed: list[list[int]]
    drawing: Markup

    def tokens(self, index: int) -> list[tuple[str, str, bool]]:
        """Returns (text, kind, changed) of each token of a frame."""
        marked = set(self.changed[index])
        return [(*self.pieces[piece], position in marked) for position, piece in enumerate(self.frames[index])]

    def data(self) -> JsonObject:
        """Returns the data that the page's script reads."""
        return {"labels": self.labels, "pieces": self.pieces, "frames": self.frames, "changed": self.changed}


def sample_cards(samples: Sequence[Sample], arms: Sequence[ArmCard], tasks: int = 1) -> list[SampleCard]:
    """Returns the first examples of one task with outputs in the order of the arms; `tasks` is the number of tasks."""
    code = any("\n" in str(sample.get("reference", "")).strip() for sample in samples)
    cards = []
    for sample in samples[: max(1, min(MAX_CARDS, MAX_OUTPUTS // (len(arms) * tasks)))]:
        reference = _cut(str(sample.get("reference", "")), MAX_TEXT)
        outputs = []
        for arm in arms:
            found = sample.get("outputs", {}).get(arm["name"])
            if found is None:
                continue
            text = _cut(str(found.get("text", "")), MAX_TEXT)
            score = f"{found['score']:.1f}" if is_number(found.get("score")) else ""
            outputs.append(Output(arm, differences(reference, text), score, text.strip() == reference.strip()))
        cards.append(SampleCard(_cut(str(sample.get("input", "")), MAX_INPUT), reference, outputs, code))
    return cards


def differences(reference: str, output: str) -> Segments:
    """Splits `output` into segments (text, kind) by a word-level diff with `reference`.

    Kind "" is text of the reference, "extra" is text that is not in the reference, and "missing" is text of the
    reference that is not in the output. An output that shares little with the reference is one unmarked segment.
    """
    if not output.strip():
        return []
    old, new = list(_WORD.finditer(reference)), list(_WORD.finditer(output))
    pairs = _common([word.group() for word in old], [word.group() for word in new])
    if sum(len(new[j].group().strip()) for _, j in pairs) < _RELATED * len("".join(output.split())):
        return [(output, "")]
    segments: Segments = []
    done = old_at = new_at = 0  # characters of `output`, words of `old` and words of `new` processed so far
    for i, j in [*pairs, (len(old), len(new))]:
        extra = [word for word in new[new_at:j] if word.group().strip()]
        absent = " ".join(word.group() for word in old[old_at:i] if word.group().strip())
        if extra:
            segments += [(output[done : extra[0].start()], ""), (output[extra[0].start() : extra[-1].end()], "extra")]
            done = extra[-1].end()
        elif absent:
            here = new[j].start() if j < len(new) else done
            segments += [(output[done:here], ""), (absent, "missing")]
            done = here
        end = new[j].end() if j < len(new) else len(output)
        segments.append((output[done:end], ""))
        done, old_at, new_at = end, i + 1, j + 1
    grouped = itertools.groupby((segment for segment in segments if segment[0]), key=lambda segment: segment[1])
    joined = [("".join(text for text, _ in group), kind) for kind, group in grouped]
    return joined if len(joined) <= _SCATTERED else [(output, "")]


def _common(old: Sequence[str], new: Sequence[str]) -> list[tuple[int, int]]:
    """Returns the longest common subsequence as index pairs, in time len(old) x len(new).

    difflib is not used because it takes cubic time on the repetitive text that weak models generate.
    """
    codes = {word: code for code, word in enumerate({*old, *new})}
    new_codes = np.array([codes[word] for word in new], np.int64)
    lengths = np.zeros((len(old) + 1, len(new) + 1), np.int32)
    for i, word in enumerate(old):
        matched = lengths[i, :-1] + (new_codes == codes[word])
        lengths[i + 1, 1:] = np.maximum.accumulate(np.maximum(lengths[i, 1:], matched))
    pairs = []
    i, j = len(old), len(new)
    while i and j:
        if old[i - 1] == new[j - 1] and lengths[i, j] == lengths[i - 1, j - 1] + 1:
            i, j = i - 1, j - 1
            pairs.append((i, j))
        elif lengths[i - 1, j] == lengths[i, j]:
            i -= 1
        else:
            j -= 1
    return pairs[::-1]


def player(played: Playback) -> Player | None:
    """Returns the playback in the form that the page draws; None if it has no frames."""
    frames = [[_display(str(piece)) for piece in frame[:MAX_POSITIONS]] for frame in played.get("frames") or ()]
    labels = [f"pass {index}" for index in range(1, len(frames) + 1)]
    if frames and played.get("start"):
        frames.insert(0, [_display(str(piece)) for piece in played["start"][:MAX_POSITIONS]])
        labels.insert(0, "start")
    if not frames:
        return None
    if len(frames) > MAX_FRAMES:
        shown = sorted({round(i * (len(frames) - 1) / (MAX_FRAMES - 1)) for i in range(MAX_FRAMES)})
        frames, labels = [frames[i] for i in shown], [labels[i] for i in shown]
    changed = [[] if labels[0] == "start" else list(range(len(frames[0])))]
    for before, after in itertools.pairwise(frames):
        changed.append([i for i, piece in enumerate(after) if i >= len(before) or before[i] != piece])
    pieces = sorted({piece for frame in frames for piece in frame})
    index = {piece: number for number, piece in enumerate(pieces)}
    positions = max(len(frame) for frame in frames)
    return Player(
        input=_cut(str(played.get("input", "")), MAX_INPUT),
        reference=_cut(str(played.get("reference", "")), MAX_TEXT),
        labels=labels,
        pieces=pieces,
        frames=[[index[piece] for piece in frame] for frame in frames],
        changed=changed,
        drawing=change_map(labels, positions, [set(c) for c in changed]),
    )


def _display(piece: str) -> tuple[str, str]:
    """Returns text and kind of a vocabulary piece (SentencePiece writes spaces as U+2581 and bytes as <0xNN>)."""
    if piece in ("", "<pad>", "[PAD]"):
        return "·", "pad"
    if piece in ("</s>", "<eos>", "[EOS]", "[SEP]", "<|endoftext|>", "<|end_of_text|>", "<|im_end|>"):
        return "end", "eos"
    text = piece.replace("\u2581", " ").replace("<0x0A>", "\n")
    if text.strip(" ") and not text.strip(" \n"):
        return "↵" * text.count("\n") + text, "newline"
    return text, ""


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[:limit]}… ({len(text) - limit:,} more characters)"
