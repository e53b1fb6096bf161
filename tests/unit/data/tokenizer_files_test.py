"""Vocabularies of Hugging Face folders: what their files say, and that they tokenise as their own libraries do."""

import json
import shutil

import pytest
import tokenizer_folders as folders
from tokenizer_folders import TEXTS

from diffusion_lm.data.vocabulary import Vocabulary

MAKERS = {
    "gpt2": folders.gpt2_folder,
    "json": folders.json_folder,
    "bert": folders.bert_folder,
    "llama": folders.llama_folder,
    "t5": folders.t5_folder,
    "xlmr": folders.xlmr_folder,
}


def roles(vocabulary):
    """`{role: (id, how)}`."""
    return {role.name: (role.token, role.how) for role in vocabulary.report.roles}


@pytest.fixture(params=MAKERS)
def folder(request, tmp_path):
    return MAKERS[request.param](tmp_path / request.param)


@pytest.mark.parametrize("make", [folders.gpt2_folder, folders.json_folder])
def test_byte_level_bpe_equals_the_library(make, tmp_path):
    """tokenizer.json also holds a template, truncation to 5 and padding to 9 tokens; none of it is text's."""
    library = folders.byte_level()
    vocabulary = Vocabulary.load(make(tmp_path / "model"))
    for text in TEXTS:
        tokens = vocabulary.encode(text)
        assert tokens == library.encode(text).ids
        assert vocabulary.decode(tokens) == library.decode(tokens) == text
    assert vocabulary.report.base_size == library.get_vocab_size() == 330
    assert roles(vocabulary) == {
        "bos": (0, "reused"),
        "eos": (0, "found"),
        "pad": (330, "added"),
        "mask": (331, "added"),
    }
    assert vocabulary.size == vocabulary.specials.vocab_size == 332


def test_word_piece_equals_the_library(tmp_path):
    import tokenizers

    for lowercase in (True, False):
        path = folders.bert_folder(tmp_path / f"bert_{lowercase}", lowercase)
        library = tokenizers.BertWordPieceTokenizer(str(path / "vocab.txt"), lowercase=lowercase)
        vocabulary = Vocabulary.load(path)
        for text in (*TEXTS, "The CAT's mat"):
            tokens = library.encode(text, add_special_tokens=False).ids
            assert vocabulary.encode(text) == tokens
            assert vocabulary.decode(tokens) == library.decode(tokens)
    pieces = [vocabulary.piece(token) for token in vocabulary.encode("sat dogs")]
    assert pieces[0].startswith("▁")
    assert "".join(pieces) == "▁sat▁dogs"
    assert {role: token for role, (token, _) in roles(vocabulary).items()} == {
        "pad": 0,
        "unk": 1,
        "bos": 2,
        "eos": 3,
        "mask": 4,
    }
    assert vocabulary.report.names("found") == ("bos", "eos", "pad", "unk", "mask")
    capitals = Vocabulary.load(
        folders.bert_folder(tmp_path / "told", lowercase=True, tokenizer_config={"do_lower_case": False})
    )
    assert capitals.unk_id in capitals.encode("THE")


def test_llama_is_sentencepiece_with_pad_and_mask_behind(tmp_path):
    import sentencepiece

    path = folders.llama_folder(tmp_path / "llama")
    library = sentencepiece.SentencePieceProcessor(model_file=str(path / "tokenizer.model"))
    vocabulary = Vocabulary.load(path)
    for text in TEXTS:
        assert vocabulary.encode(text) == library.encode(text)
        assert vocabulary.decode(vocabulary.encode(text)) == text
    size = library.get_piece_size()
    assert roles(vocabulary) == {
        "bos": (1, "found"),
        "eos": (2, "found"),
        "unk": (0, "found"),
        "pad": (size, "added"),
        "mask": (size + 1, "added"),
    }
    assert vocabulary.piece(size + 1) == "<mask>"


def test_xlm_r_numbers_the_pieces_as_fairseq_did(tmp_path):
    """Ids by XLM-R's dictionary: <s> 0, <pad> 1, </s> 2, <unk> 3, then SentencePiece's ids plus one, <mask> last."""
    import sentencepiece

    path = folders.xlmr_folder(tmp_path / "xlmr")
    library = sentencepiece.SentencePieceProcessor(model_file=str(path / "sentencepiece.bpe.model"))
    vocabulary = Vocabulary.load(path)
    assert vocabulary.size == library.get_piece_size() + 2
    assert {name: token for name, (token, _) in roles(vocabulary).items()} == {
        "bos": 0,
        "pad": 1,
        "eos": 2,
        "unk": 3,
        "mask": vocabulary.size - 1,
    }
    for text in TEXTS:
        native = library.encode(text)
        assert vocabulary.encode(text) == [token + 1 if token else 3 for token in native]
        assert vocabulary.decode(vocabulary.encode(text)) == library.decode(native)
    assert [vocabulary.piece(token) for token in (0, 2, 3, 4)] == ["<s>", "</s>", "<unk>", library.id_to_piece(3)]


