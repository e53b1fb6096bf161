"""Headlines of news (Gigaword, arXiv 1509.00685) through TFDS, whole and as a subset of 10,000 training examples.

Prompt: `summarize: ` and the first sentence of the article; the target is the headline; the metric is ROUGE. The subset
for few data (Diffusion-LLM, arXiv 2308.12219, "Gigaword-10K") holds the examples with the smallest hashes: the choice
depends on the examples alone, not on their order. It is not the paper's own, which is not published.
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
    """Makes `inputs` and `targets` of `document` and `summary`."""
    return dataset.map(
        lambda example: {"inputs": tf.strings.join([PREFIX, example["document"]]), "targets": example["summary"]},
        num_parallel_calls=tf.data.AUTOTUNE,
    )


def subset(examples: Iterator[dict[str, str]], size: int = SUBSET) -> list[dict[str, str]]:
    """Returns the `size` examples whose text has the smallest SHA-256, in the order of the hashes; equal ones once."""

    def keyed() -> Iterator[tuple[bytes, dict[str, str]]]:
        for example in examples:
            text = f"{example['document']}\n{example['summary']}"
            yield hashlib.sha256(text.encode()).digest(), example

    chosen: dict[bytes, dict[str, str]] = {}
    # Few examples occur several times; a tenth more than needed leaves enough when they have been put together.
    for digest, example in heapq.nsmallest(size + size // 10 + 10, keyed(), key=lambda pair: pair[0]):
        chosen.setdefault(digest, example)
    return list(chosen.values())[:size]


def read_subset(split: str) -> Iterator[dict[str, str]]:
    """Yields the subset of the training split, and the other splits whole."""
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
