import pytest

from diffusion_lm.core.errors import ConfigError
from diffusion_lm.core.special import SpecialTokens
from diffusion_lm.samplers.decoding import Decoding

T5 = SpecialTokens(100, pad_id=0, eos_id=1, mask_id=4)
GPT2 = SpecialTokens(50259, pad_id=50257, eos_id=50256, mask_id=50258, other_eos_ids=(50255,))


def test_roles_and_mask_are_those_of_the_vocabulary():
    """The same settings in every vocabulary; no id has to be bound."""
    both = Decoding(forbidden=("eos", "pad"))
    assert both.never_drawn(T5) == (1, 0, 4)
    assert both.never_drawn(GPT2) == (50256, 50255, 50257, 50258)
    assert Decoding(forbidden=("pad", 7, 4)).never_drawn(T5) == (0, 7, 4)
    assert Decoding().never_drawn(T5) == (4,)
    assert Decoding().never_drawn(SpecialTokens(100)) == ()


def test_without_ends_adds_the_ends():
    assert Decoding(temperature=0.5).without_ends() == Decoding(temperature=0.5, forbidden=("eos", "pad"))
    assert Decoding(forbidden=[7, "pad"]).without_ends().forbidden == (7, "pad", "eos")


@pytest.mark.parametrize(
    ("fields", "plain"),
    [
        ({"temperature": 1.0}, True),
        ({}, False),
        ({"temperature": 1.0, "top_k": 3}, False),
        ({"temperature": 1.0, "top_p": 0.9}, False),
        ({"temperature": 1.0, "forbidden": ("eos",)}, True),
    ],
)
def test_plain_draws_are_those_of_the_network(fields, plain):
    assert Decoding(**fields).is_plain == plain


def test_an_id_outside_the_vocabulary_is_refused():
    with pytest.raises(ConfigError, match="100 tokens"):
        Decoding(forbidden=(100,)).never_drawn(T5)
    assert Decoding(forbidden=(100,)).never_drawn(GPT2) == (100, 50258)


@pytest.mark.parametrize(
    "fields",
    [{"temperature": -0.1}, {"top_k": -1}, {"top_k": 1.5}, {"top_p": 0.0}, {"top_p": 1.1}]
    + [{"forbidden": (token,)} for token in ("mask", "EOS", -1, True, 1.0)],
)
def test_impossible_settings_are_errors(fields):
    with pytest.raises(ConfigError, match="Decoding"):
        Decoding(**fields)
