"""News headlines (Gigaword, arXiv 1509.00685) through TFDS, in full and with 10,000 training examples.

Prompt: `summarize: ` and the first sentence of the article. The target is the headline; the metric is ROUGE. The
low-resource subset (Diffusion-LLM, arXiv 2308.12219, "Gigaword-10K") consists of the examples with the smallest hashes,
so it does not depend on their order. The subset of the paper is not published.
"""

import hashlib
import heapq
from collections.abc import Iterator

import seqio
import tensorflow as tf

from diffusion_lm.evaluation import metrics
from diffusion_lm_tasks import preprocessors, tfds_sources, vocabularies

PREFIX = "summarize: "
SUBSET = 10_000

_DATASET = "gigaword:1.2.0"


def prompts(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """Makes `inputs` and `targets` from `document` and `summary`."""
    return dataset.map(
        lambda example: {"inputs": tf.strings.join([PREFIX, example["document"]]), "targets": example["summary"]},
        num_parallel_calls=tf.data.AUTOTUNE,
    )


def subset(examples: Iterator[dict[str, str]], size: int = SUBSET) -> list[dict[str, str]]:
    """Returns the `size` distinct examples with the smallest SHA-256 of their text, in the order of the hashes."""

    def keyed() -> Iterator[tuple[bytes, dict[str, str]]]:
        for example in examples:
            text = f"{example['document']}\n{example['summary']}"
            yield hashlib.sha256(text.encode()).digest(), example

    chosen: dict[bytes, dict[str, str]] = {}
    # Few examples are duplicates, so 10 % more than needed leave enough after they are removed.
    for digest, example in heapq.nsmallest(size + size // 10 + 10, keyed(), key=lambda pair: pair[0]):
        chosen.setdefault(digest, example)
    return list(chosen.values())[:size]


def read_subset(split: str) -> Iterator[dict[str, str]]:
    """Yields the subset of the training split, or all examples of another split."""
    rows = (
        {"document": row["document"].decode(), "summary": row["summary"].decode()}
        for row in tfds_sources.rows(_DATASET, split)
    )
    yield from subset(rows) if split == "train" else rows


VOCABULARY = vocabularies.mixed_vocabulary()

preprocessors.add(
    "gigaword",
    source=seqio.TfdsDataSource(_DATASET, splits=("train", "validation", "test")),
    preprocessors=(prompts,),
    features=preprocessors.paired_features(VOCABULARY),
    postprocess_fn=preprocessors.text_reference,
    metric_fns=(metrics.rouge,),
)
preprocessors.add(
    "gigaword_10k",
    source=preprocessors.python_source(read_subset, ("document", "summary")),
    preprocessors=(prompts,),
    features=preprocessors.paired_features(VOCABULARY),
    postprocess_fn=preprocessors.text_reference,
    metric_fns=(metrics.rouge,),
)
