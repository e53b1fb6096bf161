"""SQuAD v1.1: through TFDS with whole contexts, and from local files with contexts cut to a window.

Prompt as in T5: `question: ... context: ...`; the reference is the list of gold answers; the metric is the official
F1 / exact match. The TFDS names are kept for the splits: SQuAD's dev set is `validation`, there is no public test set.
A question without an answer, as SQuAD v2.0 has them, keeps its place: its target is empty and so are its `answers`.

Window policy of the local task (`CONTEXT_CHARACTERS`): a context that is too long is cut to a run of whole sentences.
For training the run is placed so that the answer lies inside. For evaluation the answer is unknown, so the run is the
one that shares most words with the question; an answer outside it counts as missed.
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
"""One article in so many of the training set is held out, to select checkpoints by."""


def prompts(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """Makes the prompt, the first gold answer as target (empty where there is none), all of them as `answers`."""

    def convert(example):
        answers = example["answers"]["text"]
        return {
            "inputs": tf.strings.join(["question: ", example["question"], " context: ", example["context"]]),
            "targets": tf.concat([answers, [""]], 0)[0],
            "answers": answers,
        }

    return dataset.map(convert, num_parallel_calls=tf.data.AUTOTUNE)


def of_articles(held_out: bool) -> Callable[[tf.data.Dataset], tf.data.Dataset]:
    """Returns a preprocessor that keeps one article in `SELECTION_BUCKETS`, by its title, or all the others.

    By title, because the paragraphs and questions of an article share its facts.
    """

    def keep(dataset: tf.data.Dataset) -> tf.data.Dataset:
        def wanted(example):
            return tf.equal(tf.strings.to_hash_bucket_fast(example["title"], SELECTION_BUCKETS) == 0, held_out)

        return dataset.filter(wanted)

    return keep


def answers_reference(text: str, example=None, is_target: bool = False):
    """Returns `{"answers": [...]}` of a target, the text of a prediction."""
    if not is_target:
        return text
    return {"answers": [answer.decode() for answer in example["answers"]]}


def _words(text: str) -> set[str]:
    return {word for word in re.findall(r"\w+", text.lower()) if len(word) > 3}


def window(context: str, question: str, span: tuple[int, int] | None, limit: int = CONTEXT_CHARACTERS) -> str:
    """Cuts `context` to at most `limit` characters (see the module's text for the policy).

    Args:
      context: the whole paragraph.
      question: decides which run of sentences is kept where no span is given.
      span: characters that must be inside, `(start, end)`; None for evaluation.
      limit: characters of the run; a single longer sentence is cut hard.
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
    """Returns the answers of a question in any form that SQuAD files have; none where it cannot be answered."""
    try:
        return metrics.possible_answers(qa["answers"])
    except ValueError as error:
        raise ConfigError(
            f"question {qa.get('id', qa.get('question'))!r} of the local SQuAD files {error}",
            where="local_squad",
            fix="Write a list of texts; an empty one where the passage does not answer.",
        ) from error


def _start(qa: Mapping[str, Any]) -> int:
    """Returns where in the context the first answer begins, in characters."""
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
# SQuAD's dev set is what is scored; checkpoints are selected on a part of the training set that is not trained on.
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
