"""One definition of a real token: what only fills a window is not real, and lengths agree with it."""

import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_lm.core.real_tokens import is_filler, is_text
from diffusion_lm.core.special import SpecialTokens
from diffusion_lm.samplers.window import target_lengths

PAD, EOS = 0, 1
SPECIAL = SpecialTokens(10, pad_id=PAD, eos_id=EOS)


@pytest.mark.parametrize(
    ("target", "real", "length"),
    [
        ([7, 8, 9, EOS, PAD, PAD], 4, 3),
        ([7, 8, 9, EOS, EOS, EOS], 4, 3),
        ([7, 8, PAD, PAD, PAD, PAD], 2, 2),
        ([EOS, EOS, EOS, PAD, PAD, PAD], 1, 0),
        ([7, 8, 9, 7, 8, 9], 6, 6),
    ],
)
def test_filler_is_neither_real_nor_text(target, real, length):
    tokens, mask = jnp.asarray([[5, 5, *target]]), jnp.asarray([[False, False] + [True] * 6])
    unreal = np.asarray(is_filler(tokens, mask, SPECIAL))
    assert (~unreal & np.asarray(mask)).sum() == real
    assert not unreal[~np.asarray(mask)].any()
    assert is_text(tokens, mask, SPECIAL).sum() == length
    assert target_lengths(tokens, mask, SPECIAL)[0] == length


def test_documents_of_one_target_keep_their_ends_and_their_text():
    """The EOS between two documents is real, as is the text after it; the decoded text ends at the first EOS."""
    tokens, mask = jnp.asarray([[7, EOS, 8, 9, EOS, EOS]]), jnp.ones((1, 6), bool)
    np.testing.assert_array_equal(is_filler(tokens, mask, SPECIAL)[0], [0, 0, 0, 0, 0, 1])
    assert is_text(tokens, mask, SPECIAL).sum() == 3
    assert target_lengths(tokens, mask, SPECIAL)[0] == 1
