"""Exported vocabularies: the `tokenizers` library gives the same ids as the vocabulary."""

import io
import json

import pytest
import sentencepiece
import tokenizers

from diffusion_lm.core.errors import ConfigError
from diffusion_lm.data.vocabulary import Vocabulary
from diffusion_lm.interop.tokenizer_export import SENTENCEPIECE, TOKENIZER_CONFIG, TOKENIZER_JSON, tokenizer_files

WIDE = "\uff34\uff45\uff58\uff54"  # what NFKC makes plain letters of
LINES = [f"{number} plus {other} is  a  naïve {WIDE}" for number in range(10, 60) for other in ("one", "two", "three")]
TEXTS = ("11 plus two", "  two  spaces ", f"naïve {WIDE} 日本", "a\nb\tc", "1 < 2 / 3 > x", "")
OURS = dict(pad_id=0, eos_id=1, bos_id=2, unk_id=3, control_symbols=["<mask>", "<sep>"])
KINDS = {
    # As `tasks/vocabularies.py` trains them.
    "unigram_of_the_tasks": OURS
    | dict(model_type="unigram", byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
           split_digits=True, allow_whitespace_only_pieces=True, user_defined_symbols=["\n", "\t"], vocab_size=330),
    "unigram_nfkc": OURS | dict(model_type="unigram", vocab_size=70, add_dummy_prefix=False),
    "bpe_bytes": OURS | dict(model_type="bpe", byte_fallback=True, vocab_size=340, normalization_rule_name="identity",
                             remove_extra_whitespaces=False),
    "bpe_without_mask": dict(model_type="bpe", vocab_size=70),
}  # fmt: skip


def _vocabulary(tmp_path, kind) -> Vocabulary:
    stream = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES), model_writer=stream, minloglevel=2, hard_vocab_limit=False, **KINDS[kind]
    )
    path = tmp_path / "any.model"
    path.write_bytes(stream.getvalue())
    return Vocabulary.load(path)


@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_roles_are_equal(kind, tmp_path):
    vocabulary = _vocabulary(tmp_path, kind)
    files = tokenizer_files(vocabulary)
    assert (SENTENCEPIECE in files) == (kind != "bpe_without_mask")  # a model that lacks something is not whole
    tokenizer = tokenizers.Tokenizer.from_str(files[TOKENIZER_JSON].decode())
    for text in (*TEXTS, *LINES[::17]):
        assert tokenizer.encode(text).ids == vocabulary.encode(text), text
    for text in LINES[::17]:
        assert tokenizer.decode(tokenizer.encode(text).ids) == vocabulary.decode(vocabulary.encode(text))
    named = json.loads(files[TOKENIZER_CONFIG])
    for role in vocabulary.report.roles:
        if role.how != "reused":
            assert tokenizer.token_to_id(named[f"{role.name}_token"]) == role.token


def test_a_tokenizer_json_keeps_its_ids_and_gets_what_was_added(tmp_path):
    """A byte-level BPE without MASK and PAD, such as GPT-2's, gets both after its last token; text keeps its ids."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(LINES, trainer)
    bpe.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    vocabulary = Vocabulary.load(tmp_path)
    files = tokenizer_files(vocabulary)
    assert SENTENCEPIECE not in files
    tokenizer = tokenizers.Tokenizer.from_str(files[TOKENIZER_JSON].decode())
    named = json.loads(files[TOKENIZER_CONFIG])
    for text in LINES[::17]:
        assert tokenizer.encode(text).ids == bpe.encode(text).ids == vocabulary.encode(text)
    for role in ("mask", "pad", "eos"):
        assert tokenizer.token_to_id(named[f"{role}_token"]) == getattr(vocabulary.specials, f"{role}_id")
    assert tokenizer.get_vocab_size() == vocabulary.size
    assert "bos_token" not in named  # EOS opens streams here, which is no role of the tokenizer's


def test_text_that_spells_a_special_token_becomes_it_only_in_the_export(tmp_path):
    vocabulary = _vocabulary(tmp_path, "unigram_of_the_tasks")
    tokenizer = tokenizers.Tokenizer.from_str(tokenizer_files(vocabulary)[TOKENIZER_JSON].decode())
    mask = vocabulary.specials.mask_id
    assert mask in tokenizer.encode("10 <mask> one").ids
    assert mask not in vocabulary.encode("10 <mask> one")


def test_a_tokenizer_that_would_encode_differently_is_refused(tmp_path, monkeypatch):
    from diffusion_lm.interop import tokenizer_export

    vocabulary = _vocabulary(tmp_path, "unigram_of_the_tasks")
    whole = tokenizer_export._from_sentencepiece(vocabulary.model)
    whole["normalizer"] = None
    monkeypatch.setattr(tokenizer_export, "_from_sentencepiece", lambda _: whole)
    with pytest.raises(ConfigError, match=r"would give .* instead of"):
        tokenizer_files(vocabulary)
