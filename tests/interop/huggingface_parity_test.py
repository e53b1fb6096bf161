"""Compares logits with `transformers` for every family, imported and exported; `make test-interop` runs it."""

import json

import huggingface_cases as cases
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import safetensors.numpy  # noqa: E402

from diffusion_lm.interop.huggingface import load, save  # noqa: E402

ALL = [*cases.GOLDEN, *cases.LIVE]


def _inputs(model) -> tuple[np.ndarray, np.ndarray]:
    encoder = type(model).__name__.endswith("MaskedLM")
    return cases.inputs(model.config.pad_token_id if encoder else None)


def _equal(a, b) -> bool:
    import jax

    return jax.tree.all(jax.tree.map(lambda x, y: bool((np.asarray(x) == np.asarray(y)).all()), a, b))


@pytest.mark.parametrize("name", ALL)
def test_logits_are_equal(name, tmp_path):
    model = cases.build(name)
    model.save_pretrained(tmp_path / "in")
    ids, mask = _inputs(model)
    imported = load(tmp_path / "in")
    theirs = cases.reference(model, ids, mask)
    assert cases.difference(cases.our_logits(imported, ids, mask), theirs, mask) < cases.TOLERANCE
    assert np.abs(theirs).max() > 1


@pytest.mark.parametrize("name", ALL)
def test_transformers_loads_the_export(name, tmp_path):
    model = cases.build(name)
    model.save_pretrained(tmp_path / "in")
    imported = load(tmp_path / "in")
    save(tmp_path / "out", imported.architecture, imported.params, family=model.config.model_type)
    again, info = type(model).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    ids, mask = _inputs(model)
    theirs = cases.reference(model, ids, mask)
    assert cases.difference(cases.reference(again.eval(), ids, mask), theirs, mask) < cases.TOLERANCE
    before, after = dict(model.named_parameters()), dict(again.named_parameters())
    for path, weight in before.items():
        if "position_embeddings" not in path and "token_type" not in path:
            assert torch.equal(weight, after[path]), path


def test_the_language_model_of_a_gemma3_with_images(tmp_path):
    text = cases.build("gemma3")
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Gemma3Config(
        text_config=text.config.to_dict(),
        vision_config=vision | {"image_size": 8, "patch_size": 4},
        mm_tokens_per_image=1,
    )
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    model.model.language_model.load_state_dict(text.model.state_dict())
    model.save_pretrained(tmp_path / "in")
    text.save_pretrained(tmp_path / "text")
    imported, alone = load(tmp_path / "in"), load(tmp_path / "text")
    assert imported.architecture == alone.architecture
    assert _equal(imported.params, alone.params)
    ids, mask = cases.inputs(None)
    assert cases.difference(cases.our_logits(imported, ids, mask), cases.reference(model, ids, mask), mask) < (
        cases.TOLERANCE
    )


def test_export_finds_the_family(tmp_path):
    for name in ALL:
        cases.build(name).save_pretrained(tmp_path / name)
        imported = load(tmp_path / name)
        kind = save(tmp_path / f"{name}_out", imported.architecture, imported.params)
        assert load(tmp_path / f"{name}_out").architecture.spec == imported.architecture.spec, (name, kind)


def test_shards_bins_and_old_names_give_the_same_parameters(tmp_path):
    model = cases.build("llama")
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="4KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    one = load(tmp_path / "one").params
    assert _equal(one, load(tmp_path / "many").params)

    (tmp_path / "bin").mkdir()
    torch.save(model.state_dict(), tmp_path / "bin" / "pytorch_model.bin")
    model.config.save_pretrained(tmp_path / "bin")
    assert _equal(one, load(tmp_path / "bin").params)

    # Files of transformers before version 5 say theta and scaling apart.
    config = json.loads((tmp_path / "one" / "config.json").read_text())
    theta = config.pop("rope_parameters")["rope_theta"]
    (tmp_path / "one" / "config.json").write_text(json.dumps(config | {"rope_theta": theta, "rope_scaling": None}))
    assert load(tmp_path / "one").architecture == load(tmp_path / "many").architecture


def test_a_base_model_has_no_prefix_and_a_tied_head(tmp_path):
    model = cases.build("gpt2")
    model.save_pretrained(tmp_path / "whole")
    model.transformer.save_pretrained(tmp_path / "base")
    names = safetensors.numpy.load_file(tmp_path / "base" / "model.safetensors")
    assert not any(name.startswith("transformer.") for name in names)
    assert _equal(load(tmp_path / "whole").params, load(tmp_path / "base").params)


def test_bfloat16_files_are_read_exactly(tmp_path):
    model = cases.build("qwen3").to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    imported = load(tmp_path)
    embedding = np.asarray(imported.params["embed"]["tokens"])[: cases.VOCAB]
    np.testing.assert_array_equal(embedding, model.get_input_embeddings().weight.float().detach().numpy())
