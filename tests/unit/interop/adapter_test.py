"""Adapters are merged as W + s B A, computed here in float64; what cannot be merged is refused by name."""

import json
import math
import shutil

import numpy as np
import pytest
import safetensors.numpy
from diffusion_cases import FOLDER as DIFFUSION
from huggingface_cases import FOLDER

from diffusion_lm.cli.main import main
from diffusion_lm.core.errors import ConfigError
from diffusion_lm.interop import assemble
from diffusion_lm.interop.huggingface import load

LORA = {"peft_type": "LORA", "r": 3, "lora_alpha": 5, "base_model_name_or_path": "some/base", "bias": "none"}
ROOT = "base_model.model."


def _random(*shape):
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


class Case:
    """A copy of a fixture, its tensors, and an adapter."""

    def __init__(self, tmp_path, name, root=FOLDER):
        self.path = tmp_path / "in"
        shutil.copytree(root / name, self.path, ignore=shutil.ignore_patterns("golden*"))
        self.base = safetensors.numpy.load_file(self.path / "model.safetensors")
        self.adapter = {}

    def lora(self, module, rank=3, conv=False):
        """Adds the matrices of a module and returns B A in float64, in the axis order of the tensor."""
        rows, columns = self.base[f"{module}.weight"].shape
        into, out = (rows, columns) if conv else (columns, rows)
        down, up = _random(rank, into), _random(out, rank)
        self.adapter |= {f"{ROOT}{module}.lora_A.weight": down, f"{ROOT}{module}.lora_B.weight": up}
        change = up.astype(np.float64) @ down.astype(np.float64)
        return change.T if conv else change

    def save(self, **config):
        safetensors.numpy.save_file(self.adapter, self.path / "adapter_model.safetensors")
        (self.path / "adapter_config.json").write_text(json.dumps(LORA | config))

    def check(self, changed):
        """The import equals that of a base in which these tensors replace the original ones."""
        merged = self.path.parent / "merged"
        shutil.copytree(self.path, merged, ignore=shutil.ignore_patterns("adapter*"))
        tensors = self.base | {name: value.astype(np.float32) for name, value in changed.items()}
        safetensors.numpy.save_file(tensors, merged / "model.safetensors")
        wanted, found, plain = load(merged), load(self.path), load(_without(self.path))
        flat, other, before = (_flat(one.params) for one in (wanted, found, plain))
        for name, array in flat.items():
            np.testing.assert_allclose(other[name], array, rtol=2e-6, atol=2e-6, err_msg=name)
        assert any(np.abs(flat[name] - before[name]).max() > 0.1 for name in flat)
        assert found.report.adapted == tuple(sorted(changed))
        assert found.report.adapter.endswith("of the base 'some/base'")


def _without(path):
    plain = path.with_name("plain")
    shutil.copytree(path, plain, ignore=shutil.ignore_patterns("adapter*"))
    return plain


def _flat(tree, place=""):
    if not isinstance(tree, dict):
        return {place: np.asarray(tree)}
    return {name: leaf for key, value in tree.items() for name, leaf in _flat(value, f"{place}/{key}").items()}


def test_rank_and_alpha_patterns(tmp_path, monkeypatch):
    """The embedding is read in slices of rows."""
    monkeypatch.setattr(assemble, "SLICE_BYTES", 16 * 4 * 5)
    case = Case(tmp_path, "llama")
    layer = "model.layers.1."
    query, down = case.lora(layer + "self_attn.q_proj", 2), case.lora(layer + "mlp.down_proj")
    head = case.lora("lm_head")
    words = case.base["model.embed_tokens.weight"]
    a, b = _random(3, words.shape[0]), _random(words.shape[1], 3)
    name = f"{ROOT}model.embed_tokens.lora_embedding_"
    case.adapter |= {f"{name}A": a, f"{name}B": b}
    case.save(rank_pattern={"q_proj": 2}, alpha_pattern={r"layers\.1\.mlp\.down_proj": 7, "own_proj": 11})
    case.check(
        {
            layer + "self_attn.q_proj.weight": case.base[layer + "self_attn.q_proj.weight"] + 5 / 2 * query,
            layer + "mlp.down_proj.weight": case.base[layer + "mlp.down_proj.weight"] + 7 / 3 * down,
            "lm_head.weight": case.base["lm_head.weight"] + 5 / 3 * head,
            "model.embed_tokens.weight": words + 5 / 3 * (b.astype(np.float64) @ a).T,
        }
    )


