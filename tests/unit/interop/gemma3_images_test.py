"""Of a Gemma 3 with images the language model is imported, whichever version of transformers wrote it."""

import json

import jax
import numpy as np
import pytest
import safetensors.numpy
from huggingface_cases import FOLDER

from diffusion_lm.core.errors import ConfigError
from diffusion_lm.interop.huggingface import load, save

STYLES = {
    "4": ("language_model.model.", "vision_tower.", "multi_modal_projector."),
    "5": ("model.language_model.", "model.vision_tower.", "model.multi_modal_projector."),
}


def _write(folder, style, change=lambda tensors: None, **top):
    """Writes the fixture of the language model as part of a larger one."""
    body, tower, projector = STYLES[style]
    tensors = safetensors.numpy.load_file(FOLDER / "gemma3" / "model.safetensors")
    tensors = {body + name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    tensors[f"{tower}vision_model.embeddings.patch_embedding.bias"] = np.ones(5, np.float32)
    tensors[f"{projector}mm_input_projection_weight"] = np.ones((5, 16), np.float32)
    change(tensors)
    text = json.loads((FOLDER / "gemma3" / "config.json").read_text())
    specials = {name: text.pop(name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    values = {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "text_config": text}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(values | specials | {"vision_config": {"hidden_size": 5}} | top))
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("style", STYLES)
def test_the_language_model_is_imported(style, tmp_path):
    _write(tmp_path / "in", style)
    imported, alone = load(tmp_path / "in"), load(FOLDER / "gemma3")
    assert imported.architecture == alone.architecture
    assert imported.specials == alone.specials
    assert jax.tree.all(jax.tree.map(lambda x, y: np.array_equal(x, y), imported.params, alone.params))
    assert len(imported.report.ignored) == 2
    assert all("vision" in name or "projector" in name for name in imported.report.ignored)
    # It goes out as a language model.
    assert save(tmp_path / "out", imported.architecture, imported.params, config=imported.config) == "gemma3_text"
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["architectures"] == ["Gemma3ForCausalLM"]
    assert not {"text_config", "vision_config"} & set(written)


@pytest.mark.parametrize("style", STYLES)
def test_errors_use_the_names_of_the_file(style, tmp_path):
    body = STYLES[style][0]
    missing = f"{body}layers.1.mlp.up_proj.weight"
    _write(tmp_path / "missing", style, lambda t: t.pop(missing))
    with pytest.raises(ConfigError, match="1 tensors of a gemma3 model are missing") as caught:
        load(tmp_path / "missing")
    assert missing in str(caught.value)
    other = {f"{body}layers.1.mlp.up_proj.bias": np.ones(24, np.float32)}
    _write(tmp_path / "more", style, lambda t: t.update(other))
    with pytest.raises(ConfigError, match="tensors do not belong to the gemma3 model"):
        load(tmp_path / "more")


def test_a_copy_of_the_embeddings_must_be_equal(tmp_path):
    def copy(tensors):
        tensors["language_model.lm_head.weight"] = tensors["language_model.model.embed_tokens.weight"] * 1

    _write(tmp_path / "equal", "4", copy)
    assert "language_model.lm_head.weight" in load(tmp_path / "equal").report.ignored
    _write(tmp_path / "other", "4", lambda t: (copy(t), t["language_model.lm_head.weight"].__setitem__((1, 1), 9.0)))
    with pytest.raises(ConfigError, match=r"'language_model\.lm_head\.weight' differs from"):
        load(tmp_path / "other")


def test_absent_sizes_take_the_defaults_of_the_class(tmp_path):
    """The published files give neither the vocabulary size nor the number of heads."""
    text = json.loads((FOLDER / "gemma3" / "config.json").read_text())
    del text["vocab_size"], text["num_attention_heads"]
    _write(tmp_path / "in", "4", text_config=text)
    with pytest.raises(ConfigError, match=r"has shape \[43, 16\], but config.json requires \[262208, 16\]"):
        load(tmp_path / "in")
