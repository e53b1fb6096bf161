"""A family of released checkpoints: its table of weights, and the translation of config.json to a `TransformerSpec`.

A table has one `Weight` per pair of a parameter and a tensor of the files. `load` reads it in one direction and `save`
in the other, so a family is written once.
"""

import dataclasses
from collections.abc import Callable, Collection, Hashable, Mapping
from typing import Any, TypeAlias, TypeVar

import jax
import numpy as np

from diffusion_lm.core.errors import ConfigError
from diffusion_lm.interop.name_maps.config_keys import ConfigKey
from diffusion_lm.nn.transformer import TransformerSpec

CONFIG = "config.json"

JsonObject: TypeAlias = Mapping[str, Any]
"""A JSON object of a file. Its values have any type until `config_checks.check_types` has checked them."""

SpecFields: TypeAlias = dict[str, Any]
"""Fields of a `TransformerSpec`, by name."""

Tensor: TypeAlias = np.ndarray | jax.Array

_K = TypeVar("_K", bound=Hashable)
_V = TypeVar("_V")


def shown(value: object) -> str:
    """Returns the repr of a value for an error message, cut to 80 characters: the value may be hostile."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


@dataclasses.dataclass(frozen=True)
class Transform:
    """How a tensor of a file becomes one of our parameters (one layer of it), and back.

    Both functions only move and cut numbers, so that a round trip is exact. They accept numpy arrays and JAX tracers.

    Attributes:
      load: from tensor to parameter. The parameter may have more rows (a padded vocabulary); they are zeros.
      save: from parameter to tensor.
      row_by_row: whether row i of the tensor is row i of the parameter, so that large tensors can be read in slices.
    """

    load: Callable[[Tensor, TransformerSpec], Tensor]
    save: Callable[[Tensor, TransformerSpec], Tensor]
    row_by_row: bool = False


# Letters of the shapes: D model width, H query heads, K heads of queries, keys or values, E head size, V vocabulary.
IDENTITY = Transform(lambda x, spec: x, lambda x, spec: x, row_by_row=True)
"""Vectors and tables of positions."""

TRANSPOSE = Transform(lambda x, spec: x.T, lambda x, spec: x.T)
"""`torch.nn.Linear` stores [out, in], we store [in, out]."""

VOCABULARY = Transform(lambda x, spec: x, lambda x, spec: x[: spec.vocab_size], row_by_row=True)
"""[V, ...] to [padded V, ...]; the padding is cut off again on the way out."""

HEADS_OUT = Transform(
    lambda x, spec: x.T.reshape(x.shape[1], -1, spec.head_dim), lambda x, spec: x.reshape(x.shape[0], -1).T
)
"""Linear of queries, keys or values: [K * E, D] to [D, K, E]."""

HEADS_IN = Transform(
    lambda x, spec: x.T.reshape(-1, spec.head_dim, x.shape[0]), lambda x, spec: x.reshape(-1, x.shape[-1]).T
)
"""Linear of the attention output: [D, H * E] to [H, E, D]."""

HEADS_BIAS = Transform(lambda x, spec: x.reshape(-1, spec.head_dim), lambda x, spec: x.reshape(-1))
"""[K * E] to [K, E]."""

CONV_HEADS_OUT = Transform(
    lambda x, spec: x.reshape(x.shape[0], -1, spec.head_dim), lambda x, spec: x.reshape(x.shape[0], -1)
)
"""GPT-2's Conv1D stores [in, out]: [D, K * E] to [D, K, E]."""

CONV_HEADS_IN = Transform(
    lambda x, spec: x.reshape(-1, spec.head_dim, x.shape[-1]), lambda x, spec: x.reshape(-1, x.shape[-1])
)
"""GPT-2's Conv1D: [H * E, D] to [H, E, D]."""


