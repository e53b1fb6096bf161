"""SQuAD v1.1: through TFDS with whole contexts, and from local files with contexts truncated to a window.

Prompt as in T5: `question: ... context: ...`. The reference is the list of gold answers; the metric is the official
F1 / exact match. Splits have the names of TFDS: SQuAD's dev set is `validation`, and there is no public test set. A
question without an answer (SQuAD v2.0) is kept, with an empty target and empty `answers`.

Window of the local task (`CONTEXT_CHARACTERS`): a longer context is truncated to a run of whole sentences. In training
the run contains the answer. In evaluation, where the answer is unknown, it is the run that shares the most words with
the question; an answer outside it counts as wrong.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import seqio
import tensorflow as tf

from diffusion_lm.core.errors import ConfigError
from diffusion_lm.evaluation import metrics
from diffusion_lm_tasks import local_files, preprocessors, vocabularies

CONTEXT_CHARACTERS = 1200
SELECTION_BUCKETS = 50
"""One in this many articles of the training set is held out for checkpoint selection."""


def prompts(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """Makes the prompt, the first gold answer as target (empty if there is none), and all of them as `answers`."""

    def convert(example):
        answers = example["answers"]["text"]
        return {
            "inputs": tf.strings.join(["question: ", example["question"], " context: ", example["context"]]),
            "targets": tf.concat([answers, [""]], 0)[0],
            "answers": answers,
        }

    return dataset.map(convert, num_parallel_calls=tf.data.AUTOTUNE)


def of_articles(held_out: bool) -> Callable[[tf.data.Dataset], tf.data.Dataset]:
    """Returns a preprocessor that keeps the held-out articles (one in `SELECTION_BUCKETS`) or all others.

    Articles are chosen by title, because the paragraphs and questions of an article share facts.
    """

    def keep(dataset: tf.data.Dataset) -> tf.data.Dataset:
        def wanted(example):
            return tf.equal(tf.strings.to_hash_bucket_fast(example["title"], SELECTION_BUCKETS) == 0, held_out)

        return dataset.filter(wanted)

    return keep


def answers_reference(text: str, example=None, is_target: bool = False):
    """Postprocessor: returns `{"answers": [...]}` for a target, the text itself for a prediction."""
    if not is_target:
        return text
    return {"answers": [answer.decode() for answer in example["answers"]]}


def _words(text: str) -> set[str]:
    return {word for word in re.findall(r"\w+", text.lower()) if len(word) > 3}


def window(context: str, question: str, span: tuple[int, int] | None, limit: int = CONTEXT_CHARACTERS) -> str:
    """Truncates `context` to at most `limit` characters (policy: see the module docstring).

    Args:
      context: the whole paragraph.
      question: the run of sentences with the most words of it is chosen.
      span: character range `(start, end)` that the run must contain; None in evaluation.
      limit: maximum number of characters; a longer sentence is truncated.
    """
    if len(context) <= limit:
        return context
    starts = [0, *(match.end() for match in re.finditer(r"(?<=[.!?])\s+", context))]
    ends = [*starts[1:], len(context)]
    runs = []
    for first, start in enumerate(starts):
        end = max((e for e in ends[first:] if e - start <= limit), default=start + limit)
        if span is None or (start <= span[0] and span[1] <= end):
            runs.append(context[start:end].strip())
    if not runs:
        assert span is not None
        start = max(0, min(span[0] - limit // 4, len(context) - limit))
        return context[start : max(start + limit, span[1])].strip()
    asked = _words(question)
    return max(runs, key=lambda run: len(asked & _words(run)))


def read_local(split: str) -> Iterator[dict[str, str]]:
    """Yields prompts, targets and references of the local SQuAD files."""
    name = {"train": "train", "validation": "dev"}[split]
    for paragraph in local_files.json_lines(f"squad/squad_v1.1_{name}.jsonl"):
        for qa in paragraph["qas"]:
            answers = _answers(qa)
            span = None
            if answers and split == "train":
                start = _start(qa)
                span = (start, start + len(answers[0]))
            context = window(paragraph["context"], qa["question"], span)
            yield {
                "inputs": f"question: {qa['question'].strip()} context: {context}",
                "targets": answers[0] if answers else "",
                "reference": json.dumps({"answers": list(answers)}, ensure_ascii=False),
            }


def _answers(qa: Mapping[str, Any]) -> list[str]:
    """Returns the answers of a question, in any of the formats of SQuAD files; [] if it is unanswerable."""
    try:
        return metrics.possible_answers(qa["answers"])
    except ValueError as error:
        raise ConfigError(
            f"question {qa.get('id', qa.get('question'))!r} of the local SQuAD files {error}",
            where="local_squad",
            fix="Write a list of strings; an empty list for an unanswerable question.",
        ) from error


def _start(qa: Mapping[str, Any]) -> int:
    """Returns the character offset of the first answer in the context."""
    if "answer_starts" in qa:
        return qa["answer_starts"][0]
    answers = qa["answers"]
    return answers["answer_start"][0] if isinstance(answers, Mapping) else answers[0]["answer_start"]


VOCABULARY = vocabularies.mixed_vocabulary()

preprocessors.add(
    "squad_v1_1",
    source=seqio.TfdsDataSource("squad/v1.1:3.0.0", splits=("train", "validation")),
    preprocessors=(prompts,),
    features=preprocessors.paired_features(VOCABULARY),
    postprocess_fn=answers_reference,
    metric_fns=(metrics.squad,),
)
# SQuAD's dev set is the test data, so checkpoints are selected on a held-out part of the training set.
for name, held_out in (("squad_v1_1_tuning", False), ("squad_v1_1_selection", True)):
    preprocessors.add(
        name,
        source=seqio.TfdsDataSource("squad/v1.1:3.0.0", splits=("train",)),
        preprocessors=(of_articles(held_out), prompts),
        features=preprocessors.paired_features(VOCABULARY),
        postprocess_fn=answers_reference,
        metric_fns=(metrics.squad,),
    )
preprocessors.add(
    "local_squad",
    source=preprocessors.python_source(read_local, ("inputs", "targets", "reference"), ("train", "validation")),
    preprocessors=(),
    features=preprocessors.paired_features(VOCABULARY),
    postprocess_fn=preprocessors.json_reference,
    metric_fns=(metrics.squad,),
)
