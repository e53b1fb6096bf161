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


def test_t5_style_opens_streams_with_pad_and_has_sentinels(train_vocabulary):
    vocabulary = train_vocabulary(bos=-1, symbols=("<extra_id_1>", "<extra_id_0>"))
    assert vocabulary.specials.bos_id == vocabulary.specials.pad_id == 0
    assert vocabulary.specials.mask_id is None
    assert [vocabulary.processor.id_to_piece(i) for i in vocabulary.sentinel_ids] == ["<extra_id_0>", "<extra_id_1>"]


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
