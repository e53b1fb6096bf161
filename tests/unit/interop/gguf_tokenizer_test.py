"""The tokenizer of a GGUF file gives the ids of the library that it was trained with."""

import io
import json

import pytest
import sentencepiece
import tokenizers
from huggingface_cases import FOLDER

pytest.importorskip("gguf")

from gguf_writing import write_gguf
from tokenizers import Regex, models, normalizers, pre_tokenizers, trainers

from diffusion_lm.cli.main import main
from diffusion_lm.data.vocabulary import Vocabulary

LINES = [
    f"{number} plus {other}: it's {number}{other}, isn't it?\n  \tÉté à Żory"
    for number in range(95, 130)
    for other in (1, 23)
]
TEXTS = ("  it's 12345 plus 1!!\n\n x", "Été, never seen: 漢字 😀", "<s> is text", *LINES[:3])

_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _trained(pre: str) -> tokenizers.Tokenizer:
    """A tokenizer that the library itself builds."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre != "qwen2")
    if pre == "smollm":
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    elif pre == "qwen2":
        split = pre_tokenizers.Split(Regex(_QWEN2), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
        tokenizer.normalizer = normalizers.NFC()
    else:
        tokenizer.pre_tokenizer = byte_level
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(LINES, trainer)
    tokenizer.encode_special_tokens = True
    return tokenizer


def _import(tmp_path, metadata) -> str:
    write_gguf(FOLDER / "llama", tmp_path / "model.gguf", metadata=metadata)
    assert main(["import", str(tmp_path / "model.gguf"), "--workdir", str(tmp_path / "run")]) == 0
    return str(tmp_path / "run" / "tokenizer")


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "qwen2"])
def test_byte_level_bpe(pre, tmp_path, capsys):
    original = _trained(pre)
    content = json.loads(original.to_str())["model"]
    tokens = sorted(content["vocab"], key=content["vocab"].get)
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in ("<s>", "</s>") else 1 for token in tokens],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in content["merges"]],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
    }
    vocabulary = Vocabulary.load(_import(tmp_path, metadata))
    assert f"byte-level BPE ({pre}), {len(tokens)} tokens" in capsys.readouterr().out
    for text in TEXTS:
        assert vocabulary.encode(text) == original.encode(text, add_special_tokens=False).ids
        assert vocabulary.decode(vocabulary.encode(text)) == text
    assert (vocabulary.specials.bos_id, vocabulary.specials.eos_id) == (0, 1)


def test_sentencepiece(tmp_path):
    stream = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES), model_writer=stream, vocab_size=350, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
        user_defined_symbols=["\n\n"],
    )  # fmt: skip
    original = sentencepiece.SentencePieceProcessor(model_proto=stream.getvalue())
    every = range(original.get_piece_size())

    def kind(token: int) -> int:
        tests = {2: original.is_unknown, 3: original.is_control, 5: original.is_unused, 6: original.is_byte}
        return next((number for number, test in tests.items() if test(token)), 1)

    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [original.id_to_piece(token) for token in every],
        "tokenizer.ggml.scores": [original.get_score(token) for token in every],
        "tokenizer.ggml.token_type": [4 if original.id_to_piece(token) == "\n\n" else kind(token) for token in every],
        "tokenizer.ggml.bos_token_id": original.bos_id(),
        "tokenizer.ggml.eos_token_id": original.eos_id(),
        "tokenizer.ggml.unknown_token_id": original.unk_id(),
    }
    vocabulary = Vocabulary.load(_import(tmp_path, metadata))
    for text in TEXTS:
        assert vocabulary.encode(text) == original.encode(text)
    assert vocabulary.specials.eos_id == original.eos_id()


def test_an_unsupported_tokenizer_is_not_written_and_is_named(tmp_path, capsys):
    metadata = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "viking", "tokenizer.ggml.tokens": ["a", "b"]}
    folder = _import(tmp_path, metadata)
    assert "its pre-tokenizer 'viking' is not supported" in capsys.readouterr().out.replace("\n", " ")
    assert not (tmp_path / "run" / folder).exists()
