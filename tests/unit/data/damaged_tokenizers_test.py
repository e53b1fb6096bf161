"""Tokenizer files that are damaged: one sentence each, from whatever reader."""

import json

import pytest

from diffusion_lm.core.errors import ConfigError
from diffusion_lm.data.vocabulary import Vocabulary

BROKEN = {
    "empty.model": b"",
    "random.model": bytes(range(7, 200)),
    "vocab.txt": "[UNK]\n[PAD]\n\u00e9t\u00e9\n".encode("latin-1"),
    "tokenizer.json": b'{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a"',
    "sentencepiece.bpe.model": b"\x0a\x03abc",
}
SHAPES = (
    {"model": 3},
    {"model": {"type": "BPE", "vocab": {"a": "x"}, "merges": []}},
    {"model": {"type": "Nothing"}},
    {"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}, "added_tokens": 5},
)


@pytest.mark.parametrize("name", BROKEN)
def test_damaged_files_are_one_sentence(name, tmp_path):
    (tmp_path / name).write_bytes(BROKEN[name])
    for path in (tmp_path / name, *([] if name.endswith(("empty.model", "random.model")) else [tmp_path])):
        with pytest.raises(ConfigError) as caught:
            Vocabulary.load(path)
        assert name in str(caught.value) or str(tmp_path) in str(caught.value)
        assert "\n" not in str(caught.value)
    if name == "vocab.txt":
        assert "line 3, is not UTF-8" in str(caught.value)


@pytest.mark.parametrize("content", SHAPES, ids=str)
def test_a_tokenizer_json_of_another_shape_is_one_sentence(content, tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError) as caught:
        Vocabulary.load(tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": {"content": "a"}}}),
        ("tokenizer_config.json", {"added_tokens_decoder": [1]}),
        ("added_tokens.json", {"b": "c"}),
    ],
)
def test_configuration_files_of_another_shape(file, content, tmp_path):
    (tmp_path / "vocab.txt").write_text("[UNK]\n[PAD]\na\n")
    (tmp_path / file).write_text(json.dumps(content))
    with pytest.raises(ConfigError) as caught:
        Vocabulary.load(tmp_path)
    assert "cannot read the vocabulary" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_byte_order_marks_are_skipped(tmp_path):
    vocabulary = {"version": "1.0", "added_tokens": [], "normalizer": None, "pre_tokenizer": None,
                  "post_processor": None, "decoder": None, "truncation": None, "padding": None,
                  "model": {"type": "WordLevel", "vocab": {"<unk>": 0, "a": 1}, "unk_token": "<unk>"}}  # fmt: skip
    for folder, mark in (("plain", b""), ("marked", b"\xef\xbb\xbf")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "tokenizer.json").write_bytes(mark + json.dumps(vocabulary).encode())
        (tmp_path / folder / "words").mkdir()
        (tmp_path / folder / "words" / "vocab.txt").write_bytes(mark + b"[UNK]\n[PAD]\na\n")
    for inside in ("", "words"):
        one, other = (Vocabulary.load(tmp_path / folder / inside) for folder in ("plain", "marked"))
        assert one == other
