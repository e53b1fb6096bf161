"""Assigns the tensors of a checkpoint to parameters (`plan_weights`), and fills arrays from them (`read_array`)."""

import contextlib
import dataclasses
import re
from collections.abc import Iterable, Iterator

import jax
import numpy as np

from diffusion_lm.architectures.base import Architecture
from diffusion_lm.core.errors import ConfigError, near_names
from diffusion_lm.interop.name_maps.family import CONFIG, Family, Weight
from diffusion_lm.interop.tensor_files import Checkpoint
from diffusion_lm.nn.transformer import TransformerSpec

SLICE_BYTES = 1 << 26
"""Bytes. Larger tensors are read in slices of rows where the transform works row by row."""

_SHOWN = 4


class Meter:
    """Counts the bytes that are held on the host.

    Attributes:
      peak: largest number that was held at one time.
    """

    def __init__(self) -> None:
        self.peak = 0
        self._now = 0

    @contextlib.contextmanager
    def holding(self, size: int) -> Iterator[None]:
        """Counts `size` bytes as held inside the context."""
        self._now += size
        self.peak = max(self.peak, self._now)
        try:
            yield
        finally:
            self._now -= size


@dataclasses.dataclass(frozen=True)
class Plan:
    """The tensors of each parameter.

    Attributes:
      weights: by the path of the parameter, with the names that this file uses.
      ignored: tensors that are not read.
      missing: parameters without a tensor.
    """

    weights: dict[str, Weight]
    ignored: tuple[str, ...]
    missing: tuple[str, ...]


def plan_weights(family: Family, architecture: Architecture, checkpoint: Checkpoint, *, fresh_missing: bool) -> Plan:
    """Returns the tensors of each parameter, after checking names, shapes and dtypes.

    Args:
      family: the family, with its table.
      architecture: the network.
      checkpoint: the tensors.
      fresh_missing: leaves parameters without a tensor to the caller instead of raising.

    Raises:
      ConfigError: a tensor is missing, unknown, or of a wrong shape or dtype, or a tied copy differs.
    """
    spec, abstract = architecture.spec, _abstract(architecture)
    active = [line for line in family.weights if line.applies(abstract, spec)]
    taken = {line.tensor for line in active}
    lines = [_as_in_the_file(line, family, taken, checkpoint) for line in active]
    unnamed = set(abstract) - {line.param for line in lines}
    assert not unnamed, f"the table of {family.name} has no line for {sorted(unnamed)}"
    present = set(checkpoint.files)
    weights, missing, absent, used = {}, [], [], set()
    for line in lines:
        leaf = abstract[line.param]
        names = list(tensors_of(line, leaf.shape))
        without = [name for name in names if name not in present]
        if without:
            missing.append(line.param)
            absent += without
            # Where only some layers lack a tensor, the file is broken and not a model without this part.
            if fresh_missing and len(without) == len(names):
                continue
            if fresh_missing:
                raise _missing(family, absent, checkpoint)
            continue
        weights[line.param] = line
        used.update(names)
        for name in names:
            _check(name, line, leaf.shape, family, spec, checkpoint)
    if absent and not fresh_missing:
        raise _missing(family, absent, checkpoint)
    ignored = _sort_leftovers(family, lines, present - used, checkpoint)
    return Plan(weights, tuple(ignored), tuple(missing))


def read_array(buffer: np.ndarray, weight: Weight, spec: TransformerSpec, checkpoint: Checkpoint, meter: Meter) -> None:
    """Fills `buffer`, zeros of the parameter's shape and dtype, from the tensors."""
    if weight.stacked:
        for layer in range(weight.first_layer, buffer.shape[0]):
            read_layer(buffer[layer], weight, layer, spec, checkpoint, meter)
    else:
        _fill(buffer, weight, weight.tensor, spec, checkpoint, meter)


def read_layer(
    buffer: np.ndarray, weight: Weight, layer: int, spec: TransformerSpec, checkpoint: Checkpoint, meter: Meter
) -> None:
    """Fills `buffer`, zeros of the shape of one layer of the parameter, from the tensor of that layer."""
    if layer >= weight.first_layer:
        _fill(buffer, weight, weight.tensor.format(i=layer), spec, checkpoint, meter)


