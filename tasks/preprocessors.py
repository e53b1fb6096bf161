"""Sources, preprocessors and postprocessors shared by the tasks.

Tasks of this package yield `inputs` and `targets` (token ids without EOS), their text as `*_pretokenized` and, if
metrics need more than the text of the target, `reference` as a JSON string. Pretraining tasks have whole documents as
targets and no inputs.
"""

import itertools
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any, overload

import seqio
import tensorflow as tf

from diffusion_lm_tasks.splits import SPLITS, Example

_ROWS_AT_ONCE = 64  # fetching one row from Python takes TensorFlow as long as fetching many

Reader = Callable[[str], Iterable[Mapping[str, str]]]


def python_source(read: Reader, fields: tuple[str, ...], splits: tuple[str, ...] = SPLITS) -> seqio.FunctionDataSource:
    """Returns a SeqIO source with the string `fields` of the rows that `read(split)` yields; reads lazily."""

    def dataset_fn(split: str, shuffle_files: bool = False, seed: int | None = None) -> tf.data.Dataset:
        del shuffle_files, seed
        signature = {field: tf.TensorSpec((None,), tf.string) for field in fields}

        def parts():
            rows = iter(read(split))
            while part := tuple(itertools.islice(rows, _ROWS_AT_ONCE)):
                yield {field: [row[field] for row in part] for field in fields}

        return tf.data.Dataset.from_generator(parts, output_signature=signature).unbatch()

    return seqio.FunctionDataSource(dataset_fn, splits=splits)


def example_source(
    examples: Callable[[], Mapping[str, tuple[Example, ...]]], splits: tuple[str, ...] = SPLITS
) -> seqio.FunctionDataSource:
    """Returns a source of generated examples, which are generated when a split is first read."""

    def read(split: str):
        for example in examples()[split]:
            yield {"inputs": example.inputs, "targets": example.targets, "reference": example.reference}

    return python_source(read, ("inputs", "targets", "reference"), splits)


def paired_features(vocabulary: seqio.Vocabulary) -> dict[str, seqio.Feature]:
    """Returns the features of a task with inputs and targets, without EOS, which the converters add."""
    feature = seqio.Feature(vocabulary=vocabulary, add_eos=False, dtype=tf.int32)
    return {"inputs": feature, "targets": feature}


def document_features(vocabulary: seqio.Vocabulary) -> dict[str, seqio.Feature]:
    """Returns the features of a pretraining task."""
    return {"targets": seqio.Feature(vocabulary=vocabulary, add_eos=False, dtype=tf.int32)}


def tokenize(dataset: tf.data.Dataset, output_features: Mapping[str, seqio.Feature]) -> tf.data.Dataset:
    """Encodes the features and keeps their text as `*_pretokenized`."""
    return seqio.preprocessors.tokenize(dataset, output_features, copy_pretokenized=True)


def documents(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """Makes each `text` a pretraining target; empty texts are dropped."""
    dataset = dataset.filter(lambda example: tf.strings.length(example["text"]) > 0)
    return dataset.map(lambda example: {"targets": example["text"]}, num_parallel_calls=tf.data.AUTOTUNE)


@overload
def unix_newlines(text: str) -> str: ...


@overload
def unix_newlines(text: tf.Tensor) -> tf.Tensor: ...


def unix_newlines(text: str | tf.Tensor) -> str | tf.Tensor:
    """Replaces CRLF and CR by LF; MBPP's solutions have Windows line ends."""
    if isinstance(text, str):
        return text.replace("\r\n", "\n").replace("\r", "\n")
    return tf.strings.regex_replace(text, "\r\n?", "\n")


def text_reference(text: str, example: Mapping[str, Any] | None = None, is_target: bool = False) -> str:
    """Postprocessor: the reference is the text of the target."""
    del example, is_target
    return text


def json_reference(text: str, example: Mapping[str, Any] | None = None, is_target: bool = False) -> Any:
    """Postprocessor: the value of the JSON feature `reference` for a target, the text itself for a prediction."""
    if not is_target:
        return text
    assert example is not None
    reference = example["reference"]
    return json.loads(reference if isinstance(reference, str) else bytes(reference).decode())


def add(
    name: str,
    source: seqio.DataSource,
    preprocessors: Iterable[Callable[..., Any]],
    features: Mapping[str, seqio.Feature],
    postprocess_fn: Callable[..., Any] | None = None,
    metric_fns: Iterable[Callable[..., Any]] = (),
) -> None:
    """Registers a task unless the name is already registered, so that a module can be imported under two names."""
    if name not in seqio.TaskRegistry.names():
        seqio.TaskRegistry.add(
            name,
            source=source,
            preprocessors=[*preprocessors, tokenize],
            output_features=dict(features),
            postprocess_fn=postprocess_fn,
            metric_fns=list(metric_fns),
        )
