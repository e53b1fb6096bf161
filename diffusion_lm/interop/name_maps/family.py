"""What a family of released checkpoints is: a table of weights, and how config.json says the network's shape."""

import dataclasses
from collections.abc import Callable, Collection, Hashable, Mapping
from typing import Any

from diffusion_lm.core.errors import ConfigError
from diffusion_lm.nn.transformer import TransformerSpec

CONFIG = "config.json"


def shown(value: Any) -> str:
    """Returns a value of a stranger's file for an error message: on one line, and not longer than a line."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


@dataclasses.dataclass(frozen=True)
class Layout:
    """How one tensor of a file becomes one array of ours (of one layer), and back.

    Both functions take an array and the spec, only move and cut, and work on numpy arrays and on JAX tracers.

    Attributes:
      load: from the file's tensor to ours; where ours is longer (a padded vocabulary), the rest is zeros.
      save: from ours to the file's.
      row_by_row: whether row i of the tensor is row i of ours, so that large ones can be read in slices.
    """

    load: Callable[[Any, TransformerSpec], Any]
    save: Callable[[Any, TransformerSpec], Any]
    row_by_row: bool = False


SAME = Layout(lambda x, spec: x, lambda x, spec: x, row_by_row=True)
"""Vectors, tables of positions."""

TRANSPOSED = Layout(lambda x, spec: x.T, lambda x, spec: x.T)
"""PyTorch's Linear, [out, in], to [in, out]."""

VOCABULARY = Layout(lambda x, spec: x, lambda x, spec: x[: spec.vocab_size], row_by_row=True)
"""[V, ...] to [padded V, ...]."""

HEADS_OUT = Layout(
    lambda x, spec: x.T.reshape(x.shape[1], -1, spec.head_dim), lambda x, spec: x.reshape(x.shape[0], -1).T
)
"""Linear of queries, keys or values, [heads * E, D], to [D, heads, E]."""

HEADS_IN = Layout(
    lambda x, spec: x.T.reshape(-1, spec.head_dim, x.shape[0]), lambda x, spec: x.reshape(-1, x.shape[-1]).T
)
"""Linear of attention's output, [D, H * E], to [H, E, D]."""

HEADS_BIAS = Layout(lambda x, spec: x.reshape(-1, spec.head_dim), lambda x, spec: x.reshape(-1))
"""[heads * E] to [heads, E]."""

CONV_HEADS_OUT = Layout(
    lambda x, spec: x.reshape(x.shape[0], -1, spec.head_dim), lambda x, spec: x.reshape(x.shape[0], -1)
)
"""GPT-2's Conv1D, [D, heads * E], to [D, heads, E]."""

CONV_HEADS_IN = Layout(
    lambda x, spec: x.reshape(-1, spec.head_dim, x.shape[-1]), lambda x, spec: x.reshape(-1, x.shape[-1])
)
"""GPT-2's Conv1D, [H * E, D], to [H, E, D]."""


@dataclasses.dataclass(frozen=True)
class Weight:
    """One line of a family's table. Lines whose `ours` the network does not have (a bias, say) do not apply.

    Attributes:
      ours: path in our parameter tree, such as `blocks/attention/query`.
      theirs: name in the file; `{i}` is the number of the layer.
      layout: from one to the other.
      part: which of the `parts` equal slices of one of the tensor's axes this is (GPT-2 joins queries, keys, values).
      parts: number of slices.
      parts_axis: the axis that is cut, counted as the file does; -1 or 0.
      first: number of the first layer that has such a tensor; the rows of ours before it are never read, and 0.
      plus_row: name of a table whose row 0 is added to every row: token type 0, which is everywhere the same.
      gated: whether the line is for networks with gated feed-forward layers or for the others; None = for both.
    """

    ours: str
    theirs: str
    layout: Layout = SAME
    part: int = 0
    parts: int = 1
    parts_axis: int = -1
    first: int = 0
    plus_row: str | None = None
    gated: bool | None = None

    @property
    def stacked(self) -> bool:
        """Whether there is a tensor for every layer."""
        return "{i}" in self.theirs

    def applies(self, arrays: Collection[str], spec: TransformerSpec) -> bool:
        """Returns whether the line is about a network of this shape with these arrays."""
        return self.ours in arrays and self.gated in (None, spec.gated)


