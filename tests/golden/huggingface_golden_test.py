"""Logits of imported checkpoints equal those that `transformers` computed, without torch."""

import json

import numpy as np
import pytest
import safetensors.numpy
from huggingface_cases import FOLDER, GOLDEN, TOLERANCE, difference, our_logits

from diffusion_lm.interop.huggingface import load, save


def _golden(name: str) -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(FOLDER / name / "golden.safetensors")


@pytest.fixture(scope="module")
def imported():
    return {name: load(FOLDER / name) for name in GOLDEN}


@pytest.mark.parametrize("name", GOLDEN)
def test_logits_are_those_of_transformers(name, imported):
    golden = _golden(name)
    ours = our_logits(imported[name], golden["ids"], golden["mask"])
    assert difference(ours, golden["logits"], golden["mask"]) < TOLERANCE
    # The comparison means something: the logits are far from 0 and from those of the reversed text.
    assert np.abs(golden["logits"]).max() > 1
    reversed_text = our_logits(imported[name], golden["ids"][:1, ::-1], golden["mask"][:1])
    assert difference(reversed_text, golden["logits"][:1], golden["mask"][:1]) > 0.1


@pytest.mark.parametrize("name", GOLDEN)
def test_bfloat16_comes_near(name):
    golden = _golden(name)
    ours = our_logits(load(FOLDER / name, param_dtype="bfloat16"), golden["ids"], golden["mask"])
    assert TOLERANCE < difference(ours, golden["logits"], golden["mask"]) < 0.5


@pytest.mark.parametrize("name", GOLDEN)
def test_export_writes_what_was_read(name, imported, tmp_path):
    """Bit for bit, but for token types: the table of positions holds their sum and the table of types is 0."""
    kind = json.loads((FOLDER / name / "config.json").read_text())["model_type"]
    source = imported[name]
    assert save(tmp_path / "out", source.architecture, source.params, family=kind) == kind
    before = safetensors.numpy.load_file(FOLDER / name / "model.safetensors")
    after = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    assert set(after) == set(before)
    folded = {tensor for tensor in before if "position_embeddings" in tensor or "token_type" in tensor}
    assert bool(folded) == ("roberta" in name)
    for tensor in set(before) - folded:
        np.testing.assert_array_equal(after[tensor], before[tensor], err_msg=tensor)
    again = load(tmp_path / "out")
    assert again.architecture == source.architecture
    golden = _golden(name)
    ours, once_more = (our_logits(one, golden["ids"], golden["mask"]) for one in (source, again))
    np.testing.assert_array_equal(ours, once_more)
