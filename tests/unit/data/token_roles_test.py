"""Which token has which role, by the configuration files of a folder or by request."""

import json

import pytest
import tokenizer_folders as folders

from diffusion_lm.core.errors import ConfigError
from diffusion_lm.data.vocabulary import Vocabulary

MARKS = ("<|endoftext|>", "<|start|>", "<|end|>", "<|blank|>", "<|hole|>")


def roles(path, **options):
    """`{role: (id, how)}`."""
    return {role.name: (role.token, role.how) for role in Vocabulary.load(path, **options).report.roles}


@pytest.mark.parametrize("make", [folders.gpt2_folder, folders.json_folder])
@pytest.mark.parametrize("plain", [True, False])
def test_the_tokenizers_configuration_names_tokens(make, plain, tmp_path):
    def spell(token):
        return token if plain else {"content": token, "lstrip": False}

    named = {"bos_token": "<|start|>", "eos_token": "<|end|>", "pad_token": "<|blank|>", "mask_token": "<|hole|>"}
    path = make(tmp_path / "model", MARKS, tokenizer_config={key: spell(token) for key, token in named.items()})
    expected = {"bos": (1, "found"), "eos": (2, "found"), "pad": (3, "found"), "mask": (4, "found")}
    assert roles(path) == expected
    (path / "tokenizer_config.json").rename(path / "special_tokens_map.json")
    assert roles(path) == expected
    folders.write(path, tokenizer_config={"eos_token": "<|start|>", "unk_token": None})
    assert roles(path)["eos"] == (1, "found"), "tokenizer_config.json comes first"


def test_the_models_configuration_names_ids(tmp_path):
    path = folders.json_folder(tmp_path / "model", MARKS, config={"bos_token_id": 1, "pad_token_id": -1})
    folders.write(path, generation_config={"eos_token_id": [2, 0], "pad_token_id": 3})
    assert {name: token for name, (token, _) in roles(path).items()} == {"bos": 1, "eos": 2, "pad": 3, "mask": 330}
    folders.write(path, config={"mask_token_id": 4, "eos_token_id": 100_000})
    assert roles(path)["mask"] == (4, "found")
    assert roles(path)["eos"] == (2, "found")


def test_a_pad_that_is_another_token_is_none(tmp_path):
    """Fine-tuning scripts set PAD to EOS; a scored window of PAD would then be no length model."""
    path = folders.json_folder(tmp_path / "model", MARKS, tokenizer_config={"pad_token": "<|endoftext|>"})
    assert roles(path)["eos"] == (0, "found")
    assert roles(path)["pad"] == (330, "added")


def test_a_named_token_that_is_not_there_gives_its_name(tmp_path):
    path = folders.gpt2_folder(tmp_path / "model", tokenizer_config={"pad_token": "<filler>"})
    vocabulary = Vocabulary.load(path)
    assert vocabulary.piece(vocabulary.specials.mask_id) == "<mask>"
    assert {role.name: role.piece for role in vocabulary.report.roles}["pad"] == "<filler>"


def test_eos_is_added_where_there_is_none(tmp_path):
    path = folders.gpt2_folder(tmp_path / "model", specials=())
    assert roles(path) == {
        "bos": (330, "reused"),
        "eos": (330, "added"),
        "pad": (331, "added"),
        "mask": (332, "added"),
    }
    assert Vocabulary.load(path).report.base_size == 330


def test_the_decoders_start_token_serves_as_bos(tmp_path):
    path = folders.json_folder(tmp_path / "model", MARKS, config={"decoder_start_token_id": 3, "eos_token_id": 0})
    assert roles(path)["bos"] == (3, "reused")


def test_tokens_added_to_files_keep_their_ids(tmp_path):
    added = {"<|im_start|>": 400, "<|hole|>": 402, "<|im_end|>": 401}
    for make in (folders.gpt2_folder, folders.llama_folder):
        path = make(tmp_path / make.__name__)
        base = Vocabulary.load(path).report.base_size
        numbered = {token: base + number - 400 for token, number in added.items()}
        folders.write(
            path, added_tokens=numbered, special_tokens_map={"mask_token": "<|hole|>", "eos_token": "<|im_end|>"}
        )
        vocabulary = Vocabulary.load(path)
        assert vocabulary.specials.mask_id == base + 2
        assert vocabulary.specials.eos_id == base + 1
        assert vocabulary.specials.pad_id == base + 3
        assert vocabulary.size == base + 4
        assert vocabulary.report.base_size == base + 3
        assert vocabulary.piece(base) == "<|im_start|>"
        assert not {base + 1, base + 2} & set(vocabulary.encode("a <|hole|> b <|im_end|>"))


def test_ids_may_be_left_out_behind_a_sentencepiece_model(tmp_path):
    path = folders.llama_folder(tmp_path / "model")
    base = Vocabulary.load(path).report.base_size
    decoder = {str(base + 2): {"content": "<pad>", "special": True}, "0": {"content": "<unk>", "special": True}}
    folders.write(path, tokenizer_config={"added_tokens_decoder": decoder})
    vocabulary = Vocabulary.load(path)
    assert vocabulary.specials.pad_id == base + 2
    assert vocabulary.specials.mask_id == base + 3
    assert vocabulary.piece(base) == ""


