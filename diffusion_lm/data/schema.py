"""What a materialised dataset consists of: records, and one manifest that says how to read them."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import msgpack
import numpy as np

from diffusion_lm.core.errors import ConfigError
from diffusion_lm.core.special import SpecialTokens

FORMAT_VERSION = 1
"""Raised when a reader of the old version would misread files of the new one."""


@dataclasses.dataclass(frozen=True, eq=False)
class Record:
    """One example as it is stored: tokens without BOS, EOS and padding, which are the converters' business.

    Attributes:
      inputs: i32[inputs_length], the conditioning; empty for pretraining records.
      targets: i32[targets_length]. The last piece of a pretraining document ends with EOS, because there the end is
        part of the text.
      example_id: u32, stable id of the example: `example_number(f"{task}/{split}/{index}")`.
      inputs_text: the text of `inputs` before tokenisation.
      targets_text: the text of `targets` before tokenisation.
      reference: what the task's metrics compare a prediction with; any JSON value.
      suffix: i32[suffix_length], conditioning that stands behind the target: the target fills a gap.
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
        """Returns the record as msgpack bytes; tokens are little-endian i32. A suffix is written where there is one."""
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
        """Returns the record of `encode`'s bytes. Sequences inside `reference` come back as lists, as in JSON."""
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


@dataclasses.dataclass(frozen=True)
class Manifest:
    """`manifest.json` of one split of one task.

    Attributes:
      task: name of the SeqIO task.
      split: name of its split.
      specials: the special tokens of the vocabulary.
      count: number of records.
      vocabulary: file name of the vocabulary (`Vocabulary.model`) beside the manifest; empty where none was stored.
      vocabulary_sha256: hash of that file (or any name of the vocabulary where none was stored); sources are mixed
        only when these agree.
      metrics: the task's metric functions as import paths, `"module:function"`.
      has_inputs: False for pretraining records, which have targets only.
      max_inputs_length: longest `inputs`, in tokens.
      max_targets_length: longest `targets`, in tokens.
      max_suffix_length: longest `suffix`, in tokens.
      target_tokens: sum of the lengths of all `targets`.
      chunk_length: longest piece into which documents were cut, or None where they were left whole.
      limit: the number of records asked for, or None for all.
      empty_targets: number of targets without text, such as those of questions without an answer.
      unwritten: what the vocabulary could not write, by part (`round_trip.Losses.summary`); empty where it wrote all,
        and in data from before it was counted.
      shards: file names of the ArrayRecord shards, in order.
      modules: the modules that were imported to register the task.
      code_sha256: hash of their code (`materialise.code_digest`), by which stale data are told. How the data came to be
        is no part of what they are: manifests and run cards are compared without these two, and without what only
        describes the records (`empty_targets`, `unwritten`).
      format_version: version of this layout.
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
    unwritten: Mapping[str, object] = dataclasses.field(default_factory=dict, compare=False)
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
        """Returns the manifest of `to_json`'s text.

        Raises:
          ConfigError: the text is no manifest, or one of another format version.
        """
        again = "Delete the folder and materialise the task again."
        try:
            fields: Mapping[str, Any] = json.loads(text)
            version = fields["format_version"]
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError("the manifest of a dataset is unreadable", where=where, fix=again) from error
        if version != FORMAT_VERSION:
            raise ConfigError(
                f"the dataset has format version {version}, this program reads {FORMAT_VERSION}", where=where, fix=again
            )
        return cls(**{**fields, "specials": SpecialTokens(**fields["specials"])})
