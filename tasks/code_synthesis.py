r"""Code synthesis on real data: MBPP through TFDS and from a local file, and docstring-to-function pairs.

Prompt of MBPP (its README): task, the three visible asserts, `[BEGIN]`. The target is the solution, followed by EOS in
place of the README's `[DONE]`. Line ends are Unix. The metric is pass@k over the same asserts, after `test_setup_code`.
Splits: task ids 601-974 train, 511-600 validation, 11-510 test.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import seqio
import tensorflow as tf

from diffusion_lm.core.errors import ConfigError
from diffusion_lm.evaluation import metrics
from diffusion_lm_tasks import local_files, preprocessors, tfds_builders, vocabularies
from diffusion_lm_tasks.splits import split_of

_OPENING = "You are an expert Python programmer, and here is your task: "
_TESTS = " Your code should pass these tests:\n\n"
_BEGIN = "\n[BEGIN]\n"
_SPLITS = ("train", "validation", "test")


def prompts(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """Makes `inputs` and `targets`, and keeps `test_setup_code` and `test_list` for the metric."""

    def convert(example):
        tests = preprocessors.unix_newlines(example["test_list"])
        description = tf.strings.strip(preprocessors.unix_newlines(example["text"]))
        return {
            "inputs": tf.strings.join(
                [_OPENING, description, _TESTS, tf.strings.reduce_join(tests, separator="\n"), _BEGIN]
            ),
            "targets": preprocessors.unix_newlines(example["code"]),
            "setup": preprocessors.unix_newlines(example["test_setup_code"]),
            "tests": tests,
        }

    return dataset.map(convert, num_parallel_calls=tf.data.AUTOTUNE)


def hidden_tests_reference(text: str, example=None, is_target: bool = False):
    """Postprocessor: returns `{"setup": ..., "tests": [...]}` for a target, the text itself for a prediction."""
    if not is_target:
        return text
    return {"setup": example["setup"].decode(), "tests": [test.decode() for test in example["tests"]]}


def read_local_mbpp(split: str) -> Iterator[dict[str, str]]:
    """Yields the prompts, solutions and tests of the local MBPP file."""
    first, last = tfds_builders.MBPP_SPLITS[split]
    unix = preprocessors.unix_newlines
    for row in local_files.json_lines("code_eval/mbpp.jsonl"):
        if first <= row["task_id"] <= last:
            tests = [unix(test) for test in _tests(row)]
            yield {
                "inputs": _OPENING + unix(row["text"]).strip() + _TESTS + "\n".join(tests) + _BEGIN,
                "targets": unix(row["code"]),
                "reference": json.dumps({"setup": unix(row["test_setup_code"]), "tests": tests}),
            }


def _tests(row: Mapping[str, Any]) -> list[str]:
    """Returns the tests of a row of MBPP. A string is one test. No tests are an error: any program would pass."""
    tests = row["test_list"]
    tests = [tests] if isinstance(tests, str) else tests
    if not isinstance(tests, list) or not all(isinstance(test, str) and test.strip() for test in tests) or not tests:
        raise ConfigError(
            f"code_eval/mbpp.jsonl, task_id {row['task_id']}: test_list={tests!r} must be a non-empty list of tests",
            where="local_mbpp",
            fix="Correct or remove the line.",
        )
    return tests


def read_local_functions(split: str) -> Iterator[dict[str, str]]:
    """Yields (signature and docstring, function) pairs of the local Python functions, split by docstring."""
    for row in local_files.json_lines("code/python_functions.jsonl"):
        doc = preprocessors.unix_newlines(row["doc"]).strip()
        if split_of(doc.lower(), held_out=0.02) == split:
            code = preprocessors.unix_newlines(row["code"])
            yield {"inputs": f"Write a function {row['name']}: {doc}{_BEGIN}", "targets": code}


VOCABULARY = vocabularies.mixed_vocabulary()

preprocessors.add(
    "mbpp",
    source=seqio.TfdsDataSource("mbpp:1.0.0", splits=_SPLITS),
    preprocessors=(prompts,),
    features=preprocessors.paired_features(VOCABULARY),
    postprocess_fn=hidden_tests_reference,
    metric_fns=(metrics.pass_at_k,),
)
preprocessors.add(
    "local_mbpp",
    source=preprocessors.python_source(read_local_mbpp, ("inputs", "targets", "reference")),
    preprocessors=(),
    features=preprocessors.paired_features(VOCABULARY),
    postprocess_fn=preprocessors.json_reference,
    metric_fns=(metrics.pass_at_k,),
)
preprocessors.add(
    "local_python_functions",
    source=preprocessors.python_source(read_local_functions, ("inputs", "targets")),
    preprocessors=(),
    features=preprocessors.paired_features(VOCABULARY),
    postprocess_fn=preprocessors.text_reference,
    metric_fns=(metrics.exact_match,),
)
