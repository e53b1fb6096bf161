"""Diffusion checkpoints under their published names compute what the shape's torch model does so masked."""

import dataclasses
import json
import re

import numpy as np
import pytest
import safetensors.numpy
from diffusion_cases import CASES, FOLDER, MASK, TOLERANCE, our_logits

from diffusion_lm.interop.huggingface import load, save


def _golden(name: str) -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(FOLDER / name / "golden.safetensors")


@pytest.fixture(scope="module")
def imported():
    return {name: load(FOLDER / name) for name in CASES}


@pytest.mark.parametrize("name", CASES)
def test_family_alignment_visibility_and_mask_are_recognised(name, imported):
    case, one = CASES[name], imported[name]
    assert (one.family, one.causal) == (case.family, False)
    assert one.diffusion.shifted == case.shifted
    assert one.diffusion.block_size == case.block
    assert one.diffusion.mask_id == one.specials.mask_id == MASK


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_the_reference(name, imported):
    golden = _golden(name)
    ours = our_logits(imported[name], golden["ids"])
    assert np.abs(ours - golden["logits"]).max() < TOLERANCE
    assert np.abs(golden["logits"]).max() > 1


@pytest.mark.parametrize("name", CASES)
def test_the_comparison_sees_the_visibility(name, imported):
    """Blocks of another size, or blocks where everything is seen, give other logits."""
    golden, one = _golden(name), imported[name]
    other = dataclasses.replace(one.diffusion, block_size=2 if one.diffusion.block_size != 2 else 3)
    ours = our_logits(dataclasses.replace(one, diffusion=other), golden["ids"])
    assert np.abs(ours - golden["logits"]).max() > 0.1


@pytest.mark.parametrize("name", CASES)
def test_a_round_trip_is_exact(name, imported, tmp_path):
    """Names and numbers of the tensors, the network, and what it was trained as."""
    one = imported[name]
    kind = save(
        tmp_path / "out",
        one.architecture,
        one.params,
        family=one.family,
        config=one.config,
        trained_as=one.diffusion.facts(),
    )
    before = safetensors.numpy.load_file(FOLDER / name / "model.safetensors")
    after = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    source = json.loads((FOLDER / name / "config.json").read_text())
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert kind == written["model_type"] == source["model_type"]
    if name == "diffullama_denoiser":  # written as the files are published, with LLaMA's names
        after = {
            re.sub(r"^model\.(?!embed)", "denoise_model.", key).replace("model.embed", "embed"): one
            for key, one in after.items()
        }
    assert set(after) == set(before)
    for tensor in before:
        np.testing.assert_array_equal(after[tensor], before[tensor], err_msg=tensor)
    assert written["architectures"] == source["architectures"]
    assert written["mask_token_id"] == MASK
    assert "auto_map" not in written
    again = load(tmp_path / "out")
    assert again.family == one.family
    assert again.architecture == one.architecture
    assert again.diffusion == one.diffusion
    # Nothing that the published config says of the network is lost or changed, but for rows that it did not count.
    ours = ("auto_map", "vocab_size", "dtype", "torch_dtype", "transformers_version", "_name_or_path")
    by_default = ("n_inner", "layer_types", "head_dim", "sliding_window")
    for field in set(source) - {*ours, *by_default}:
        assert written.get(field) == source[field], field
    assert written["vocab_size"] == one.architecture.spec.vocab_size
