"""Where the encoders of the RoBERTa family count positions from, and what they count."""

import numpy as np
import pytest
import safetensors.numpy
from huggingface_cases import FOLDER, TOLERANCE, difference, our_logits

from diffusion_lm.interop.huggingface import load


@pytest.mark.parametrize("name", ["roberta", "xlm_roberta_xl"])
def test_T37_encoder_position_offset(name):
    """The first token has position pad + 1 and padding has none, on the right and on the left.

    Row 1 of the fixture is padded on the right, row 2 on the left. Counting the padding shows on the left only.
    """
    golden = safetensors.numpy.load_file(FOLDER / name / "golden.safetensors")
    ids, mask, theirs = golden["ids"], golden["mask"], golden["logits"]
    assert mask[1, 0] == 1
    assert mask[1, -1] == 0
    assert mask[2, 0] == 0
    assert mask[2, -1] == 1
    imported = load(FOLDER / name)
    assert imported.specials.pad_id == 1
    assert imported.architecture.spec.position_offset == 2
    for row in range(len(ids)):
        one = slice(row, row + 1)
        assert difference(our_logits(imported, ids[one], mask[one]), theirs[one], mask[one]) < TOLERANCE

    counted_from_0 = np.maximum(np.cumsum(mask, axis=1) - 1, 0) - imported.architecture.spec.position_offset
    assert difference(our_logits(imported, ids, mask, counted_from_0), theirs, mask) > 0.1
    with_padding = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
    faulty = our_logits(imported, ids, mask, with_padding)
    assert difference(faulty[1:2], theirs[1:2], mask[1:2]) < TOLERANCE
    assert difference(faulty[2:], theirs[2:], mask[2:]) > 0.1
