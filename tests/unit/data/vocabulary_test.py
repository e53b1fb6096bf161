import pytest

from diffusion_lm.core.errors import ConfigError
from diffusion_lm.data.vocabulary import Vocabulary


def test_text_survives_with_newlines(train_vocabulary):
    vocabulary = train_vocabulary()
    text = "def f(x):\n    return {x}\n  é 你"
    assert vocabulary.decode(vocabulary.encode(text)) == text


def test_specials_are_found(train_vocabulary):
    specials = train_vocabulary().specials
    assert (specials.pad_id, specials.eos_id, specials.bos_id, specials.mask_id) == (0, 1, 2, 4)


def test_t5_style_opens_streams_with_pad_and_has_sentinels(train_vocabulary, tmp_path):
    loaded = train_vocabulary(bos=-1, symbols=("<extra_id_1>", "<extra_id_0>"))
    plain = Vocabulary((tmp_path / "tiny.model").read_bytes())
    for vocabulary in (loaded, plain):
        assert vocabulary.specials.bos_id == vocabulary.specials.pad_id == 0
        assert [vocabulary.piece(i) for i in vocabulary.sentinel_ids] == ["<extra_id_0>", "<extra_id_1>"]
    assert plain.specials.mask_id is None
    assert loaded.specials.mask_id == plain.size == loaded.size - 1
    assert loaded.report.names("added") == ("mask",)
    assert loaded.report.names("reused") == ("bos",)
    assert loaded.encode("the <mask> cat") == plain.encode("the <mask> cat")
    assert loaded.decode([*loaded.encode("the cat"), loaded.specials.mask_id]) == "the cat"


def test_a_model_that_lacks_nothing_stays_the_bytes_that_it_is(train_vocabulary, tmp_path):
    vocabulary = train_vocabulary()
    assert vocabulary.model == (tmp_path / "tiny.model").read_bytes()
    assert set(vocabulary.report.names("found")) == {"bos", "eos", "pad", "unk", "mask"}


def test_T35_a_symbol_of_the_model_does_not_come_out_of_text(train_vocabulary):
    """SentencePiece reads user-defined symbols in text; a MASK among them would make text of noise."""
    vocabulary = train_vocabulary()
    text = "the <mask> cat <mask>"
    tokens = vocabulary.encode(text)
    assert vocabulary.specials.mask_id not in tokens
    assert vocabulary.decode(tokens) == text


def test_decode_stops_at_eos_and_drops_specials(train_vocabulary):
    vocabulary = train_vocabulary()
    words = vocabulary.encode("the cat")
    assert vocabulary.decode([2, *words, 4, 0, vocabulary.size + 5, 1, *words]) == "the cat"
    assert vocabulary.decode_all([words, []]) == ["the cat", ""]


def test_equal_models_are_equal_vocabularies(train_vocabulary):
    first = train_vocabulary()
    assert first == Vocabulary(first.model)
    assert first.sha256 == Vocabulary(first.model).sha256
    assert first.sha256 != train_vocabulary(symbols=("<mask>",)).sha256


def test_missing_file_is_one_sentence(tmp_path):
    with pytest.raises(ConfigError, match="cannot read the vocabulary"):
        Vocabulary.load(tmp_path / "none.model")
