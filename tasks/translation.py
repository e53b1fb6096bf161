"""English to French on real data: WMT14 through TFDS, and En-Fr files of the local data folder.

Prompt as in T5: `translate English to French: ...`; the reference is the French side; the metric is sacrebleu's BLEU.
The local WMT task trains on the older WMT test sets (2008 to 2012, discussions 2015) and Tatoeba, validates on
newstest2013 and tests on newstest2014.
"""

from collections.abc import Iterator

import seqio
import tensorflow as tf

from diffusion_lm.evaluation import metrics
from diffusion_lm_tasks import local_files, preprocessors, vocabularies

PREFIX = "translate English to French: "

_OLDER_WMT = ("news-test2008", "newssyscomb2009", "newstest2009", "newstest2010", "newstest2011", "newstest2012")
_WMT_FILES = {
    "train": (*(f"wmt/{name}" for name in (*_OLDER_WMT, "newsdiscusstest2015")), "tatoeba_train"),
    "validation": ("wmt/newstest2013",),
    "test": ("wmt/newstest2014",),
}
_TATOEBA_FILES = {"train": ("tatoeba_train",), "validation": ("tatoeba_dev",), "test": ("tatoeba_test",)}


def prompts(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """Makes `inputs` and `targets` of `en` and `fr`."""
    return dataset.map(
        lambda example: {"inputs": tf.strings.join([PREFIX, example["en"]]), "targets": example["fr"]},
        num_parallel_calls=tf.data.AUTOTUNE,
    )


def local_reader(files: dict[str, tuple[str, ...]]) -> preprocessors.Reader:
    """Returns a reader of `translation/NAME.en-fr.tsv(.gz)` files.

    Training pairs whose English side, in lower case, is held out are left out.
    """

    def read(split: str) -> Iterator[dict[str, str]]:
        def rows(name: str) -> Iterator[tuple[str, str]]:
            for file in files[name]:
                yield from local_files.pairs(f"translation/{file}.en-fr.tsv")

        held_out = set()
        if split == "train":
            held_out = {english.lower() for name in ("validation", "test") for english, _ in rows(name)}
        for english, french in rows(split):
            if english.lower() not in held_out:
                yield {"en": english, "fr": french}

    return read


def _add(name: str, source: seqio.DataSource) -> None:
    preprocessors.add(
        name,
        source=source,
        preprocessors=(prompts,),
        features=preprocessors.paired_features(VOCABULARY),
        postprocess_fn=preprocessors.text_reference,
        metric_fns=(metrics.bleu,),
    )


VOCABULARY = vocabularies.mixed_vocabulary()

_add("wmt14_en_fr", seqio.TfdsDataSource("wmt14_translate/fr-en:1.0.0", splits=("train", "validation", "test")))
_add("local_wmt_en_fr", preprocessors.python_source(local_reader(_WMT_FILES), ("en", "fr")))
_add("local_tatoeba_en_fr", preprocessors.python_source(local_reader(_TATOEBA_FILES), ("en", "fr")))