def tensors_of(weight: Weight, shape: tuple[int, ...]) -> Iterator[str]:
    """Yields the names of the tensors of a parameter of this shape."""
    for name in (weight.tensor, weight.add_row):
        if name is not None and weight.stacked:
            yield from (name.format(i=layer) for layer in range(weight.first_layer, shape[0]))
        elif name is not None:
            yield name


def tensor_shape(weight: Weight, shape: tuple[int, ...], spec: TransformerSpec) -> tuple[int, ...]:
    """Returns the shape that each tensor of a parameter of `shape` must have."""
    one = jax.ShapeDtypeStruct(shape[1:] if weight.stacked else shape, np.float32)
    saved = jax.eval_shape(lambda x: weight.transform.save(x, spec), one).shape
    axis = weight.parts_axis % len(saved)
    return (*saved[:axis], saved[axis] * weight.parts, *saved[axis + 1 :])


def _abstract(architecture: Architecture) -> dict[str, jax.ShapeDtypeStruct]:
    leaves = jax.tree_util.tree_leaves_with_path(architecture.abstract_params())
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _as_in_the_file(line: Weight, family: Family, taken: set[str], checkpoint: Checkpoint) -> Weight:
    """Returns a line of the table with the names that this file uses.

    They differ from the table's where a model was saved without its head (no prefix), where a file has only the second
    name of tied weights, and in older files.
    """
    names, first = checkpoint.files, line.first_layer

    def spelled(name: str) -> str:
        copies = [copy for copy, original in family.tied if original == name and copy not in taken]
        for spelling in (name, *copies):
            for candidate in (spelling, spelling.removeprefix(family.prefix)):
                for known in (candidate, *_old_names(candidate, family)):
                    if known.format(i=first) in names:
                        return known
        return name

    add_row = None if line.add_row is None else spelled(line.add_row)
    return dataclasses.replace(line, tensor=spelled(line.tensor), add_row=add_row)


def _old_names(name: str, family: Family) -> list[str]:
    return [re.sub(pattern, new, name) for pattern, new in family.old_names if re.search(pattern, name)]


def _check(
    name: str, weight: Weight, shape: tuple[int, ...], family: Family, spec: TransformerSpec, checkpoint: Checkpoint
) -> None:
    checkpoint.check_dtype(name)
    found = checkpoint.shape(name)
    if name == weight.add_row:
        fits, expected = len(found) == 2 and found[1] == shape[-1] and found[0] > 0, f"[n, {shape[-1]}]"
    else:
        wanted = tensor_shape(weight, shape, spec)
        fits, expected = found == wanted, str(list(wanted))
    if not fits:
        raise ConfigError(
            f"tensor {checkpoint.name_in_file(name)!r} has shape {list(found)}, "
            f"but {_shape_source(family, checkpoint)} requires {expected}",
            where=str(checkpoint.files[name]),
            fix=_other_files(family, checkpoint),
        )


def _missing(family: Family, absent: list[str], checkpoint: Checkpoint) -> ConfigError:
    files = sorted({path.name for path in checkpoint.files.values()})
    names = _some(list(map(checkpoint.name_in_file, absent)))
    return ConfigError(
        f"{len(absent)} tensors of a {family.name} model are missing: {names}",
        where=", ".join(files[:_SHOWN]),
        fix=f"Download all files of the checkpoint. If it was saved without the head of {family.architectures[0]}, add "
        "--fresh_missing, which initialises what is missing.",
    )


