"""The two formats of a materialised dataset: records of tokens, and one manifest per split."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, TypedDict

import msgpack
import numpy as np

from diffusion_lm.core.errors import ConfigError
from diffusion_lm.core.special import SpecialTokens

FORMAT_VERSION = 1
"""Incremented when a reader of the previous version would misread new files."""


@dataclasses.dataclass(frozen=True, eq=False)
class Record:
    """One stored example: tokens without BOS, EOS and padding, which the converters add.

    Attributes:
      inputs: i32[inputs_length], the conditioning; empty for pretraining records.
      targets: i32[targets_length]. The last chunk of a pretraining document ends with EOS, because the end of a
        document is part of its text.
      example_id: u32, stable id of the example: `example_number(f"{task}/{split}/{index}")`.
      inputs_text: the text of `inputs` before tokenisation.
      targets_text: the text of `targets` before tokenisation.
      reference: what the task's metrics compare a prediction with; a JSON value.
      suffix: i32[suffix_length], conditioning after the target (infilling); usually empty.
    """

    inputs: np.ndarray
    targets: np.ndarray
    example_id: int
    inputs_text: str = ""
    targets_text: str = ""
    reference: object = None
    suffix: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int32))

    def __post_init__(self):
        for name in ("inputs", "targets", "suffix"):
            object.__setattr__(self, name, np.asarray(getattr(self, name), np.int32).reshape(-1))
        object.__setattr__(self, "example_id", int(self.example_id))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Record) and self.encode() == other.encode()

    def __hash__(self) -> int:
        return self.example_id

    def encode(self) -> bytes:
        """Returns the record as msgpack bytes; tokens are little-endian i32, and an empty suffix is left out."""
        return msgpack.packb(
            (
                self.inputs.astype("<i4").tobytes(),
                self.targets.astype("<i4").tobytes(),
                self.example_id,
                self.inputs_text,
                self.targets_text,
                self.reference,
                *((self.suffix.astype("<i4").tobytes(),) if len(self.suffix) else ()),
            )
        )

    @classmethod
    def decode(cls, data: bytes) -> "Record":
        """Inverse of `encode`. Sequences inside `reference` become lists, as in JSON."""
        inputs, targets, example_id, inputs_text, targets_text, reference, *rest = msgpack.unpackb(data)
        return cls(
            np.frombuffer(inputs, "<i4"),
            np.frombuffer(targets, "<i4"),
            example_id,
            inputs_text,
            targets_text,
            reference,
            np.frombuffer(rest[0] if rest else b"", "<i4"),
        )


class LossSummary(TypedDict):
    """Texts of one part (inputs, targets, suffixes) that the vocabulary cannot encode without loss.

    Attributes:
      count: number of lossy texts.
      of: number of texts.
      characters: how often each of the most frequent lost characters occurs.
      first: number and beginning of the first lossy text, for messages.
    """

    count: int
    of: int
    characters: Mapping[str, int]
    first: str


@dataclasses.dataclass(frozen=True)
class Manifest:
    """`manifest.json` of one split of one task.

    `empty_targets`, `unwritten`, `modules` and `code_sha256` describe how the data were made, not what they are.
    Comparisons of manifests and of run cards ignore them.

    Attributes:
      task: name of the SeqIO task.
      split: name of its split.
      specials: the special tokens of the vocabulary.
      count: number of records.
      vocabulary: file name of the vocabulary (`Vocabulary.model`) next to the manifest; empty if none is stored.
      vocabulary_sha256: hash of that file (or any name of the vocabulary if none is stored); only sources with equal
        hashes can be mixed.
      metrics: the task's metric functions as import paths, `"module:function"`.
      has_inputs: False for pretraining records, which have targets only.
      max_inputs_length: longest `inputs`, in tokens.
      max_targets_length: longest `targets`, in tokens.
      max_suffix_length: longest `suffix`, in tokens.
      target_tokens: sum of the lengths of all `targets`.
      chunk_length: longest chunk, in tokens, that documents were split into; None if they were left whole.
      limit: the number of records that was requested, or None for all.
      empty_targets: number of targets without text, such as those of unanswerable questions.
      unwritten: texts that the vocabulary cannot encode, by part (`round_trip.Losses.summary`); empty if there are
        none, and in data written before they were counted.
      shards: file names of the ArrayRecord shards, in order.
      modules: the modules that were imported to register the task.
      code_sha256: hash of their code (`materialise.code_digest`), used to detect stale data.
      format_version: `FORMAT_VERSION` of the writer.
    """

    task: str
    split: str
    specials: SpecialTokens
    count: int = 0
    vocabulary: str = ""
    vocabulary_sha256: str = ""
    metrics: tuple[str, ...] = ()
    has_inputs: bool = True
    max_inputs_length: int = 0
    max_targets_length: int = 0
    max_suffix_length: int = 0
    target_tokens: int = 0
    chunk_length: int | None = None
    limit: int | None = None
    empty_targets: int = dataclasses.field(default=0, compare=False)
    unwritten: Mapping[str, LossSummary] = dataclasses.field(default_factory=dict, compare=False)
    shards: tuple[str, ...] = ()
    modules: tuple[str, ...] = dataclasses.field(default=(), compare=False)
    code_sha256: str = dataclasses.field(default="", compare=False)
    format_version: int = FORMAT_VERSION

    def __post_init__(self):
        object.__setattr__(self, "metrics", tuple(self.metrics))
        object.__setattr__(self, "shards", tuple(self.shards))
        object.__setattr__(self, "modules", tuple(self.modules))

    def to_json(self) -> str:
        """Returns the text of `manifest.json`."""
        return json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str = "manifest.json") -> "Manifest":
        """Inverse of `to_json`; `where` names the file in errors.

        Raises:
          ConfigError: the text is not a manifest, or has another format version.
        """
        again = "Delete the directory and materialise the task again."
        try:
            fields: Mapping[str, Any] = json.loads(text)
            version = fields["format_version"]
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError("cannot read the manifest of a dataset", where=where, fix=again) from error
        if version != FORMAT_VERSION:
            raise ConfigError(
                f"format_version={version}: must be {FORMAT_VERSION}",
                where=where,
                fix=again,
            )
        return cls(**{**fields, "specials": SpecialTokens(**fields["specials"])})
