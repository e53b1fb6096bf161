"""Small datasets, written without TensorFlow; makes `tokenizer_folders` importable."""

import pathlib
import sys

import numpy as np
import pytest

from diffusion_lm.core.rng import example_number
from diffusion_lm.core.special import SpecialTokens
from diffusion_lm.data.grain_source import GrainSource
from diffusion_lm.data.schema import Manifest, Record
from diffusion_lm.data.store import split_folder, write_records

sys.path.insert(0, str(pathlib.Path(__file__).parent))

SPECIALS = SpecialTokens(vocab_size=100, pad_id=0, eos_id=1, bos_id=2, mask_id=4)


@pytest.fixture
def make_source(tmp_path):
    """Returns `make(task, lengths, ...) -> GrainSource` with tokens 10..99 that spell the example's number."""

    def make(task, lengths, *, specials=SPECIALS, sha="v1", vocabulary=None, split="train", chunk_length=None):
        records = []
        for index, (inputs, targets) in enumerate(lengths):
            tokens = 10 + (index * 7 + np.arange(inputs + targets)) % 80
            records.append(
                Record(
                    inputs=tokens[:inputs],
                    targets=tokens[inputs:],
                    example_id=example_number(f"{task}/{split}/{index}"),
                    inputs_text=f"in {index}",
                    targets_text=f"out {index}",
                    reference=index,
                )
            )
        manifest = Manifest(task, split, specials, vocabulary_sha256=sha, chunk_length=chunk_length)
        write_records(split_folder(task, split, tmp_path), records, manifest, vocabulary=vocabulary)
        return GrainSource(task, split, root=tmp_path)

    return make


@pytest.fixture
def train_vocabulary(tmp_path):
    """Returns `train(bos=..., symbols=[...]) -> Vocabulary`, a tiny SentencePiece model."""
    import sentencepiece

    from diffusion_lm.data.vocabulary import Vocabulary

    def train(*, bos=2, symbols=("<mask>", "\n"), size=300):
        sentences = tmp_path / "sentences.txt"
        sentences.write_text("the cat sat on the mat\ndef f(x): return {x}\n" * 20)
        sentencepiece.SentencePieceTrainer.train(
            input=str(sentences),
            model_prefix=str(tmp_path / "tiny"),
            vocab_size=size,
            byte_fallback=True,
            hard_vocab_limit=False,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            pad_id=0,
            eos_id=1,
            bos_id=bos,
            unk_id=3 if bos >= 0 else 2,
            user_defined_symbols=list(symbols),
            minloglevel=2,
        )
        return Vocabulary.load(tmp_path / "tiny.model")

    return train
