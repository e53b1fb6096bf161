"""Arithmetic reasoning: GSM8K with equations as its chain of thought, and Countdown with four numbers.

GSM8K-symbolic (arXiv 2311.01460; the fine-tuning task of DiffuGPT, arXiv 2410.17891):

    inputs  the question
    targets <<16-3-4=9>> <<9*2=18>> #### 18

The equations are those marked in GSM8K's solutions; the prose around them is dropped. The metric compares the number
after `####`. The test split is that of GSM8K; validation is the first 256 rows of its training file. The augmented
training set of 2311.01460 (about 385,000 chains) can replace the local training file; chains without prose are kept
unchanged.
"""

import itertools
import json
import re
from collections.abc import Iterator

import seqio
import tensorflow as tf

from diffusion_lm.core.errors import ConfigError
from diffusion_lm.evaluation import metrics
from diffusion_lm_tasks import countdown, local_files, preprocessors, vocabularies

VALIDATION_ROWS = 256
_EQUATION = re.compile(r"<<[^<>]*>>")
_FILES = {"train": "reasoning/gsm8k_train.jsonl", "test": "reasoning/gsm8k_test.jsonl"}


def symbolic_chain(solution: str) -> str | None:
    """Returns the marked equations of a GSM8K solution and its answer; None if it has no marked answer."""
    answer = metrics.final_answer(solution)
    if answer is None:
        return None
    return " ".join([*_EQUATION.findall(solution), f"{metrics.ANSWER_MARK} {answer}"])


def symbolic_example(question: str, solution: str) -> dict[str, str] | None:
    """Returns the fields of one example, or None if the solution has no marked answer."""
    chain = symbolic_chain(solution)
    if chain is None:
        return None
    reference = json.dumps({"answer": metrics.final_answer(solution)})
    return {"inputs": " ".join(question.split()), "targets": chain, "reference": reference}


def read_local_gsm8k(split: str) -> Iterator[dict[str, str]]:
    """Yields the examples of a split of the local files in GSM8K's format (`question`, `answer`)."""
    rows = local_files.json_lines(_FILES["test" if split == "test" else "train"])
    if split != "test":
        first, last = (VALIDATION_ROWS, None) if split == "train" else (0, VALIDATION_ROWS)
        rows = itertools.islice(rows, first, last)
    for row in rows:
        example = symbolic_example(row["question"], row["answer"])
        if example is None:
            file = _FILES["test" if split == "test" else "train"]
            raise ConfigError(
                f"{file}: the solution of {row['question']!r} has no answer",
                where="local_gsm8k_symbolic",
                fix=f"End it with '{metrics.ANSWER_MARK} ANSWER', or remove the line.",
            )
        yield example


def symbolic(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """Makes the examples from the fields `question` and `answer` of TFDS."""

    def convert(question, answer):
        example = symbolic_example(question.numpy().decode(), answer.numpy().decode())
        return [example[field] if example else "" for field in ("inputs", "targets", "reference")]

    def fields(row):
        inputs, targets, reference = tf.py_function(convert, [row["question"], row["answer"]], [tf.string] * 3)
        for text in (inputs, targets, reference):
            text.set_shape(())
        return {"inputs": inputs, "targets": targets, "reference": reference}

    return dataset.map(fields).filter(lambda row: tf.strings.length(row["targets"]) > 0)


VOCABULARY = vocabularies.mixed_vocabulary()

preprocessors.add(
    "gsm8k_symbolic",
    source=seqio.TfdsDataSource(
        "gsm8k:1.0.0",
        splits={
            "train": f"train[{VALIDATION_ROWS}:]",
            "validation": f"train[:{VALIDATION_ROWS}]",
            "test": "test",
        },
    ),
    preprocessors=(symbolic,),
    features=preprocessors.paired_features(VOCABULARY),
    postprocess_fn=preprocessors.json_reference,
    metric_fns=(metrics.final_answers,),
)
preprocessors.add(
    "local_gsm8k_symbolic",
    source=preprocessors.python_source(read_local_gsm8k, ("inputs", "targets", "reference")),
    preprocessors=(),
    features=preprocessors.paired_features(VOCABULARY),
    postprocess_fn=preprocessors.json_reference,
    metric_fns=(metrics.final_answers,),
)
preprocessors.add(
    "countdown4",
    source=preprocessors.example_source(countdown.examples),
    preprocessors=(),
    features=preprocessors.paired_features(VOCABULARY),
    postprocess_fn=preprocessors.json_reference,
    metric_fns=(metrics.countdown,),
)