@dataclasses.dataclass(frozen=True)
class Weight:
    """One line of a family's table: a parameter and the tensor that holds it.

    A line applies only to networks that have the parameter, so one table covers networks with and without biases.

    Attributes:
      param: path in our parameter tree, such as `blocks/attention/query`.
      tensor: name in the file; `{i}` is the number of the layer.
      transform: from the tensor to the parameter.
      part: index of this parameter among the `parts` that the tensor joins (GPT-2 joins queries, keys and values).
      parts: number of equal parts that the tensor is cut into.
      parts_axis: the axis that is cut, an axis of the tensor in the file; -1 or 0.
      first_layer: first layer that has such a tensor. Rows of the stacked parameter before it are zeros and unused.
      add_row: name of a table whose row 0 is added to every row. BERT-like encoders add the vector of token type 0 at
        every position, so it can be folded into the position table.
      gated: True for networks with gated feed-forward layers only, False for the others only, None for both.
    """

    param: str
    tensor: str
    transform: Transform = IDENTITY
    part: int = 0
    parts: int = 1
    parts_axis: int = -1
    first_layer: int = 0
    add_row: str | None = None
    gated: bool | None = None

    @property
    def stacked(self) -> bool:
        """Whether each layer has a tensor of its own; the parameter holds all layers, [layers, ...]."""
        return "{i}" in self.tensor

    def applies(self, params: Collection[str], spec: TransformerSpec) -> bool:
        """Returns whether a network of this shape with these parameter paths has the parameter."""
        return self.param in params and self.gated in (None, spec.gated)


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """The contents of a config.json, and a record of which keys were read.

    Attributes:
      values: the JSON object.
      file: its path, for errors.
      tensors: names of the tensors of the checkpoint. T5's config.json does not show whether there is a separate head.
      read: names of the keys that were read, absent keys included. `replaced` shares it.
      notes: lines for the user about how the file was read. `replaced` shares them.
    """

    values: JsonObject
    file: str = CONFIG
    tensors: Collection[str] = ()
    read: set[str] = dataclasses.field(default_factory=set, compare=False, repr=False)
    notes: list[str] = dataclasses.field(default_factory=list, compare=False, repr=False)

    def get(self, name: str, default: object = None) -> Any:
        """Returns a value; `default` if it is absent or null."""
        self.read.add(name)
        value = self.values.get(name)
        return default if value is None else value

    def get_or_null(self, name: str, default: object) -> Any:
        """Returns a value, None if it is null; `default` only if it is absent.

        For keys where transformers distinguishes the two: an absent key takes the default of the class, null is "off".
        """
        self.read.add(name)
        return self.values.get(name, default)

    def replaced(self, **values: object) -> "CheckpointConfig":
        """Returns a copy with other values for some keys. Reading the copy counts as reading this config."""
        return dataclasses.replace(self, values={**self.values, **values})

    def note(self, text: str) -> None:
        """Adds a line for the user."""
        self.notes.append(text)

    def need(self, name: str) -> Any:
        """Returns a value; raises `ConfigError` if it is absent or null."""
        value = self.get(name)
        if value is None:
            raise ConfigError(f"{self.file}: the key {name!r} is missing", where=name, fix="Complete the file.")
        return value

    def choose(self, name: str, choices: Mapping[_K, _V], default: _K | None = None) -> _V:
        """Returns `choices[value]`; raises `ConfigError` for any other value."""
        value = self.get(name, default)
        # A list or an object of a damaged file is not hashable.
        if not isinstance(value, Hashable) or value not in choices:
            raise self.unsupported(name, f"supported: {', '.join(map(repr, choices))}")
        return choices[value]  # type: ignore[index]

    def refuse(self, **supported: object) -> None:
        """Raises `ConfigError` if a key has a value other than the supported one; absent and null are accepted."""
        for name, value in supported.items():
            if self.get(name, value) != value:
                raise self.unsupported(name, f"supported: {value!r}")

    def unsupported(self, name: str, reason: str) -> ConfigError:
        """Returns the error about a value that this network cannot have."""
        return ConfigError(
            f"{self.file}: {name} = {shown(self.values.get(name))} is not supported ({reason})",
            where=name,
            fix="Use a checkpoint without it.",
        )


@dataclasses.dataclass(frozen=True)
class Diffusion:
    """How the checkpoints of a diffusion family were trained. Nothing of it shows in the weights.

    Attributes:
      shifted: whether the state at slot i - 1 predicts token i (as in an autoregressive model), not that at slot i.
      objective: file in gin/objectives, without the suffix.
      sampler: file in gin/samplers, without the suffix.
      mask_ids: (rows of the vocabulary, id of MASK) of the published checkpoints whose files do not name MASK.
      block_key: key of config.json that holds the block size; None if every token attends to every other.
      block_size: of the published checkpoints whose config.json does not give it.
      sub_block: tokens that the sampler decodes at a time; None = a whole block.
      code: repository that holds the class that config.json names; None if transformers has the class.
    """

    shifted: bool
    objective: str
    sampler: str
    mask_ids: tuple[tuple[int, int], ...] = ()
    block_key: str | None = None
    block_size: int | None = None
    sub_block: int | None = None
    code: str | None = None

    @property
    def prediction(self) -> str:
        """The alignment in words."""
        return "shifted" if self.shifted else "same position"


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of checkpoints.

    Attributes:
      name: as `diffusion-lm list families` prints it.
      description: one sentence.
      source: where the family is published.
      model_types: values of `model_type` in config.json.
      architectures: classes in `architectures` of config.json whose weights have these names.
      prefix: of the names of all weights but those of the head; a checkpoint may be saved without it.
      weights: the table.
      read_config: from config.json to the fields of a `TransformerSpec`.
      write_config: from a `TransformerSpec` to the family's part of config.json; inverse of `read_config`.
      keys: the keys of config.json that `read_config` reads.
      ignored_keys: regular expressions of keys of the family's class that change nothing in its network. Those of all
        classes are in `config_checks.IGNORED_KEYS`.
      tied: (tensor, tensor that it repeats where the embeddings are tied). If the first one is in the file, it must be
        equal to the second.
      ignored_tensors: regular expressions of tensors that hold no weights, such as causal masks.
      old_names: (regular expression, replacement) that turn a name of the table into the name in older files.
      causal: whether the family was trained autoregressively.
      shape_source: what the shape of the network is read from, for errors.
      diffusion: how a family of diffusion models was trained; None for all others.
      signature: regular expression of tensors that only this family has among those of its model type; "" = none.
      default_token_ids: (key, id) of special tokens that transformers assumes where config.json names none. `export`
        writes null for those that a smaller vocabulary does not have.
      vocab_tensor: tensor whose number of rows is the vocabulary size, whatever config.json says; None where
        config.json is right.
    """

    name: str
    description: str
    source: str
    model_types: tuple[str, ...]
    architectures: tuple[str, ...]
    prefix: str
    weights: tuple[Weight, ...]
    read_config: Callable[[CheckpointConfig], SpecFields]
    write_config: Callable[[TransformerSpec], dict[str, object]]
    keys: tuple[ConfigKey, ...]
    ignored_keys: tuple[str, ...] = ()
    tied: tuple[tuple[str, str], ...] = ()
    ignored_tensors: tuple[str, ...] = ()
    old_names: tuple[tuple[str, str], ...] = ()
    causal: bool = True
    shape_source: str = CONFIG
    diffusion: Diffusion | None = None
    signature: str = ""
    default_token_ids: tuple[tuple[str, int], ...] = ()
    vocab_tensor: str | None = None