def test_t5_has_its_sentinels_behind_the_pieces_backwards(tmp_path):
    vocabulary = Vocabulary.load(folders.t5_folder(tmp_path / "t5", tokenizer_config={"extra_ids": 3}))
    size = vocabulary.size - 4  # three sentinels and MASK
    assert vocabulary.sentinel_ids == (size + 2, size + 1, size)
    assert roles(vocabulary)["mask"] == (size + 3, "added")
    assert roles(vocabulary)["bos"] == (0, "reused")
    assert roles(vocabulary)["pad"] == (0, "found")
    assert len(Vocabulary.load(folders.t5_folder(tmp_path / "plain")).sentinel_ids) == 100
    assert not Vocabulary.load(folders.t5_folder(tmp_path / "mt5", config={"model_type": "mt5"})).sentinel_ids


def test_T35_no_text_becomes_a_special_token(folder):
    vocabulary = Vocabulary.load(folder)
    reserved = {token for name, (token, _) in roles(vocabulary).items() if name != "unk"}
    spelt = [role.piece for role in vocabulary.report.roles] + ["<mask>", "<pad>", "<|endoftext|>", "[MASK]", "[SEP]"]
    for piece in [*spelt, *(f"the {piece}{piece} cat" for piece in spelt), "".join(spelt)]:
        tokens = vocabulary.encode(piece)
        assert tokens
        assert not reserved & set(tokens), piece
        if folder.name in ("gpt2", "json", "llama"):
            assert vocabulary.decode(tokens) == piece


def test_T35_merges_that_make_a_special_token_do_not(tmp_path):
    """LLaMA's vocabularies hold `</s>`, and merges written for all of their pieces can make it from text."""
    path = folders.json_folder(tmp_path / "json", specials=("<|endoftext|>", "</s>"))
    content = json.loads((path / "tokenizer.json").read_text())
    ids, merges = content["model"]["vocab"], content["model"]["merges"]
    ids["</"], ids["s>"] = len(ids), len(ids) + 1
    merges[:0] = [["<", "/"], ["s", ">"], ["</", "s>"]]
    content["pre_tokenizer"]["use_regex"] = False
    folders.write(path, tokenizer=content, tokenizer_config={"eos_token": "</s>"})
    vocabulary = Vocabulary.load(path)
    assert vocabulary.specials.eos_id == ids["</s>"]
    assert vocabulary.encode("</s>") == [ids["</"], ids["s>"]]


def test_decode_skips_specials_and_survives_every_cut(folder):
    vocabulary = Vocabulary.load(folder)
    specials = vocabulary.specials
    words = vocabulary.encode("the cat")
    noise = [specials.pad_id, specials.mask_id, specials.bos_id, vocabulary.size + 7, -1]
    noise = [token for token in noise if token != specials.eos_id]
    assert vocabulary.decode([*noise, *words, *noise, specials.eos_id, *words]) == "the cat"
    tokens = vocabulary.encode("😀 où 中 👩‍👩‍👧")
    for start in range(len(tokens)):
        for stop in range(start, len(tokens) + 1):
            assert isinstance(vocabulary.decode(tokens[start:stop]), str)
    assert vocabulary.decode([]) == ""
    assert vocabulary.piece(specials.pad_id) == vocabulary.piece(vocabulary.size) == ""


def test_pieces_are_spelt_as_sentencepiece_would(tmp_path):
    vocabulary = Vocabulary.load(folders.gpt2_folder(tmp_path / "gpt2"))
    tokens = vocabulary.encode("def f(x):\n\tle où")
    assert "".join(vocabulary.piece(token) for token in tokens) == "def▁f(x):\n\tle▁où"
    assert vocabulary.piece(vocabulary.encode("😀")[0]) == "\ufffd"
    assert vocabulary.piece(0) == "<|endoftext|>"


def test_equality_is_of_content(folder, tmp_path):
    vocabulary = Vocabulary.load(folder)
    elsewhere = Vocabulary.load(shutil.copytree(folder, tmp_path / "elsewhere"))
    assert vocabulary == elsewhere
    assert vocabulary.sha256 == elsewhere.sha256
    (tmp_path / "stored").write_bytes(vocabulary.model)
    for again in (Vocabulary(vocabulary.model), Vocabulary.load(tmp_path / "stored")):
        assert again == vocabulary
        assert again.report == vocabulary.report
        assert again.specials == vocabulary.specials
        assert again.encode("the cat <mask>") == vocabulary.encode("the cat <mask>")
    other = Vocabulary.load(folder, mask=50)
    assert other != vocabulary
    assert other.sha256 != vocabulary.sha256


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.json", "merges.txt", "tokenizer.model", "vocab.txt"])
def test_a_file_of_a_folder_is_the_folder(name, tmp_path):
    for make in MAKERS.values():
        path = make(tmp_path / make.__name__, tokenizer_config={"pad_token": "<filler>"})
        if (path / name).exists():
            assert Vocabulary.load(path / name) == Vocabulary.load(path)
            return
    raise AssertionError(name)
