"""Translation on real data: WMT14 En-Fr and En-De through TFDS, IWSLT14 De-En and En-Fr files of the local data folder.

Prompt as in T5: `translate English to French: ...`. The reference is the target sentence; the metric is SacreBLEU, with
`intl` tokenisation for WMT14 En-De as in Diffusion-LLM (arXiv 2308.12219), and 13a otherwise.
The local WMT task trains on the older WMT test sets (2008 to 2012, discussions 2015) and Tatoeba, validates on
newstest2013 and tests on newstest2014; Multi30k is tested on test_2016_flickr.
"""

import itertools
from collections.abc import Callable, Iterator

import seqio
import tensorflow as tf

from diffusion_lm.core.errors import ConfigError
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
_MULTI30K_FILES = {
    "train": ("multi30k_train",),
    "validation": ("multi30k_val",),
    "test": ("multi30k_test_2016_flickr",),
}


def prompts(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """Makes `inputs` and `targets` from `en` and `fr`."""
    return dataset.map(
        lambda example: {"inputs": tf.strings.join([PREFIX, example["en"]]), "targets": example["fr"]},
        num_parallel_calls=tf.data.AUTOTUNE,
    )


def pair_prompts(prefix: str, source: str, target: str) -> Callable[[tf.data.Dataset], tf.data.Dataset]:
    """Returns a preprocessor that makes `inputs` and `targets` from the fields `source` and `target`."""

    def make(dataset: tf.data.Dataset) -> tf.data.Dataset:
        return dataset.map(
            lambda example: {"inputs": tf.strings.join([prefix, example[source]]), "targets": example[target]},
            num_parallel_calls=tf.data.AUTOTUNE,
        )

    return make


def read_iwslt14(split: str) -> Iterator[dict[str, str]]:
    """Yields the pairs of `translation/iwslt14.de-en/{train,valid,test}.{de,en}`, one sentence per line.

    These are the files of fairseq's preparation of IWSLT14 De-En (160,239 / 7,283 / 6,750 pairs) before BPE.

    Raises:
      ConfigError: the two files of a split have different numbers of lines.
    """
    name = {"train": "train", "validation": "valid", "test": "test"}[split]
    stem = f"translation/iwslt14.de-en/{name}"
    with local_files.open_text(f"{stem}.de") as german, local_files.open_text(f"{stem}.en") as english:
        for number, (de, en) in enumerate(itertools.zip_longest(german, english), 1):
            if de is None or en is None:
                raise ConfigError(
                    f"{stem}.de and {stem}.en have different numbers of lines: one ends before line {number}",
                    fix="Use parallel files.",
                )
            yield {"de": de.strip(), "en": en.strip()}


def local_reader(files: dict[str, tuple[str, ...]]) -> preprocessors.Reader:
    """Returns a reader of `translation/NAME.en-fr.tsv(.gz)` files.

    Training pairs with a held-out English sentence, ignoring case, are removed.
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
_add("local_multi30k_en_fr", preprocessors.python_source(local_reader(_MULTI30K_FILES), ("en", "fr")))

preprocessors.add(
    "wmt14_en_de",
    source=seqio.TfdsDataSource("wmt14_translate/de-en:1.0.0", splits=("train", "validation", "test")),
    preprocessors=(pair_prompts("translate English to German: ", "en", "de"),),
    features=preprocessors.paired_features(VOCABULARY),
    postprocess_fn=preprocessors.text_reference,
    metric_fns=(metrics.bleu_intl,),
)
preprocessors.add(
    "iwslt14_de_en",
    source=preprocessors.python_source(read_iwslt14, ("de", "en")),
    preprocessors=(pair_prompts("translate German to English: ", "de", "en"),),
    features=preprocessors.paired_features(VOCABULARY),
    postprocess_fn=preprocessors.text_reference,
    metric_fns=(metrics.bleu,),
)
