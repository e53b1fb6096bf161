"""Reads SeqIO tasks. Needs TensorFlow, so only `materialise` imports this module."""

import importlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import seqio

from diffusion_lm.core.errors import ConfigError, near_names
from diffusion_lm.core.rng import example_number
from diffusion_lm.data.round_trip import Losses
from diffusion_lm.data.schema import Record
from diffusion_lm.data.seqio_vocabulary import LazyVocabulary
from diffusion_lm.data.vocabulary import Vocabulary

_BATCH = 512
"""Number of examples converted from TensorFlow to NumPy at a time."""


def get_task(name: str, modules: Sequence[str] = ()) -> seqio.Task:
    """Imports `modules`, which register tasks, and returns the SeqIO task `name`.

    Raises:
      ConfigError: a module cannot be imported, or no task has that name.
    """
    for module in modules:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"cannot import {module!r}, which should register tasks: {error}",
                where="--module",
                fix="Install it or correct its name.",
            ) from error
    if name not in seqio.TaskRegistry.names():
        imported = ", ".join(modules) or "none"
        raise ConfigError(
            f"unknown task {name!r}{near_names(name, seqio.TaskRegistry.names())}",
            fix=f"Pass the module that registers it with --module (imported: {imported}).",
        )
    return seqio.TaskRegistry.get(name)


def task_vocabulary(task: seqio.Task) -> Vocabulary:
    """Returns the vocabulary of a task's inputs and targets, including the extra ids of SeqIO."""
    targets = task.output_features["targets"].vocabulary
    inputs = task.output_features.get("inputs", task.output_features["targets"]).vocabulary
    if inputs == targets:
        if isinstance(targets, LazyVocabulary):
            return targets.vocabulary
        if isinstance(targets, seqio.SentencePieceVocabulary):
            return Vocabulary(targets.sp_model)
    raise ConfigError(
        f"task {task.name!r} must use one LazyVocabulary or seqio.SentencePieceVocabulary for its inputs and targets",
        fix="Pass the same vocabulary object to both features.",
    )


def metric_paths(task: seqio.Task) -> tuple[str, ...]:
    """Returns the import paths `"module:function"` of a task's metric functions."""
    paths = []
    for metric in task.metric_fns:
        name = getattr(metric, "__qualname__", "")
        if not name.isidentifier():
            raise ConfigError(
                f"metric {metric!r} of task {task.name!r} cannot be imported by name",
                fix="Use a module-level function, not a lambda, partial or method.",
            )
        paths.append(f"{metric.__module__}:{name}")
    return tuple(paths)


def task_records(
    task: seqio.Task,
    split: str,
    *,
    vocabulary: Vocabulary,
    chunk_length: int | None = None,
    losses: Losses | None = None,
) -> Iterator[Record]:
    """Yields the records of one split in the task's own order, unshuffled.

    An EOS appended by the task's preprocessors is removed, because the converters add it. Targets of tasks without
    inputs are documents: each ends with EOS and is split into chunks of at most `chunk_length` tokens. A feature
    `suffix` is the text after the target. `losses` counts the characters that the vocabulary cannot encode, in the
    texts that the task keeps next to its tokens (`*_pretokenized`).

    Raises:
      ConfigError: the task has no such split or no feature `targets`, or `losses` finds too many lossy targets.
    """
    if split not in task.splits:
        raise ConfigError(
            f"task {task.name!r} has no split {split!r}{near_names(split, task.splits)}",
            fix=f"Use one of {', '.join(task.splits)}.",
        )
    if "targets" not in task.output_features:
        raise ConfigError(f"task {task.name!r} has no feature `targets`", fix="Name its features inputs and targets.")
    has_inputs = "inputs" in task.output_features
    eos_id = vocabulary.specials.eos_id
    index = 0

    def count(part: str, feature: str, tokens: np.ndarray) -> None:
        text = example.get(f"{feature}_pretokenized")
        if losses is not None and isinstance(text, bytes | str):
            losses.add(part, index, _json(text), tokens.tolist())

    for example in _examples(task.get_dataset(sequence_length=None, split=split, shuffle=False)):
        targets = _without_eos(example["targets"], eos_id)
        count("targets", "targets", targets)
        if not has_inputs:
            document = np.append(targets, eos_id)
            for piece in np.split(document, range(chunk_length or len(document), len(document), chunk_length or 1)):
                yield Record(targets[:0], piece, example_number(f"{task.name}/{split}/{index}"))
                index += 1
            continue
        inputs = _without_eos(example["inputs"], eos_id)
        count("inputs", "inputs", inputs)
        suffix = _without_eos(example["suffix"], eos_id) if "suffix" in task.output_features else targets[:0]
        if "suffix" in task.output_features:
            count("suffixes", "suffix", suffix)
        inputs_text = _text(example.get("inputs_pretokenized"), inputs, vocabulary)
        targets_text = _text(example.get("targets_pretokenized"), targets, vocabulary)
        yield Record(
            inputs=inputs,
            targets=targets,
            example_id=example_number(f"{task.name}/{split}/{index}"),
            inputs_text=inputs_text,
            targets_text=targets_text,
            reference=_json(task.postprocess_fn(targets_text, example=example, is_target=True)),
            suffix=suffix,
        )
        index += 1


def _examples(dataset: Any) -> Iterator[dict[str, Any]]:
    """Yields the examples of a `tf.data.Dataset` as NumPy values, in two thirds of the time of `as_numpy_iterator`.

    TensorFlow takes about as long to convert one example as a batch, so ragged batches are converted and split here.
    Features of unknown or higher rank cannot be batched without padding; they are converted one by one.
    """
    ranks = [getattr(getattr(spec, "shape", None), "rank", None) for spec in dataset.element_spec.values()]
    if any(rank is None or rank > 1 for rank in ranks):
        yield from dataset.as_numpy_iterator()
        return
    for batch in dataset.ragged_batch(_BATCH).as_numpy_iterator():
        rows = {
            name: np.split(feature.values, feature.row_splits[1:-1]) if hasattr(feature, "row_splits") else feature
            for name, feature in batch.items()
        }
        for index in range(len(next(iter(rows.values())))):
            yield {name: feature[index] for name, feature in rows.items()}


def _without_eos(tokens: np.ndarray, eos_id: int) -> np.ndarray:
    return tokens[:-1] if len(tokens) and tokens[-1] == eos_id else tokens


def _text(text: Any, tokens: np.ndarray, vocabulary: Vocabulary) -> str:
    """Returns the text that the task kept next to the tokens, or else the decoded tokens."""
    return _json(text) if isinstance(text, bytes | str) else vocabulary.decode(tokens)


def _json(value: Any) -> Any:
    """Converts the output of a postprocessor (bytes, arrays, tuples) to JSON values."""
    if isinstance(value, bytes):
        return value.decode("utf-8", errors="replace")
    if isinstance(value, np.ndarray | np.generic):
        return _json(value.tolist())
    if isinstance(value, dict):
        return {_json(key): _json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json(item) for item in value]
    return value
