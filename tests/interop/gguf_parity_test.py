"""Compares logits with those of transformers' own reader of GGUF files."""

import huggingface_cases as cases
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("gguf")
pytest.importorskip("accelerate")  # transformers loads GGUF files with it

from gguf_writing import F32, Q8_0, write_gguf  # noqa: E402

from diffusion_lm.interop.huggingface import load  # noqa: E402


@pytest.mark.parametrize("kind", [F32, Q8_0], ids=["F32", "Q8_0"])
@pytest.mark.parametrize("name", ["llama", "qwen2_tied", "qwen3", "gpt2"])
def test_logits_are_equal(name, kind, tmp_path):
    wide = (
        {"n_embd": 32, "n_positions": 1024}
        if name == "gpt2"
        else {"hidden_size": 32, "intermediate_size": 64, "head_dim": 8}
    )
    if name == "qwen3":
        wide["head_dim"] = 128  # transformers' reader takes it for granted
    model = cases.build(name, **wide)
    model.save_pretrained(tmp_path / "folder")
    # transformers takes the vocabulary's size from the tokenizer.
    tokens = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": [str(number) for number in range(cases.VOCAB)]}
    write_gguf(tmp_path / "folder", tmp_path / "model.gguf", kind, metadata=tokens)
    theirs = type(model).from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32).eval()
    ids, mask = cases.inputs(None)
    ours = cases.our_logits(load(tmp_path / "model.gguf"), ids, mask)
    assert cases.difference(ours, cases.reference(theirs, ids, mask), mask) < cases.TOLERANCE
    if kind == F32:
        assert cases.difference(ours, cases.reference(model, ids, mask), mask) < cases.TOLERANCE
