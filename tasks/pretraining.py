"""Pretraining documents: C4, mC4 and Python functions through TFDS, and text and code of the local data folder.

AR2Diff (arXiv 2401.17181) pretrains on 80 % mC4 and 20 % Python code: mix `mc4_*` and `python_code` with these weights.
DiffuGPT and DiffuLLaMA (arXiv 2410.17891) continue on FineWeb, and on SlimPajama and Starcoder (0.693584 to 0.306416):
`fineweb`, `slimpajama` and `starcoder` read the files of these data sets as downloaded. `materialise --chunk_length`
splits the documents into chunks.
"""

from collections.abc import Iterator

import seqio

from diffusion_lm_tasks import local_files, preprocessors, tfds_builders, vocabularies
from diffusion_lm_tasks.splits import split_of

assert tfds_builders  # its import registers `code_search_net_python` with TFDS

MC4_LANGUAGES = ("de", "en", "es", "fr", "it", "ja", "pt", "ru", "zh")

# Pretraining text in the data folder. None of these files is the development or test set of another task.
_TEXT = ("text/c4_sample.jsonl", "text/openwebtext_1k.jsonl", "text/wikipedia_sample.jsonl")
_CODE = "code/python_stdlib_pypi.jsonl"
_TRANSLATION = "translation/tatoeba_train.en-fr.tsv"
_LINES = 40

# Directory in the data folder and name of the text field, as in the Hugging Face data set of the same name.
_CORPORA = {
    "fineweb": ("text/fineweb", "text"),
    "slimpajama": ("text/slimpajama", "text"),
    "starcoder": ("code/starcoder", "content"),
}


def read_text(split: str) -> Iterator[dict[str, str]]:
    """Yields English documents, SQuAD's training contexts (without its dev set) and English and French sentences."""
    for file in _TEXT:
        for row in local_files.json_lines(file):
            yield from _if_in(split, row["text"])
    for paragraph in local_files.json_lines("squad/squad_v1.1_train.jsonl"):
        yield from _if_in(split, paragraph["context"])
    sides: tuple[list[str], list[str]] = ([], [])
    for pair in local_files.pairs(_TRANSLATION):
        for side, sentence in zip(sides, pair, strict=True):
            side.append(sentence)
            if len(side) == _LINES:
                yield from _if_in(split, "\n".join(side))
                side.clear()


def read_code(split: str) -> Iterator[dict[str, str]]:
    """Yields Python source files of the standard library and of permissively licensed packages."""
    for row in local_files.json_lines(_CODE):
        yield from _if_in(split, row["text"])


def read_all(split: str) -> Iterator[dict[str, str]]:
    """Yields the text, then the code."""
    yield from read_text(split)
    yield from read_code(split)


def corpus_reader(name: str) -> preprocessors.Reader:
    """Returns a reader of a large corpus; validation and test each get 1 in 2,000 documents."""
    folder, field = _CORPORA[name]

    def read(split: str) -> Iterator[dict[str, str]]:
        for text in local_files.rows(folder, field):
            yield from _if_in(split, text, held_out=0.0005)

    return read


def _if_in(split: str, text: str, held_out: float = 0.01) -> Iterator[dict[str, str]]:
    text = preprocessors.unix_newlines(text).strip()
    if text and split_of(text, held_out=held_out) == split:
        yield {"text": text}


def _add(name: str, source: seqio.DataSource) -> None:
    preprocessors.add(
        name,
        source=source,
        preprocessors=(preprocessors.documents,),
        features=preprocessors.document_features(VOCABULARY),
    )


VOCABULARY = vocabularies.mixed_vocabulary()

_add("c4", seqio.TfdsDataSource("c4/en:3.1.0", splits=("train", "validation")))
for _language in MC4_LANGUAGES:
    _add(
        f"mc4_{_language}",
        seqio.TfdsDataSource(
            "c4/multilingual:3.1.0", splits={"train": _language, "validation": f"{_language}-validation"}
        ),
    )
_add("python_code", seqio.TfdsDataSource("code_search_net_python:1.0.0", splits=("train", "validation", "test")))
_add("local_text", preprocessors.python_source(read_text, ("text",)))
_add("local_code", preprocessors.python_source(read_code, ("text",)))
_add("local_pretraining", preprocessors.python_source(read_all, ("text",)))
for _corpus in _CORPORA:
    _add(_corpus, preprocessors.python_source(corpus_reader(_corpus), ("text",)))
