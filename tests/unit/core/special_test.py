import pytest

from diffusion_lm.core.errors import ConfigError
from diffusion_lm.core.special import SpecialTokens


def test_ends_are_every_eos_and_pad():
    special = SpecialTokens(50, pad_id=3, eos_id=1, other_eos_ids=(7, 1))
    assert special.end_ids == (1, 7, 3)


def test_asking_for_the_mask_of_a_vocabulary_without_one_is_an_error():
    assert SpecialTokens(50, mask_id=4).mask == 4
    with pytest.raises(ConfigError, match="no MASK token"):
        _ = SpecialTokens(50).mask


@pytest.mark.parametrize("fields", [{"mask_id": 50}, {"eos_id": -1}, {"other_eos_ids": (51,)}], ids=str)
def test_ids_outside_of_the_vocabulary_are_errors(fields):
    with pytest.raises(ConfigError, match="not an id of a vocabulary of 50 tokens"):
        SpecialTokens(50, **fields)