def test_conv1d_of_gpt2_is_transposed_whatever_fan_in_fan_out_is(tmp_path):
    """`attn.c_proj` is square, so its shape does not show the order. With rank-stabilised scales."""
    case = Case(tmp_path, "gpt2")
    names = [f"transformer.h.0.{module}" for module in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")]
    changes = {f"{name}.weight": case.lora(name, conv=True) for name in names}
    case.save(use_rslora=True, fan_in_fan_out=False)
    case.check({name: case.base[name] + 5 / math.sqrt(3) * change for name, change in changes.items()})


def test_modules_to_save_and_biases_replace_those_of_the_base(tmp_path):
    case = Case(tmp_path, "gpt2")
    change = case.lora("transformer.h.1.mlp.c_fc", conv=True)
    norm, bias, other = _random(16), _random(64), _random(48)
    case.adapter |= {
        f"{ROOT}transformer.ln_f.modules_to_save.default.weight": norm,
        f"{ROOT}transformer.h.1.mlp.c_fc.base_layer.bias": bias,
        f"{ROOT}transformer.h.0.attn.c_attn.bias": other,
    }
    case.save(bias="all", modules_to_save=["ln_f"])
    name = "transformer.h.1.mlp.c_fc.weight"
    case.check(
        {
            name: case.base[name] + 5 / 3 * change,
            "transformer.ln_f.weight": norm,
            "transformer.h.1.mlp.c_fc.bias": bias,
            "transformer.h.0.attn.c_attn.bias": other,
        }
    )


def test_a_diffusion_model(tmp_path):
    case = Case(tmp_path, "llada", DIFFUSION)
    name = next(name for name in case.base if name.endswith("blocks.0.q_proj.weight")).removesuffix(".weight")
    change = case.lora(name)
    case.save()
    case.check({f"{name}.weight": case.base[f"{name}.weight"] + 5 / 3 * change})


def test_a_model_that_was_saved_without_the_prefix_of_its_names(tmp_path):
    """The adapter was trained on the model with its head, which has the prefix."""
    case = Case(tmp_path, "gpt2")
    case.base = {name.removeprefix("transformer."): tensor for name, tensor in case.base.items()}
    safetensors.numpy.save_file(case.base, case.path / "model.safetensors")
    change = case.lora("h.0.attn.c_proj", conv=True)
    case.adapter = {name.replace(ROOT, f"{ROOT}transformer."): tensor for name, tensor in case.adapter.items()}
    case.save()
    case.check({"h.0.attn.c_proj.weight": case.base["h.0.attn.c_proj.weight"] + 5 / 3 * change})


def _refusal(case, **config):
    case.save(**config)
    with pytest.raises(ConfigError) as caught:
        load(case.path)
    return str(caught.value)


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        ({"peft_type": "IA3"}, "peft_type = 'IA3'"),
        ({"peft_type": None}, "peft_type = None"),
        ({"use_dora": True}, "use_dora = True"),
        ({"lora_bias": True}, "lora_bias = True"),
        ({"layer_replication": [[0, 1]]}, "layer_replication = [[0, 1]]"),
        ({"target_parameters": ["a"]}, "target_parameters = ['a']"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices = [1]"),
        ({"something_new": 3}, "something_new = 3"),
        ({"init_lora_weights": "pissa_niter_4"}, "which also changes the base weights"),
        ({"r": None}, "the key 'r' is missing"),
        ({"r": 2}, "and rank 2 do not fit"),
        ({"r": "3"}, "r = '3', which is not a whole number above 0"),
        ({"lora_alpha": "x"}, "lora_alpha = 'x'"),
        ({"rank_pattern": {"(": 2}}, "which is not a pattern"),
        ({"rank_pattern": [1]}, "rank_pattern = [1]"),
    ],
)
def test_what_is_not_a_plain_lora_is_refused_by_name(config, complaint, tmp_path):
    case = Case(tmp_path, "llama")
    case.lora("model.layers.0.self_attn.q_proj")
    assert complaint in _refusal(case, **config)


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("model.layers.0.self_attn.q_proj.lora_magnitude_vector", "lora_magnitude_vector"),
        ("model.layers.0.self_attn.o_proj.lora_A.weight", "one of the two matrices of model.layers.0.self_attn.o_proj"),
        ("model.layers.7.self_attn.o_proj.lora_A.weight", "which the checkpoint does not have"),
        ("score.weight", "'score.weight', which the checkpoint does not have"),
    ],
)
def test_tensors_that_are_not_of_a_lora_are_refused(name, complaint, tmp_path):
    case = Case(tmp_path, "llama")
    case.lora("model.layers.0.self_attn.q_proj")
    case.adapter[ROOT + name] = _random(3, 16)
    assert complaint in _refusal(case)


def test_one_end_of_tied_embeddings_cannot_be_trained_alone(tmp_path):
    case = Case(tmp_path, "gpt2")
    words = case.base["transformer.wte.weight"].shape
    name = f"{ROOT}transformer.wte.lora_embedding_"
    case.adapter |= {f"{name}A": _random(3, words[0]), f"{name}B": _random(words[1], 3)}
    assert "which is tied" in _refusal(case)


def test_an_adapter_with_a_missing_file_is_refused(tmp_path):
    case = Case(tmp_path, "llama")
    case.lora("model.layers.0.self_attn.q_proj")
    case.save()
    (case.path / "adapter_config.json").rename(case.path / "kept")
    with pytest.raises(ConfigError, match=r"adapter_config\.json is missing"):
        load(case.path)
    (case.path / "kept").rename(case.path / "adapter_config.json")
    (case.path / "adapter_model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"adapter_model\.safetensors is missing"):
        load(case.path)


@pytest.mark.parametrize("without", [["config.json", "model.safetensors"], ["model.safetensors"]])
def test_a_folder_with_only_an_adapter_names_the_base_model(without, tmp_path, capsys):
    case = Case(tmp_path, "llama")
    case.lora("model.layers.0.self_attn.q_proj")
    case.save()
    for name in without:
        (case.path / name).unlink()
    assert main(["import", str(case.path), "--workdir", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert "holds an adapter without its base model, which is 'some/base'" in said
    assert "Download the base model" in said


def test_import_prints_the_merged_adapter_and_unread_files(tmp_path, capsys):
    case = Case(tmp_path, "llama")
    case.lora("model.layers.0.self_attn.q_proj")
    case.save()
    (case.path / "training_args.bin").write_bytes(b"x")
    assert main(["import", str(case.path), "--workdir", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    assert "LoRA on 1 tensors, of the base 'some/base'" in said
    assert "training_args.bin" in said
    report = json.loads((tmp_path / "run" / "import.json").read_text())["report"]
    assert report["adapted"] == ["model.layers.0.self_attn.q_proj.weight"]
    assert report["unread_files"] == ["training_args.bin"]
    assert main(["export", str(tmp_path / "run"), "--to", str(tmp_path / "out")]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "An adapter was merged into the weights: LoRA on 1 tensors, of the base 'some/base'." in card