@pytest.mark.parametrize("make", [folders.gpt2_folder, folders.json_folder, folders.llama_folder, folders.bert_folder])
def test_an_existing_token_is_reused_as_mask(make, tmp_path):
    """DiffuGPT's way. Text that would give the token is spelt with shorter ones and reads the same."""
    path = make(tmp_path / "model")
    before = Vocabulary.load(path)
    (token,) = [token for token in before.encode("x mask") if before.piece(token) == "▁mask"]
    for named in (token, before._opened.model.spelling(token)):
        vocabulary = Vocabulary.load(path, mask=named)
        assert vocabulary.specials.mask_id == token
        assert {role.name: role.how for role in vocabulary.report.roles}["mask"] == "reused"
        text = "a mask is a masked mask"
        tokens = vocabulary.encode(text)
        assert token in before.encode(text)
        assert token not in tokens
        assert vocabulary.decode(tokens) == text
        assert [part for part in tokens if part in before.encode(text)], "only the token itself is spelt anew"
        assert vocabulary.decode([token]) == ""


def test_a_mask_may_be_named_by_a_text_of_one_token(tmp_path):
    path = folders.gpt2_folder(tmp_path / "model")
    vocabulary = Vocabulary.load(path, mask=" mask")
    assert vocabulary.piece(vocabulary.specials.mask_id) == "▁mask"
    with pytest.raises(ConfigError, match="mask='no such token at all': not a token"):
        Vocabulary.load(path, mask="no such token at all")
    with pytest.raises(ConfigError, match="mask=330: not a token"):
        Vocabulary.load(path, mask=330)
    with pytest.raises(ConfigError, match="token 0 is already BOS"):
        Vocabulary.load(path, mask="<|endoftext|>")
    (tmp_path / "stored").write_bytes(vocabulary.model)
    assert Vocabulary.load(tmp_path / "stored", mask=vocabulary.specials.mask_id) == vocabulary
    with pytest.raises(ConfigError, match="already has another MASK token"):
        Vocabulary.load(tmp_path / "stored", mask=300)


def test_the_report_is_one_line(tmp_path):
    report = Vocabulary.load(folders.gpt2_folder(tmp_path / "model")).report
    assert str(report) == (
        "BPE, 332 tokens (2 of them added): BOS <|endoftext|> 0 (reused), EOS <|endoftext|> 0 (found), "
        "PAD <pad> 330 (added), MASK <mask> 331 (added)"
    )
    assert report.names("added") == ("pad", "mask")


def test_what_is_no_tokenizer_is_one_sentence(tmp_path):
    empty = folders.write(tmp_path / "empty", config={})
    with pytest.raises(ConfigError, match=r"looked for tokenizer.json, .*vocab.json with merges.txt, vocab.txt"):
        Vocabulary.load(empty)
    half = folders.write(tmp_path / "half", vocab={"a": 0})
    with pytest.raises(ConfigError, match="is incomplete"):
        Vocabulary.load(half / "vocab.json")
    with pytest.raises(ConfigError, match="do not define the tokenizer of 'qwen2'"):
        Vocabulary.load(folders.gpt2_folder(tmp_path / "qwen", tokenizer_config={"tokenizer_class": "Qwen2Tokenizer"}))
    with pytest.raises(ConfigError, match="'camembert'"):
        Vocabulary.load(folders.xlmr_folder(tmp_path / "camembert", config={"model_type": "camembert"}))
    clip = folders.gpt2_folder(tmp_path / "clip")
    (clip / "vocab.json").write_text(json.dumps({"a</w>": 0}))
    with pytest.raises(ConfigError, match="do not define a byte-level BPE"):
        Vocabulary.load(clip)
    broken = folders.gpt2_folder(tmp_path / "broken")
    (broken / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="is not valid JSON"):
        Vocabulary.load(broken)
    with pytest.raises(ConfigError, match="contains no tokenizer"):
        Vocabulary.load(folders.write(tmp_path / "other", tokenizer={"version": "1.0"}))
    with pytest.raises(ConfigError, match="tokenizers library cannot read"):
        Vocabulary.load(folders.write(tmp_path / "wrong", tokenizer={"model": {"type": "Nothing"}}))
    (tmp_path / "text.model").write_text("plain text")
    with pytest.raises(ConfigError, match="no SentencePiece model"):
        Vocabulary.load(tmp_path / "text.model")
    with pytest.raises(ConfigError, match="is unreadable"):
        _ = Vocabulary(b'{"format": "diffusion_lm vocabulary 99"}').size


def test_added_ids_with_a_gap_in_tokenizer_json_are_refused(tmp_path):
    path = folders.gpt2_folder(tmp_path / "model", added_tokens={"<|far|>": 500})
    with pytest.raises(ConfigError, match="cannot have the id 500"):
        Vocabulary.load(path)


@pytest.mark.parametrize("make", [folders.gpt2_folder, folders.json_folder])
def test_special_tokens_without_a_role_do_not_come_out_of_text_either(make, tmp_path):
    vocabulary = Vocabulary.load(make(tmp_path / "model", MARKS))
    text = "a <|start|><|hole|> b"
    assert not set(range(len(MARKS))) & set(vocabulary.encode(text))
    assert vocabulary.decode(vocabulary.encode(text)) == text


def test_a_bos_that_is_eos_is_reused_though_files_name_it(tmp_path):
    named = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    path = folders.gpt2_folder(tmp_path / "model", tokenizer_config=named)
    assert roles(path)["bos"] == (0, "reused")
    assert roles(path)["unk"] == roles(path)["eos"] == (0, "found")


def test_a_token_with_a_role_is_special_though_its_file_says_otherwise(tmp_path):
    path = folders.json_folder(tmp_path / "model", ("<|endoftext|>", "<§fill§>"), config={"pad_token_id": 1})
    content = json.loads((path / "tokenizer.json").read_text())
    content["added_tokens"][1]["special"] = False
    folders.write(path, tokenizer=content)
    vocabulary = Vocabulary.load(path)
    assert vocabulary.specials.pad_id == 1
    assert 1 not in vocabulary.encode("a <§fill§> b")
    assert vocabulary.decode(vocabulary.encode("a <§fill§> b")) == "a <§fill§> b"