def _sort_leftovers(family: Family, lines: Iterable[Weight], left: set[str], checkpoint: Checkpoint) -> list[str]:
    """Returns the unused tensors that may be ignored; raises `ConfigError` about the others."""
    ignored, unknown = [], []
    prefixes = ("", family.prefix)
    copies = dict(family.tied)
    for name in sorted(left):
        if name in copies:
            _check_copy(name, copies[name], family, checkpoint)
            ignored.append(name)
        elif any(re.fullmatch(pattern, prefix + name) for pattern in family.ignored_tensors for prefix in prefixes):
            ignored.append(name)
        else:
            unknown.append(name)
    if unknown:
        names = [checkpoint.name_in_file(name) for name in unknown]
        near = near_names(names[0], (checkpoint.name_in_file(line.tensor.format(i=0)) for line in lines))
        raise ConfigError(
            f"{len(unknown)} tensors do not belong to the {family.name} model of {_shape_source(family, checkpoint)}: "
            f"{_some(names)}{near}",
            where=str(checkpoint.files[unknown[0]]),
            fix=_other_files(family, checkpoint),
        )
    return ignored


def _shape_source(family: Family, checkpoint: Checkpoint) -> str:
    """Returns what the shape of the network was read from, for errors."""
    return family.shape_source if checkpoint.gguf is None else "its metadata"


def _other_files(family: Family, checkpoint: Checkpoint) -> str:
    if checkpoint.gguf is not None:
        return "Import the Hugging Face folder that the file was made from."
    if family.shape_source == CONFIG:
        return f"Use the {CONFIG} that belongs to these weights."
    return "Use a checkpoint whose tensors belong to one network."


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
    """Returns whether two arrays hold the same numbers. NaN equals NaN: it is reported when the tensor is read."""
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
    if any(line.tensor == name for line in family.weights):
        raise ConfigError(
            f"tensor {name!r} differs from {source!r}, but config.json ties them",
            where=str(checkpoint.files[name]),
            fix="If the model was trained untied, set tie_word_embeddings to false in config.json.",
        )
    raise ConfigError(
        f"tensor {name!r} differs from {source!r}, but a {family.name} model has one parameter for both",
        where=str(checkpoint.files[name]),
        fix="Use a checkpoint in which they are equal.",
    )


def _fill(into: np.ndarray, weight: Weight, name: str, spec: TransformerSpec, checkpoint: Checkpoint, meter: Meter):
    """Writes one tensor into our array, in slices of rows where it is large."""
    rows, columns = checkpoint.shape(name)[0], int(np.prod(checkpoint.shape(name)[1:]))
    step = rows
    if weight.transform.row_by_row and weight.parts == 1:
        step = min(rows, max(1, SLICE_BYTES // (4 * columns)))
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows)) if step < rows else slice(None)
        with meter.holding(min(step, rows - start) * columns * 4):
            tensor = checkpoint.read(name, part)
            if weight.parts > 1:
                tensor = np.split(tensor, weight.parts, axis=weight.parts_axis)[weight.part]
            if weight.add_row is not None:
                tensor = tensor.astype(np.float32) + checkpoint.read(weight.add_row, slice(0, 1)).astype(np.float32)
            loaded = np.asarray(weight.transform.load(tensor, spec))
            # Ours may be larger than the tensor: the rows that pad the vocabulary stay zeros.
            region = (slice(start, start + loaded.shape[0]), *(slice(0, size) for size in loaded.shape[1:]))
            # The assignment casts to the parameter's dtype. An overflow becomes infinity, which is checked next.
            with np.errstate(over="ignore"):
                into[region] = loaded
            _check_finite(into[region], loaded, name, checkpoint)


def _check_finite(stored: np.ndarray, loaded: np.ndarray, name: str, checkpoint: Checkpoint) -> None:
    """Raises `ConfigError` about a tensor with NaN or infinity, or with numbers that overflow the parameter's dtype."""
    bad = int(stored.size - np.count_nonzero(np.isfinite(stored)))
    if not bad:
        return
    what = f"{bad:,} values that are NaN or infinite"
    if np.isfinite(loaded).all():
        what = f"{bad:,} values that are too large for {stored.dtype}"
    raise ConfigError(
        f"tensor {checkpoint.name_in_file(name)!r} holds {what}",
        where=str(checkpoint.files[name]),
        fix="Use another checkpoint of this model: with these values every output is NaN.",
    )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