@dataclasses.dataclass(frozen=True)
class Config:
    """The contents of a config.json.

    Attributes:
      values: the JSON object.
      file: its path, for errors.
      tensors: names of the tensors of the checkpoint, for families whose config.json does not say which there are.
      asked: names of the fields that were read, absent ones included; shared with what `replaced` returns.
      notes: what the user should know of how the file was read; shared likewise.
    """

    values: Mapping[str, Any]
    file: str = CONFIG
    tensors: Collection[str] = ()
    asked: set[str] = dataclasses.field(default_factory=set, compare=False, repr=False)
    notes: list[str] = dataclasses.field(default_factory=list, compare=False, repr=False)

    def get(self, name: str, default: Any = None) -> Any:
        """Returns a value; `default` where it is absent or null."""
        self.asked.add(name)
        value = self.values.get(name)
        return default if value is None else value

    def given(self, name: str, default: Any) -> Any:
        """Returns a value, None where it is null; `default` where it is absent, as the class of transformers does."""
        self.asked.add(name)
        return self.values.get(name, default)

    def replaced(self, **values: Any) -> "Config":
        """Returns the contents with other values for some fields; what is read of it counts as read here."""
        return dataclasses.replace(self, values={**self.values, **values})

    def note(self, text: str) -> None:
        """Adds a line for the user."""
        self.notes.append(text)

    def need(self, name: str) -> Any:
        """Returns a value; raises `ConfigError` where it is absent or null."""
        value = self.get(name)
        if value is None:
            raise ConfigError(f"{self.file} does not say {name!r}", where=name, fix="Complete the file.")
        return value

    def choose(self, name: str, choices: Mapping[Any, Any], default: Any = None) -> Any:
        """Returns `choices[value]`; raises `ConfigError` for any other value."""
        value = self.get(name, default)
        # A list or an object of a damaged file cannot be looked up.
        if not isinstance(value, Hashable) or value not in choices:
            raise self.unsupported(name, f"supported: {', '.join(map(repr, choices))}")
        return choices[value]

    def refuse(self, **supported: Any) -> None:
        """Raises `ConfigError` where a value is given and is not the supported one."""
        for name, value in supported.items():
            if self.get(name, value) != value:
                raise self.unsupported(name, f"supported: {value!r}")

    def unsupported(self, name: str, why: str) -> ConfigError:
        """Returns the error about a value that the network cannot have."""
        return ConfigError(
            f"{self.file} says {name} = {shown(self.values.get(name))}, which this network cannot do ({why})",
            where=name,
            fix="Use a checkpoint without it.",
        )


@dataclasses.dataclass(frozen=True)
class Diffusion:
    """What a family of diffusion models was trained as: nothing of it shows in the weights.

    Attributes:
      shifted: whether the state at slot i - 1 predicts token i (as in an autoregressive model), not that at slot i.
      objective: its file in gin/objectives, without the ending.
      sampler: its file in gin/samplers, without the ending.
      mask_ids: (rows of the vocabulary, MASK) of the published checkpoints, for those whose files name no MASK.
      block_key: what config.json calls the number of tokens of a block; None where every token sees every other.
      block_size: of the published checkpoints whose config.json does not say it.
      sub_block: tokens that the sampler fills at a time; None = a whole block.
      names_eos: whether the objective's file has a macro EOS_ID.
      code: repository that holds the class that config.json names; None where transformers has it.
    """

    shifted: bool
    objective: str
    sampler: str
    mask_ids: tuple[tuple[int, int], ...] = ()
    block_key: str | None = None
    block_size: int | None = None
    sub_block: int | None = None
    names_eos: bool = False
    code: str | None = None

    @property
    def prediction(self) -> str:
        """The alignment in words."""
        return "shifted" if self.shifted else "same position"


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of checkpoints.

    Attributes:
      name: what `diffusion-lm list families` calls it.
      description: one sentence.
      source: where the family is published.
      model_types: values of `model_type` in config.json.
      architectures: classes in config.json's `architectures` whose weights have these names.
      prefix: of the names of all weights but the head's; a checkpoint may have been saved without it.
      weights: the table.
      copies: (name, name that it repeats where the embeddings are tied): may be in the file, must be equal.
      ignorable: regular expressions of tensors that carry nothing: masks and tables that follow from the config.
      spec: from config.json to the fields of a `TransformerSpec`.
      config: from a `TransformerSpec` to what is particular to the family in config.json; inverse of `spec`.
      renames: (regular expression, replacement) that make an older name of a tensor from the one in the table.
      causal: whether the family was trained from left to right.
      told_by: what says the network's shape, for errors.
      diffusion: what a family of diffusion models was trained as; None for all others.
      signature: regular expression of tensors that tell the family from others of its model types; "" = none does.
      special_ids: (field, id) of special tokens that transformers' class takes where config.json says none, for classes
        whose ids a smaller vocabulary does not have; `export` writes null for those.
      rows: tensor whose rows are the size of the vocabulary, whatever config.json says; None = config.json is right.
    """

    name: str
    description: str
    source: str
    model_types: tuple[str, ...]
    architectures: tuple[str, ...]
    prefix: str
    weights: tuple[Weight, ...]
    spec: Callable[[Config], dict[str, Any]]
    config: Callable[[TransformerSpec], dict[str, Any]]
    copies: tuple[tuple[str, str], ...] = ()
    ignorable: tuple[str, ...] = ()
    renames: tuple[tuple[str, str], ...] = ()
    causal: bool = True
    told_by: str = CONFIG
    diffusion: Diffusion | None = None
    signature: str = ""
    special_ids: tuple[tuple[str, int], ...] = ()
    rows: str | None = None
