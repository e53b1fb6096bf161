import dataclasses

import pytest

from diffusion_lm.core.errors import ConfigError
from diffusion_lm.core.special import SpecialTokens

GPT2 = SpecialTokens(vocab_size=50259, pad_id=50257, eos_id=50256, bos_id=50256, mask_id=50258)


@dataclasses.dataclass(frozen=True)
class Corruption:
    mask_id: int | None = None


@dataclasses.dataclass(frozen=True)
class Part:
    eos_id: int = 1
    pad_id: int = 0
    parts: tuple = ()


def test_ids_of_other_tokens_are_refused_with_the_bindings_to_set():
    with pytest.raises(ConfigError, match=r"Part.pad_id=0: .* 50257") as caught:
        GPT2.check(Part(parts=({"a": Corruption(4)}, Corruption(4), Corruption())))
    assert "Bind Part.pad_id = 50257, Part.eos_id = 50256, Corruption.mask_id = 50258." in str(caught.value)


def test_ids_of_these_tokens_pass():
    GPT2.check(Part(50256, 50257, (Corruption(50258), Corruption())))
    SpecialTokens(vocab_size=9).check(Part(parts=(Corruption(4),)))
