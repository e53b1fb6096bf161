"""Vocabularies of the tasks; each is found or trained when it is first used, never on import."""

import functools
import hashlib
import io
import os
import random
import sys
import tempfile
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path

import seqio

from diffusion_lm.core.errors import ConfigError
from diffusion_lm_tasks.local_files import data_folder, local_file

SENTINELS = 32
"""`<extra_id_0>` to `<extra_id_31>`, for span corruption of pieces of up to about 600 tokens."""

EMBEDDED_SIZE = 1280


class LazySentencePieceVocabulary(seqio.SentencePieceVocabulary):
    """A SeqIO vocabulary whose model file is located, or trained, on first use.

    Two of them are equal when they are located by the same function.
    """

    def __init__(self, locate: Callable[[], str]):
        super().__init__(sentencepiece_model_file="", extra_ids=0)
        self._locate = locate

    @property
    def sentencepiece_model_file(self) -> str:
        """Path of the model; this is where it is trained if it is not there yet."""
        return self._locate()

    def _model_context(self):
        if not self._model:
            self._sentencepiece_model_file = self._locate()
        return super()._model_context()

    def __eq__(self, other) -> bool:
        return isinstance(other, LazySentencePieceVocabulary) and self._locate is other._locate

    __hash__ = None  # type: ignore[assignment]


def cache_folder() -> Path:
    """Returns where trained vocabularies are kept: `$DIFFUSION_LM_CACHE`, else `~/.cache/diffusion_lm`."""
    return Path(os.environ.get("DIFFUSION_LM_CACHE") or Path.home() / ".cache" / "diffusion_lm")


def train_vocabulary(texts: Iterable[str], path: str | os.PathLike[str], size: int) -> None:
    """Trains a SentencePiece unigram model that is loss-free for text and code, and writes it atomically.

    Identity normalisation, byte fallback, single digits, white space kept. Ids: 0 `<pad>`, 1 `</s>`, 2 `<s>`, 3 unk,
    4 `<mask>`, 5 `<sep>`, then the sentinels, newline and tab. `<mask>`, `<sep>` and the sentinels are control symbols:
    text that spells them is never turned into them. Equal texts give equal bytes (one thread).

    Args:
      texts: training texts, each at most about 4,000 characters (longer ones are skipped by the trainer).
      path: the `.model` file.
      size: number of tokens, 256 bytes and the special tokens included.
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
    """Returns the fixed sample of the embedded tasks' training texts that their vocabulary is trained on."""
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
    """Returns the path of the embedded vocabulary's model, training it (ten seconds) where the cache has none.

    The file's name carries a hash of everything that it is a function of: the Python version (whose library it is
    trained on), Babel's CLDR, num2words, SentencePiece and the generators themselves.
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


def mixed_model() -> str:
    """Returns the path of the model for real data.

    It is `$DIFFUSION_LM_VOCABULARY` where that is set (any SentencePiece model that can write newlines and braces),
    else `tokenizers/mix_en_fr_code_16384.model` of the data folder.
    """
    named = os.environ.get("DIFFUSION_LM_VOCABULARY", "")
    if named:
        if not named.startswith("gs://") and not Path(named).is_file():
            raise ConfigError(f"no vocabulary at {named}", where="DIFFUSION_LM_VOCABULARY", fix="Give a .model file.")
        return named
    try:
        data_folder()
    except ConfigError as error:
        raise ConfigError(
            "the tasks on real data need a vocabulary",
            where="DIFFUSION_LM_VOCABULARY",
            fix="Set it to a SentencePiece model, or DIFFUSION_LM_DATA to a data folder that has one in tokenizers/.",
        ) from error
    return str(local_file("tokenizers/mix_en_fr_code_16384.model"))


def embedded_vocabulary() -> LazySentencePieceVocabulary:
    """Returns the vocabulary of the embedded tasks: 2,048 tokens, English, French and Python."""
    return LazySentencePieceVocabulary(embedded_model)


def mixed_vocabulary() -> LazySentencePieceVocabulary:
    """Returns the vocabulary of the tasks on real data (see `mixed_model`)."""
    return LazySentencePieceVocabulary(mixed_model)
