"""GGUF files give the parameters of the Hugging Face folder that they were made from; errors use the file's names."""

import dataclasses
import json
import shutil
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy
from huggingface_cases import FOLDER, TOLERANCE, difference, our_logits

gguf = pytest.importorskip("gguf")

from gguf_writing import BF16, F16, Q8_0, write_gguf  # noqa: E402

from diffusion_lm.core.errors import ConfigError  # noqa: E402
from diffusion_lm.interop import assemble  # noqa: E402
from diffusion_lm.interop.huggingface import load, save  # noqa: E402
from diffusion_lm.nn.rope import Llama3Rope  # noqa: E402
from diffusion_lm.nn.transformer import TransformerSpec  # noqa: E402

SAME = ("llama", "llama_yarn", "qwen3", "gpt2")
"""Fixtures whose parameters are equal bit for bit. Gemma's norms may lose a bit, as 1 is added and subtracted."""


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.gguf"


def _compare(a, b, check) -> None:
    def one(place, x, y):
        check(np.asarray(x), np.asarray(y), err_msg=jax.tree_util.keystr(place))

    jax.tree_util.tree_map_with_path(one, a, b)


def _error(path, **options) -> str:
    with pytest.raises(ConfigError) as caught:
        load(path, **options)
    return str(caught.value)


@pytest.mark.parametrize("name", SAME)
def test_the_parameters_are_those_of_the_folder(name, path):
    write_gguf(FOLDER / name, path)
    there, here = load(FOLDER / name), load(path)
    assert here.architecture == there.architecture
    assert here.specials == dataclasses.replace(there.specials, pad_id=None)
    assert here.family == there.family
    _compare(there.params, here.params, np.testing.assert_array_equal)


@pytest.mark.parametrize("name", [*SAME, "gemma2", "gemma3"])
def test_logits_are_those_of_transformers(name, path):
    golden = safetensors.numpy.load_file(FOLDER / name / "golden.safetensors")
    config = json.loads((FOLDER / name / "config.json").read_text())
    write_gguf(FOLDER / name, path)
    imported = load(path)
    if "gemma" in name:  # llama.cpp knows the scale of the released models only, which is that of the head's size
        assert imported.architecture.spec.attention_scale_size == config["head_dim"]
        spec = dataclasses.replace(imported.architecture.spec, attention_scale_size=config["query_pre_attn_scalar"])
        assert spec == load(FOLDER / name).architecture.spec
        imported = dataclasses.replace(imported, architecture=type(imported.architecture)(spec))
    ours = our_logits(imported, golden["ids"], golden["mask"])
    assert difference(ours, golden["logits"], golden["mask"]) < TOLERANCE


