"""Vocabularies of the tasks; each is loaded or trained on first use, never on import."""

import contextlib
import functools
import hashlib
import io
import os
import random
import sys
import tempfile
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path

from diffusion_lm.core.errors import ConfigError
from diffusion_lm.data.seqio_vocabulary import LazyVocabulary
from diffusion_lm.data.vocabulary import VOCABULARY_VARIABLE, Vocabulary, VocabularyNotNamed, requested_mask
from diffusion_lm_tasks.local_files import local_file

SENTINELS = 32
"""`<extra_id_0>` to `<extra_id_31>`, for span corruption of chunks of up to about 600 tokens."""

EMBEDDED_SIZE = 1280


def cache_folder() -> Path:
    """Returns the directory of trained vocabularies: `$DIFFUSION_LM_CACHE`, else `~/.cache/diffusion_lm`."""
    return Path(os.environ.get("DIFFUSION_LM_CACHE") or Path.home() / ".cache" / "diffusion_lm")


def train_vocabulary(texts: Iterable[str], path: str | os.PathLike[str], size: int) -> None:
    """Trains a SentencePiece unigram model that is lossless for text and code, and writes it atomically.

    Identity normalisation, byte fallback, split digits, white space kept. Ids: 0 `<pad>`, 1 `</s>`, 2 `<s>`, 3 `<unk>`,
    4 `<mask>`, 5 `<sep>`, then the sentinels, newline and tab. `<mask>`, `<sep>` and the sentinels are control symbols:
    text that spells them is not encoded to them. Training is deterministic (one thread).

    Args:
      texts: training texts of at most about 4,000 characters each (the trainer skips longer ones).
      path: the `.model` file to write.
      size: number of tokens, including 256 bytes and the special tokens.
    """
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([text.strip("\n") for text in texts]),
        model_writer=model,
        model_type="unigram",
        vocab_size=size,
        character_coverage=0.9998,
        num_threads=1,
        shuffle_input_sentence=False,
        max_sentence_length=16_000,
        split_digits=True,
        byte_fallback=True,
        allow_whitespace_only_pieces=True,
        remove_extra_whitespaces=False,
        add_dummy_prefix=True,
        normalization_rule_name="identity",
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        eos_piece="</s>",
        bos_piece="<s>",
        unk_piece="<unk>",
        control_symbols=["<mask>", "<sep>", *(f"<extra_id_{number}>" for number in range(SENTINELS))],
        user_defined_symbols=["\n", "\t"],
        minloglevel=2,
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    with os.fdopen(handle, "wb") as file:
        file.write(model.getvalue())
    os.replace(temporary, path)


def embedded_texts() -> list[str]:
    """Returns the training texts of the embedded vocabulary, a fixed sample of the embedded tasks' training data."""
    from diffusion_lm_tasks import embedded_code, embedded_pretraining, embedded_qa, embedded_translation

    texts = []
    for module, count in ((embedded_translation, 5000), (embedded_qa, 3000), (embedded_code, 2000)):
        for example in module.examples()["train"][:count]:
            texts += [example.inputs, example.targets]
    for kind, count in (("prose", 200), ("code", 400)):
        paragraphs = [part for text in embedded_pretraining.stock("train")[kind] for part in text.split("\n\n")]
        paragraphs = sorted({part for part in paragraphs if 20 < len(part) < 2000})
        texts += random.Random(kind).sample(paragraphs, min(count, len(paragraphs)))
    return texts


@functools.cache
def embedded_model() -> str:
    """Returns the path of the embedded vocabulary's model; trains it (ten seconds) if it is not cached.

    The file name contains a hash of everything that the model depends on: the versions of Python (whose library it is
    trained on), Babel (CLDR), num2words and SentencePiece, and the source code of the generators.
    """
    identity = hashlib.sha256(f"{sys.version_info[:3]} {EMBEDDED_SIZE}".encode())
    for package in ("babel", "num2words", "sentencepiece"):
        identity.update(f"{package} {metadata.version(package)}".encode())
    for source in ("cldr", "splits", "embedded_translation", "embedded_qa", "embedded_code", "embedded_pretraining"):
        identity.update(Path(__file__).with_name(f"{source}.py").read_bytes())
    identity.update(Path(__file__).read_bytes())
    path = cache_folder() / "vocabularies" / f"embedded_{EMBEDDED_SIZE}_{identity.hexdigest()[:16]}.model"
    if not path.is_file():
        train_vocabulary(embedded_texts(), path, EMBEDDED_SIZE)
    return str(path)


def embedded_vocabulary() -> LazyVocabulary:
    """Returns the vocabulary of the embedded tasks: 1,280 tokens, English, French and Python."""
    return LazyVocabulary(_load_embedded)


def mixed_vocabulary() -> LazyVocabulary:
    """Returns the vocabulary of the tasks on real data, from `mixed_path`."""
    return LazyVocabulary(_load_mixed)


def mixed_path() -> str:
    """Returns the path of the vocabulary of the tasks on real data.

    That is `$DIFFUSION_LM_VOCABULARY` if set (any argument of `Vocabulary.load`; it must be able to encode newlines and
    braces), else `tokenizers/mix_en_fr_code_16384.model` in the data folder.
    """
    named = os.environ.get(VOCABULARY_VARIABLE, "")
    if named:
        if "://" not in named and not Path(named).exists():
            raise ConfigError(
                f"{named}: no such file or directory",
                where=VOCABULARY_VARIABLE,
                fix="Set it to a .model file or to a folder with a tokenizer.",
            )
        return named
    try:
        return str(local_file("tokenizers/mix_en_fr_code_16384.model"))
    except ConfigError as error:
        raise VocabularyNotNamed(
            f"the tasks on real data need a vocabulary: {error.what}",
            where=VOCABULARY_VARIABLE,
            fix="Set it to a SentencePiece model or to a folder with a tokenizer, or set DIFFUSION_LM_DATA to a data "
            "folder with a vocabulary in tokenizers/.",
        ) from error


def _load_embedded() -> Vocabulary:
    return Vocabulary.load(embedded_model())


def _load_mixed() -> Vocabulary:
    path = mixed_path()
    with fetched(path) if "://" in path else contextlib.nullcontext(path) as local:
        return Vocabulary.load(local, mask=requested_mask())


@contextlib.contextmanager
def fetched(path: str) -> Iterator[str]:
    """Yields a local copy of a tokenizer file or folder in a bucket; of a folder, only tokenizer files are copied."""
    from tensorflow.io import gfile

    with tempfile.TemporaryDirectory() as folder:
        if not gfile.isdir(path):
            local = os.path.join(folder, os.path.basename(path))
            gfile.copy(path, local)
            yield local
            return
        for name in gfile.listdir(path):
            if name.endswith((".json", ".txt", ".model")):
                gfile.copy(os.path.join(path, name), os.path.join(folder, name))
        yield folder
