"""From a family's table and the tensors of a checkpoint to arrays: a plan that is checked, then array by array."""

import contextlib
import dataclasses
import re
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np

from diffusion_lm.architectures.base import Architecture
from diffusion_lm.core.errors import ConfigError, near_names
from diffusion_lm.interop.name_maps.family import CONFIG, Family, Weight
from diffusion_lm.interop.tensor_files import Checkpoint
from diffusion_lm.nn.transformer import TransformerSpec

SLICE_BYTES = 1 << 26
"""Tensors above this size are read in slices of their rows, where their rows stay rows."""

_SHOWN = 4


class Meter:
    """Counts the bytes that are held on the host.

    Attributes:
      peak: most that were held at a time.
    """

    def __init__(self) -> None:
        self.peak = 0
        self._now = 0

    @contextlib.contextmanager
    def holding(self, size: int) -> Iterator[None]:
        """Counts `size` bytes as held inside of the context."""
        self._now += size
        self.peak = max(self.peak, self._now)
        try:
            yield
        finally:
            self._now -= size


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which tensors make which array.

    Attributes:
      weights: by the path of our array; the names in it are those of the file.
      ignored: tensors that are not read.
      missing: arrays that no tensor makes.
    """

    weights: dict[str, Weight]
    ignored: tuple[str, ...]
    missing: tuple[str, ...]


def plan_weights(family: Family, architecture: Architecture, checkpoint: Checkpoint, *, fresh_missing: bool) -> Plan:
    """Returns how the parameters are made from the tensors, having checked that all of it will work.

    Args:
      family: with its table.
      architecture: whose parameters are wanted.
      checkpoint: the tensors.
      fresh_missing: leaves arrays without a tensor to the caller instead of raising.

    Raises:
      ConfigError: tensors are missing, left over, of a wrong shape or dtype, or copies that differ.
    """
    spec, abstract = architecture.spec, _abstract(architecture)
    active = [line for line in family.weights if line.applies(abstract, spec)]
    taken = {line.theirs for line in active}
    lines = [_as_in_the_file(line, family, taken, checkpoint) for line in active]
    unnamed = set(abstract) - {line.ours for line in lines}
    assert not unnamed, f"the table of {family.name} has no line for {sorted(unnamed)}"
    present = set(checkpoint.files)
    weights, missing, absent, used = {}, [], [], set()
    for line in lines:
        leaf = abstract[line.ours]
        names = list(tensors_of(line, leaf.shape))
        gone = [name for name in names if name not in present]
        if gone:
            missing.append(line.ours)
            absent += gone
            # A few layers without a tensor are a broken file, whatever may be missing.
            if fresh_missing and len(gone) == len(names):
                continue
            if fresh_missing:
                raise _missing(family, absent, checkpoint)
            continue
        weights[line.ours] = line
        used.update(names)
        for name in names:
            _check(name, line, leaf.shape, family, spec, checkpoint)
    if absent and not fresh_missing:
        raise _missing(family, absent, checkpoint)
    ignored = _sort_leftovers(family, lines, present - used, checkpoint)
    return Plan(weights, tuple(ignored), tuple(missing))


def read_array(buffer: np.ndarray, weight: Weight, spec: TransformerSpec, checkpoint: Checkpoint, meter: Meter) -> None:
    """Fills `buffer` (zeros, of our array's shape and dtype) from the tensors."""
    if weight.stacked:
        for layer in range(weight.first, buffer.shape[0]):
            read_layer(buffer[layer], weight, layer, spec, checkpoint, meter)
    else:
        _fill(buffer, weight, weight.theirs, spec, checkpoint, meter)


def read_layer(
    buffer: np.ndarray, weight: Weight, layer: int, spec: TransformerSpec, checkpoint: Checkpoint, meter: Meter
) -> None:
    """Fills `buffer` (zeros, of the shape of one layer of our array) from the tensor of that layer."""
    if layer >= weight.first:
        _fill(buffer, weight, weight.theirs.format(i=layer), spec, checkpoint, meter)


def tensors_of(weight: Weight, shape: tuple[int, ...]) -> Iterator[str]:
    """Yields the names of the tensors of an array of this shape."""
    for name in (weight.theirs, weight.plus_row):
        if name is not None and weight.stacked:
            yield from (name.format(i=layer) for layer in range(weight.first, shape[0]))
        elif name is not None:
            yield name


def tensor_shape(weight: Weight, shape: tuple[int, ...], spec: TransformerSpec) -> tuple[int, ...]:
    """Returns the shape that each tensor of an array of `shape` must have."""
    one = jax.ShapeDtypeStruct(shape[1:] if weight.stacked else shape, np.float32)
    saved = jax.eval_shape(lambda x: weight.layout.save(x, spec), one).shape
    axis = weight.parts_axis % len(saved)
    return (*saved[:axis], saved[axis] * weight.parts, *saved[axis + 1 :])


def _abstract(architecture: Architecture) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(architecture.abstract_params())
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _as_in_the_file(line: Weight, family: Family, taken: set[str], checkpoint: Checkpoint) -> Weight:
    """Returns a line of the table with the names that this file uses: without the prefix, or a copy's for the original.

    A model saved without its head has no prefix; of tied weights a file holds one or both names.
    """
    names, first = checkpoint.files, line.first

    def spelled(name: str) -> str:
        copies = [copy for copy, original in family.copies if original == name and copy not in taken]
        for spelling in (name, *copies):
            for candidate in (spelling, spelling.removeprefix(family.prefix)):
                for known in (candidate, *_old_names(candidate, family)):
                    if known.format(i=first) in names:
                        return known
        return name

    plus_row = None if line.plus_row is None else spelled(line.plus_row)
    return dataclasses.replace(line, theirs=spelled(line.theirs), plus_row=plus_row)


def _old_names(name: str, family: Family) -> list[str]:
    return [re.sub(pattern, new, name) for pattern, new in family.renames if re.search(pattern, name)]


def _check(
    name: str, weight: Weight, shape: tuple[int, ...], family: Family, spec: TransformerSpec, checkpoint: Checkpoint
) -> None:
    checkpoint.check_dtype(name)
    found = checkpoint.shape(name)
    if name == weight.plus_row:
        fits, expected = len(found) == 2 and found[1] == shape[-1] and found[0] > 0, f"[n, {shape[-1]}]"
    else:
        wanted = tensor_shape(weight, shape, spec)
        fits, expected = found == wanted, str(list(wanted))
    if not fits:
        raise ConfigError(
            f"tensor {checkpoint.called(name)!r} has shape {list(found)} and {_told_by(family, checkpoint)} "
            f"asks for {expected}",
            where=str(checkpoint.files[name]),
            fix=_other_files(family, checkpoint),
        )


def _missing(family: Family, absent: list[str], checkpoint: Checkpoint) -> ConfigError:
    files = sorted({path.name for path in checkpoint.files.values()})
    return ConfigError(
        f"{len(absent)} tensors of a {family.name} model are missing: {_some(list(map(checkpoint.called, absent)))}",
        where=", ".join(files[:_SHOWN]),
        fix=f"Download all files of the checkpoint; one without the head of {family.architectures[0]} needs "
        "--fresh_missing, which initialises what is missing.",
    )


def _sort_leftovers(family: Family, lines: Iterable[Weight], left: set[str], checkpoint: Checkpoint) -> list[str]:
    """Returns the tensors that may be ignored; raises `ConfigError` about the first others."""
    ignored, unknown = [], []
    prefixes = ("", family.prefix)
    copies = dict(family.copies)
    for name in sorted(left):
        if name in copies:
            _check_copy(name, copies[name], family, checkpoint)
            ignored.append(name)
        elif any(re.fullmatch(pattern, prefix + name) for pattern in family.ignorable for prefix in prefixes):
            ignored.append(name)
        else:
            unknown.append(name)
    if unknown:
        names = [checkpoint.called(name) for name in unknown]
        near = near_names(names[0], (checkpoint.called(line.theirs.format(i=0)) for line in lines))
        raise ConfigError(
            f"{len(unknown)} tensors have no place in the {family.name} model of {_told_by(family, checkpoint)}: "
            f"{_some(names)}{near}",
            where=str(checkpoint.files[unknown[0]]),
            fix=_other_files(family, checkpoint),
        )
    return ignored


def _told_by(family: Family, checkpoint: Checkpoint) -> str:
    """Returns what says the network's shape, for errors."""
    return family.told_by if checkpoint.gguf is None else "its metadata"


def _other_files(family: Family, checkpoint: Checkpoint) -> str:
    if checkpoint.gguf is not None:
        return "Import the Hugging Face folder that the file was made from."
    if family.told_by == CONFIG:
        return f"Use the {CONFIG} that belongs to these weights."
    return "Use a checkpoint whose tensors are all of one network."


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
    """Returns whether two arrays hold the same numbers; NaN is reported when it is read, not as a difference."""
    return a.shape == b.shape and bool(np.all((a == b) | ((a != a) & (b != b))))


def _check_copy(name: str, original: str, family: Family, checkpoint: Checkpoint) -> None:
    source = original if original in checkpoint.files else original.removeprefix(family.prefix)
    same = source in checkpoint.files and checkpoint.shape(name) == checkpoint.shape(source)
    if same:
        rows = checkpoint.shape(name)[0]
        step = max(1, SLICE_BYTES // max(1, 4 * int(np.prod(checkpoint.shape(name)[1:]))))
        parts = [slice(start, min(start + step, rows)) for start in range(0, rows, step)]
        same = all(_equal(checkpoint.read(name, part), checkpoint.read(source, part)) for part in parts)
    if same:
        return
    if any(line.theirs == name for line in family.weights):
        raise ConfigError(
            f"tensor {name!r} differs from {source!r}, though config.json ties them",
            where=str(checkpoint.files[name]),
            fix="Set tie_word_embeddings to false in config.json if the model was trained with both.",
        )
    raise ConfigError(
        f"tensor {name!r} differs from {source!r}, and a {family.name} model has one array for both",
        where=str(checkpoint.files[name]),
        fix="Use a checkpoint in which they are equal.",
    )


def _fill(into: np.ndarray, weight: Weight, name: str, spec: TransformerSpec, checkpoint: Checkpoint, meter: Meter):
    """Writes one tensor into our array, in slices where it is large."""
    rows, columns = checkpoint.shape(name)[0], int(np.prod(checkpoint.shape(name)[1:]))
    step = rows
    if weight.layout.row_by_row and weight.parts == 1:
        step = min(rows, max(1, SLICE_BYTES // (4 * columns)))
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows)) if step < rows else slice(None)
        with meter.holding(min(step, rows - start) * columns * 4):
            tensor = checkpoint.read(name, part)
            if weight.parts > 1:
                tensor = np.split(tensor, weight.parts, axis=weight.parts_axis)[weight.part]
            if weight.plus_row is not None:
                tensor = tensor.astype(np.float32) + checkpoint.read(weight.plus_row, slice(0, 1)).astype(np.float32)
            loaded = weight.layout.load(tensor, spec)
            region = (slice(start, start + loaded.shape[0]), *(slice(0, size) for size in loaded.shape[1:]))
            with np.errstate(over="ignore"):
                into[region] = loaded
            _check_finite(into[region], loaded, name, checkpoint)


def _check_finite(stored: np.ndarray, loaded: np.ndarray, name: str, checkpoint: Checkpoint) -> None:
    """Raises `ConfigError` about a tensor with NaN or infinity, or with numbers that are infinite in our dtype."""
    bad = int(stored.size - np.count_nonzero(np.isfinite(stored)))
    if not bad:
        return
    what = f"{bad:,} values that are NaN or infinite"
    if np.isfinite(loaded).all():
        what = f"{bad:,} values that are too large for {stored.dtype}"
    raise ConfigError(
        f"tensor {checkpoint.called(name)!r} holds {what}",
        where=str(checkpoint.files[name]),
        fix="Use another checkpoint of this model: everything that this one computes is NaN.",
    )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