def test_biases_are_permuted_with_their_rows(tmp_path, path):
    """LLaMA with biases, and with LLaMA 3's RoPE, which the file holds as a tensor of factors."""
    shutil.copytree(FOLDER / "llama3_biases_tied", tmp_path / "folder")
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    scaling = Llama3Rope(8.0, 8192, low_freq_factor=1.0, high_freq_factor=4.0)
    config["rope_parameters"] |= {"rope_theta": 1e9, "original_max_position_embeddings": 8192}
    (tmp_path / "folder" / "config.json").write_text(json.dumps(config))
    size = config["hidden_size"] // config["num_attention_heads"]
    plain = 1e9 ** -(np.arange(0, size, 2) / size)
    factors = (plain / np.asarray(scaling.frequencies(size, 1e9))).astype(np.float32)
    write_gguf(tmp_path / "folder", path, add={"rope_freqs.weight": factors})
    there, here = load(tmp_path / "folder"), load(path)
    assert here.architecture == there.architecture
    assert here.architecture.spec.rope_scaling == scaling
    _compare(there.params, here.params, np.testing.assert_array_equal)
    write_gguf(tmp_path / "folder", path, add={"rope_freqs.weight": factors * np.asarray([2.0, 1.0], np.float32)})
    assert "tensor 'rope_freqs.weight' holds RoPE factors other than" in _error(path)


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A folder with rows that quantisation divides."""
    from diffusion_lm.architectures.single_stream import SingleStream

    folder = tmp_path_factory.mktemp("wide") / "folder"
    spec = TransformerSpec(
        vocab_size=40, num_layers=2, model_dim=64, num_heads=4, num_kv_heads=2, head_dim=16, mlp_dim=256, mlp="swiglu",
        position="rope", attention_scale="inverse_sqrt", tied_logit_scale=False, max_positions=32,
    )  # fmt: skip
    model = SingleStream(spec)
    save(folder, model, model.init(jax.random.key(0)), family="llama")
    return folder


@pytest.mark.parametrize(
    ("kind", "bound"), [(F16, 1e-3), (BF16, 8e-3), (Q8_0, 0.01), (gguf.GGMLQuantizationType.Q4_1, 0.08)]
)
def test_shorter_floats_and_quantised_tensors(kind, bound, wide, path, monkeypatch):
    """The error of each weight is below the largest weight of its block times the quantisation step."""
    monkeypatch.setattr(assemble, "SLICE_BYTES", 64 * 4 * 7)  # slices of 7 rows
    write_gguf(wide, path, kind)
    here = load(path)
    assert here.gguf.stored()[kind.name] == 2 * 7 + 1
    largest = here.report.largest_array
    assert largest <= here.report.peak_host <= 2 * largest

    def near(x, y, err_msg):
        assert np.abs(x - y).max() <= bound * np.abs(x).max(), err_msg

    _compare(load(wide).params, here.params, near)
    assert any(jax.tree.leaves(jax.tree.map(lambda x, y: bool((x != y).any()), load(wide).params, here.params)))


@pytest.mark.parametrize("kind", ["Q4_0", "Q5_0", "Q4_K", "Q6_K", "IQ4_XS"])
def test_every_quantisation_of_the_package_is_read_in_the_folders_order(kind, wide, path):
    """Random blocks: the rows are in the order of RoPE's halves, for every storage type."""
    stored = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[stored]
    shape = (64, 64) if 64 % block == 0 else (64, 256)
    name = "blk.1.attn_q.weight" if shape == (64, 64) else "blk.1.ffn_down.weight"
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (shape[0], shape[1] // block * size)).astype(np.uint8)
    # Scales are halves; random ones may be infinite.
    values = gguf.dequantize(blocks & 0x3B, stored)
    assert np.isfinite(values).all()
    write_gguf(wide, path, raw={name: (blocks & 0x3B, stored)})
    params = load(path).params["blocks"]
    if name.endswith("ffn_down.weight"):
        np.testing.assert_array_equal(params["mlp"]["down"][1], values.T)
        return
    for head in range(4):
        rows = values[16 * head : 16 * (head + 1)]
        apart = np.concatenate([rows[0::2], rows[1::2]])
        np.testing.assert_array_equal(params["attention"]["query"][1][:, head], apart.T)


def test_a_type_that_the_package_cannot_dequantise_is_refused(wide, path, monkeypatch):
    write_gguf(wide, path, Q8_0)

    def unable(*_):
        raise NotImplementedError

    monkeypatch.setattr(gguf, "dequantize", unable)
    message = _error(path)
    assert "tensor 'blk.0.attn_k.weight' is quantised as Q8_0, which the gguf package cannot dequantise" in message
    assert str(path) in message


def test_integer_tensors_are_refused(path):
    whole = np.ones(16, np.int8)
    write_gguf(FOLDER / "llama", path, raw={"output_norm.weight": (whole, gguf.GGMLQuantizationType.I8)})
    message = _error(path)
    assert "tensor 'output_norm.weight' does not hold floats" in message


@pytest.mark.parametrize(
    ("metadata", "complaint"),
    [
        (
            {"llama.attention.layer_norm_rms_epsilon": None},
            "the key 'llama.attention.layer_norm_rms_epsilon' is missing",
        ),
        ({"llama.expert_count": 8}, "mixture of experts"),
        ({"llama.rope.dimension_count": 2}, "llama.rope.dimension_count = 2 is not supported"),
        ({"llama.rope.scaling.type": "longrope"}, "rope_type = 'longrope'"),
        ({"llama.logit_scale": 0.5}, "llama.logit_scale = 0.5 is not supported"),
        ({"llama.attention.head_count_kv": [2, 1]}, "one number for all layers"),
        ({"llama.feed_forward_length": 25}, "'blk.0.ffn_gate.weight' has shape [24, 16], but its metadata requires"),
        ({"split.count": 3}, "is one of 3 parts"),
        ({"general.architecture": "qwen2moe"}, "general.architecture = 'qwen2moe' is a mixture of experts"),
        (
            {"general.architecture": "qwen"},
            "general.architecture = 'qwen' is not supported; did you mean qwen",
        ),
    ],
)
def test_metadata_that_this_network_cannot_have(metadata, complaint, path):
    write_gguf(FOLDER / "llama", path, metadata=metadata)
    message = _error(path)
    assert complaint in message
    assert str(path) in message


def test_missing_and_unknown_tensors_are_named_as_in_the_file(path):
    write_gguf(FOLDER / "llama", path, drop=("blk.1.attn_k.weight",))
    assert "1 tensors of a llama model are missing: blk.1.attn_k.weight" in _error(path)
    write_gguf(FOLDER / "llama", path, add={"blk.1.attn_sinks.weight": np.ones(4, np.float32)})
    message = _error(path)
    assert "1 tensors do not belong to the llama model of its metadata: blk.1.attn_sinks.weight" in message
    write_gguf(FOLDER / "llama", path, drop=("token_embd.weight",))
    assert "tensor 'token_embd.weight' is missing" in _error(path)


def test_a_file_that_is_cut_off(path):
    write_gguf(FOLDER / "llama", path)
    whole = path.read_bytes()
    for size in (0, 3, 40, 700):
        path.write_bytes(whole[:size])
        assert "model.gguf is cut off or damaged" in _error(path)
    path.write_bytes(whole[: len(whole) // 2])
    message = _error(path)
    assert "model.gguf is cut off or damaged: tensor 'blk." in message
    assert f"of {len(whole) // 2:,}" in message
    assert "there is no file" in _error(path.with_name("other.gguf"))


def test_a_folder_with_gguf_files_lists_them(path):
    write_gguf(FOLDER / "llama", path)
    assert f"but GGUF files: {path.name}" in _error(path.parent)


def test_the_package_is_named_where_it_is_missing(path, monkeypatch):
    write_gguf(FOLDER / "llama", path)
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert "pip install 'diffusion-lm[gguf]'" in _error(path)


def test_an_import_can_be_exported_for_transformers(wide, path, tmp_path):
    """A file of floats exports as the folder that it was made from."""
    write_gguf(wide, path)
    imported = load(path)
    save(tmp_path / "out", imported.architecture, imported.params, family="llama", config=imported.config)
    before, after = (safetensors.numpy.load_file(folder / "model.safetensors") for folder in (wide, tmp_path / "out"))
    assert set(before) == set(after)
    for name, tensor in before.items():
        np.testing.assert_array_equal(after[name], tensor)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
