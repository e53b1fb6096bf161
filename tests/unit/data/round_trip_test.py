"""What a vocabulary cannot write is found, named and counted; what its own normalisation changes is not."""

import io
import json

import pytest
import sentencepiece
import tokenizer_folders as folders

from diffusion_lm.core.errors import ConfigError
from diffusion_lm.data.round_trip import Losses, unwritten
from diffusion_lm.data.vocabulary import Vocabulary

CODE = "def f(x):\n    return {x: 'é'}"


def t5_like():
    """A SentencePiece model with T5's normalisation and no bytes: letters, no braces, newlines become spaces."""
    stream = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["def f(x): return x the train leaves at noon 'fi' 1"] * 20), model_writer=stream,
        model_type="char", vocab_size=60, hard_vocab_limit=False, normalization_rule_name="nmt_nfkc",
        pad_id=0, eos_id=1, bos_id=-1, unk_id=2, minloglevel=2,
    )  # fmt: skip
    return Vocabulary(stream.getvalue())


def bpe_without_unk(folder):
    """A BPE that drops what it has no token for."""
    pieces = ["<pad>", "</s>", *"adefhilnorstuvx"]
    model = {"type": "BPE", "vocab": {piece: number for number, piece in enumerate(pieces)}, "merges": []}
    fields = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = [{"id": number, "content": pieces[number], **fields} for number in range(2)]
    folder.mkdir()
    content = {"version": "1.0", "added_tokens": added, "pre_tokenizer": {"type": "Whitespace"}, "model": model}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return Vocabulary.load(folder)


def test_unknown_and_dropped_characters_are_named(tmp_path):
    assert unwritten(t5_like(), CODE) == {"\n": 1, "{": 1, "}": 1, "é": 1}
    assert unwritten(t5_like(), "the train leaves") == {}
    assert unwritten(bpe_without_unk(tmp_path / "bpe"), "def f: é") == {":": 1, "é": 1}
    assert unwritten(bpe_without_unk(tmp_path / "bpe2"), "the sea") == {}


def test_own_normalisation_is_no_loss_but_lost_line_breaks_are():
    model = t5_like()
    assert unwritten(model, "the  train\u00a0at \ufb01 \u2460") == {}, "NFKC and repeated spaces"
    assert unwritten(model, "the\ttrain\nat") == {"\n": 1, "\t": 1}
    assert unwritten(model, " the train\n") == {}, "white space around a text is nobody's"


@pytest.mark.parametrize("make", [folders.gpt2_folder, folders.json_folder, folders.llama_folder])
def test_byte_level_vocabularies_write_everything(make, tmp_path):
    vocabulary = Vocabulary.load(make(tmp_path / "model"))
    for text in (CODE, "  x\t\r\n\n  y \u2581 \U0001f600", "", "<mask> </s> <pad>"):
        assert unwritten(vocabulary, text) == {}, text


def test_lower_case_is_the_tokenizers_own(tmp_path):
    vocabulary = Vocabulary.load(folders.bert_folder(tmp_path / "bert"))
    assert unwritten(vocabulary, "The Cat") == {}
    assert unwritten(vocabulary, "The cat\n") == {}
    assert "\U0001f600" in unwritten(vocabulary, "the \U0001f600")


def test_collapsed_indentation_is_a_loss(train_vocabulary):
    stream = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["def f(x): return x"] * 20), model_writer=stream, model_type="char", vocab_size=60,
        hard_vocab_limit=False, normalization_rule_name="identity", remove_extra_whitespaces=True,
        user_defined_symbols=["\n"], pad_id=0, eos_id=1, bos_id=-1, unk_id=2, minloglevel=2,
    )  # fmt: skip
    assert unwritten(Vocabulary(stream.getvalue()), "def f(x):\n    return x") == {"indentation": 1}
    assert unwritten(train_vocabulary(), "def f(x):\n    return x") == {}


def test_losses_are_counted_and_refused_beyond_the_share():
    losses = Losses(t5_like(), name="mbpp/train", max_share=0.01)
    for number in range(3):
        losses.add("targets", number, CODE if number == 1 else "def f(x): return x")
        losses.add("inputs", number, "{the}")
    with pytest.raises(ConfigError) as error:
        losses.check()
    assert str(error.value) == (
        "the vocabulary cannot encode all characters of 1 of 3 targets of mbpp/train: '{' 1, 'é' 1, '}' 1, newline 1; "
        "first in example 1: 'def f(x):\\n    return {x: 'é'}' (GrainSource.max_lossy=0.01, --max_lossy). "
        "Use a vocabulary that can encode them, or increase max_lossy (1 = allow all)."
    )
    assert losses.summary()["targets"]["count"] == 1
    assert losses.summary()["inputs"]["characters"] == {"{": 3, "}": 3}
    assert losses.sentences()[0].startswith("mbpp/train: the vocabulary cannot encode all characters of 3 of 3 inputs")
    Losses(t5_like(), name="x", max_share=0.0).check()


def test_a_hopeless_vocabulary_is_refused_early():
    losses = Losses(t5_like(), name="c4/train", max_share=0.01)
    for number in range(999):
        losses.add("targets", number, "{}")
    with pytest.raises(ConfigError, match=r"1,000 of 1,000 targets of c4/train"):
        losses.add("targets", 999, "{}")
    assert losses.summary()["targets"]["of"] == 1000
