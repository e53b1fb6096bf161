"""One definition of a real token: what fills a window is none, and lengths agree with it."""

import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_lm.core.real_tokens import filler, text_tokens
from diffusion_lm.samplers.base import target_lengths

PAD, EOS = 0, 1


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
    unreal = np.asarray(filler(tokens, mask, PAD, EOS))
    assert (~unreal & np.asarray(mask)).sum() == real
    assert not unreal[~np.asarray(mask)].any()
    assert text_tokens(tokens, mask, PAD, EOS).sum() == length
    assert target_lengths(tokens, mask, EOS, PAD)[0] == length


def test_documents_of_one_target_keep_their_ends_and_their_text():
    """The EOS between two documents is real, as is the text after it; the decoded text ends at the first EOS."""
    tokens, mask = jnp.asarray([[7, EOS, 8, 9, EOS, EOS]]), jnp.ones((1, 6), bool)
    np.testing.assert_array_equal(filler(tokens, mask, PAD, EOS)[0], [0, 0, 0, 0, 0, 1])
    assert text_tokens(tokens, mask, PAD, EOS).sum() == 3
    assert target_lengths(tokens, mask, EOS, PAD)[0] == 1
