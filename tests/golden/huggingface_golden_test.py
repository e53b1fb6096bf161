"""Logits of imported checkpoints equal those that `transformers` computed, without torch."""

import dataclasses
import json

import numpy as np
import pytest
import safetensors.numpy
from huggingface_cases import FOLDER, GOLDEN, TOLERANCE, difference, our_logits

from diffusion_lm.architectures.single_stream import SingleStream
from diffusion_lm.interop.huggingface import load, save
from diffusion_lm.nn.rope import YarnRope


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


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("gpt2", {"gelu": "exact"}),
        ("gpt2", {"norm_eps": 1e-3}),
        ("llama", {"rope_theta": 100.0}),
        ("llama", {"attention_scale": "none"}),
        ("llama3_biases_tied", {"rope_scaling": None}),
        ("llama3_biases_tied", {"tied_logit_scale": True}),
        ("llama_yarn", {"rope_scaling": YarnRope(4.0, original_max_positions=16, attention_factor=1.0)}),
        ("llama_yarn", {"rope_scaling": YarnRope(4.0, original_max_positions=16, beta_slow=0.2)}),
        ("mistral_window", {"window": 6}),
        ("mistral_window", {"window": 4}),
        ("qwen2_some_windows", {"window_layers": (0,)}),
        ("gemma2", {"norm_around_one": False}),
        ("gemma2", {"scaled_embeddings": False}),
        ("gemma2", {"attention_scale_size": None}),
        ("gemma2", {"attention_softcap": None}),
        ("gemma2", {"logit_softcap": None}),
        ("gemma3", {"window_rope_theta": None}),
        ("gemma3", {"rope_scaling": None}),
        ("bert", {"gelu": "tanh"}),
        ("modernbert", {"gelu": "tanh"}),
        ("modernbert", {"first_attention_norm": True}),
        ("modernbert", {"window": 4}),
        ("modernbert", {"window": 2}),
        ("modernbert", {"window_rope_theta": None}),
        ("modernbert", {"window_layers": (0, 1, 2)}),
        ("roberta", {"position_offset": 0, "max_positions": 20}),
    ],
)
def test_the_comparison_sees_each_field(name, changes, imported):
    """A network that differs in one field fails the comparison, so the field does what the family means by it."""
    golden, source = _golden(name), imported[name]
    other = dataclasses.replace(
        source, architecture=SingleStream(dataclasses.replace(source.architecture.spec, **changes))
    )
    ours = our_logits(other, golden["ids"], golden["mask"])
    assert difference(ours, golden["logits"], golden["mask"]) > TOLERANCE


@pytest.mark.parametrize("name", GOLDEN)
@pytest.mark.thorough
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
    assert bool(folded) == (name == "bert" or "roberta" in name)
    for tensor in set(before) - folded:
        np.testing.assert_array_equal(after[tensor], before[tensor], err_msg=tensor)
    again = load(tmp_path / "out")
    assert again.architecture == source.architecture
    golden = _golden(name)
    ours, once_more = (our_logits(one, golden["ids"], golden["mask"]) for one in (source, again))
    np.testing.assert_array_equal(ours, once_more)


def test_special_tokens_that_the_vocabulary_does_not_have_are_not_left_to_defaults(imported, tmp_path):
    """ModernBERT's class takes 50283 for padding where nothing is said, and then cannot make its own table."""
    source = imported["modernbert"]
    save(tmp_path / "out", source.architecture, source.params, config={"eos_token_id": 2})
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["eos_token_id"] == 2
    assert {written[f"{name}_token_id"] for name in ("pad", "bos", "cls", "sep")} == {None}
