"""T5X checkpoints give the same network as Hugging Face files with the same weights."""

import json
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy
from huggingface_cases import FOLDER
from t5_cases import GOLDEN, our_logits
from t5x_writer import LAYOUTS, renamed, write

from diffusion_lm.cli.main import main
from diffusion_lm.core.errors import ConfigError
from diffusion_lm.interop.huggingface import Specials, load

QUERY = "encoder.layers_0.attention.query.kernel"


def _tensors(name):
    return safetensors.numpy.load_file(FOLDER / name / "model.safetensors")


def _head_dim(name):
    return json.loads((FOLDER / name / "config.json").read_text())["d_kv"]


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    """The fixtures imported from Hugging Face files, with the constants of T5X's code."""
    found = {}
    for name in GOLDEN:
        folder = tmp_path_factory.mktemp(name)
        shutil.copytree(FOLDER / name, folder, dirs_exist_ok=True)
        values = json.loads((folder / "config.json").read_text())
        values |= {"relative_attention_max_distance": 128, "layer_norm_epsilon": 1e-6}
        (folder / "config.json").write_text(json.dumps(values))
        found[name] = load(folder)
    return found


def _equal(a, b) -> bool:
    return jax.tree.all(jax.tree.map(lambda x, y: np.array_equal(np.asarray(x), np.asarray(y)), a, b))


def _error(path) -> str:
    with pytest.raises(ConfigError) as caught:
        load(path)
    return str(caught.value)


@pytest.fixture
def unscanned():
    return renamed(_tensors("t5_1_1"), "unscanned", _head_dim("t5_1_1"))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "name", [name if name == "t5_1_1" else pytest.param(name, marks=pytest.mark.thorough) for name in GOLDEN]
)
def test_the_network_is_that_of_the_hugging_face_files(name, layout, references, tmp_path):
    folder = tmp_path / "checkpoint_1000"
    write(folder, renamed(_tensors(name), layout, _head_dim(name), own_biases=layout == "scalable_t5"))
    imported, reference = load(folder), references[name]
    assert imported.architecture == reference.architecture
    assert imported.report.missing == imported.report.ignored == ()
    assert imported.specials == Specials(0, 0, (1,))
    assert imported.causal
    assert _equal(imported.params, reference.params)
    arrays = safetensors.numpy.load_file(FOLDER / name / "golden.safetensors")
    logits = our_logits(imported, arrays)
    np.testing.assert_array_equal(logits, our_logits(reference, arrays))
    assert np.abs(logits).max() > 1


def test_arrays_may_be_in_the_index_and_in_16_bits(references, tmp_path, unscanned):
    inline = ("token_embedder.embedding", "encoder.encoder_norm.scale", QUERY)
    write(tmp_path / "inline", unscanned, inline=inline)
    assert not (tmp_path / "inline" / f"target.{QUERY}").exists()
    assert _equal(load(tmp_path / "inline").params, references["t5_1_1"].params)
    write(tmp_path / "half", unscanned, dtype="bfloat16")
    rounded = jax.tree.map(lambda x: np.asarray(x).astype("bfloat16").astype(np.float32), references["t5_1_1"].params)
    assert _equal(load(tmp_path / "half").params, rounded)


def test_large_tables_are_read_in_rows(references, tmp_path, unscanned, monkeypatch):
    from diffusion_lm.interop import assemble

    write(tmp_path / "t5x", unscanned)
    monkeypatch.setattr(assemble, "SLICE_BYTES", 200)
    assert _equal(load(tmp_path / "t5x").params, references["t5_1_1"].params)


@pytest.mark.parametrize(
    ("text", "mlp"),
    [
        ("network.T5Config.mlp_activations = ('gelu', 'linear')\n", "geglu"),
        ("network.T5Config:\n  emb_dim = 16\n  mlp_activations = ('silu', 'linear')\n", "swiglu"),
        ("network.T5Config.mlp_activations = \\\n    ['swish', 'linear']\n", "swiglu"),
        ("network.T5Config.emb_dim = 16\n", "geglu"),
    ],
)
def test_the_activation_is_read_from_the_gin_file_of_the_run(text, mlp, tmp_path, unscanned):
    write(tmp_path / "run" / "checkpoint_10", unscanned)
    (tmp_path / "run" / "config.gin").write_text(text)
    assert load(tmp_path / "run" / "checkpoint_10").architecture.spec.mlp == mlp


def test_an_activation_that_this_network_cannot_have(tmp_path, unscanned):
    write(tmp_path / "t5x", unscanned)
    (tmp_path / "t5x" / "config.gin").write_text("network.T5Config.mlp_activations = ('linear', 'gelu')\n")
    assert "config.gin: mlp_activations = ('linear', 'gelu') is not supported" in _error(tmp_path / "t5x")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layers_share_one_bias_where_all_of_them_are_equal(layout, tmp_path):
    """If one layer of one stack differs, each layer keeps its own bias, as after training with scanned layers."""
    arrays = renamed(_tensors("t5"), layout, _head_dim("t5"), own_biases=True)
    write(tmp_path / "equal", arrays)
    shared = load(tmp_path / "equal")
    assert not shared.architecture.spec.relative_per_layer
    name = [n for n in arrays if n.startswith("decoder.") and n.endswith("rel_embedding")][-1]
    arrays[name] = arrays[name].copy()
    last = (slice(None),) if layout == "unscanned" else (slice(None), -1)
    arrays[name][last] += 1
    write(tmp_path / "own", arrays)
    own = load(tmp_path / "own")
    assert own.architecture.spec.relative_per_layer
    table = np.asarray(shared.params["relative_bias"])
    found = np.asarray(own.params["blocks"]["attention"]["relative_bias"])
    np.testing.assert_array_equal(found, np.stack([table, table, table + 1]))
    encoder = np.asarray(own.params["encoder"]["blocks"]["attention"]["relative_bias"])
    np.testing.assert_array_equal(encoder, np.stack([np.asarray(shared.params["encoder"]["relative_bias"])] * 2))
    # Equal biases in each layer are the network with one.
    own.params["blocks"]["attention"]["relative_bias"] = jax.numpy.stack([table] * 3)
    arrays = safetensors.numpy.load_file(FOLDER / "t5" / "golden.safetensors")
    np.testing.assert_allclose(our_logits(own, arrays), our_logits(shared, arrays), atol=1e-5)


def test_an_array_is_missing(tmp_path, unscanned):
    write(tmp_path / "folder", unscanned)
    shutil.rmtree(tmp_path / "folder" / f"target.{QUERY}")
    message = _error(tmp_path / "folder")
    assert f"array '{QUERY}' is missing: checkpoint refers to the folder 'target.{QUERY}'" in message
    shutil.rmtree(tmp_path / "folder")
    del unscanned["decoder.layers_1.mlp.wo.kernel"]
    write(tmp_path / "tensor", unscanned)
    assert "1 tensors of a t5x model are missing: decoder.layers_1.mlp.wo.kernel" in _error(tmp_path / "tensor")
    del unscanned["encoder.relpos_bias.rel_embedding"]
    write(tmp_path / "sizes", unscanned)
    assert "tensor 'encoder.relpos_bias.rel_embedding' is missing; the sizes" in _error(tmp_path / "sizes")


def test_damaged_folders_name_the_array(tmp_path, unscanned):
    write(tmp_path / "t5x", unscanned)
    place = tmp_path / "t5x" / f"target.{QUERY}"
    chunk = next(path for path in place.iterdir() if not path.name.startswith("."))
    chunk.write_bytes(chunk.read_bytes()[:20])
    message = _error(tmp_path / "t5x")
    assert f"cannot read tensor '{QUERY}'" in message
    (place / ".zarray").write_text("{")
    assert f"cannot read target.{QUERY}" in _error(tmp_path / "t5x")


def test_tensors_of_another_network(tmp_path, unscanned):
    other = unscanned | {"encoder.layers_1.mlp.wo.kernel": np.zeros((23, 16), np.float32)}
    write(tmp_path / "shape", other)
    message = _error(tmp_path / "shape")
    assert (
        "'encoder.layers_1.mlp.wo.kernel' has shape [23, 16], but the rest of the checkpoint requires [24, 16]"
        in message
    )
    write(tmp_path / "left", unscanned | {"encoder.side.kernel": np.zeros((2, 2), np.float32)})
    assert "do not belong to the t5x model of the rest of the checkpoint: encoder.side.kernel" in _error(
        tmp_path / "left"
    )
    write(tmp_path / "heads", unscanned | {QUERY: np.zeros((16, 17), np.float32)})
    assert f"'{QUERY}' has 17 columns for the 3 heads" in _error(tmp_path / "heads")


def test_paths_outside_of_the_folder_are_refused(tmp_path, unscanned):
    write(tmp_path / "t5x", unscanned)
    index = tmp_path / "t5x" / "checkpoint"
    index.write_bytes(
        index.read_bytes().replace(b"target.decoder.decoder_norm.scale", b"../../../decoder_norm.scale......")
    )
    assert "array 'decoder.decoder_norm.scale' is missing" in _error(tmp_path / "t5x")


@pytest.mark.parametrize("content", [b"", b"model_checkpoint_path: 1", b"\x81\xa1a\x01", b"\xc1"])
def test_a_file_that_is_not_an_index(content, tmp_path):
    (tmp_path / "checkpoint").write_bytes(content)
    assert "checkpoint is not an index of a T5X checkpoint" in _error(tmp_path)


def test_a_t5x_run_directory_lists_its_checkpoints(tmp_path, unscanned):
    for step in (1000, 2000):
        write(tmp_path / "run" / f"checkpoint_{step}", unscanned)
    message = _error(tmp_path / "run")
    assert "there is no config.json in" in message
    assert "but T5X checkpoints: checkpoint_1000, checkpoint_2000" in message


def test_import_and_export_of_a_t5x_checkpoint(tmp_path, unscanned):
    write(tmp_path / "checkpoint_7", unscanned)
    assert main(["import", str(tmp_path / "checkpoint_7"), "--workdir", str(tmp_path / "run")]) == 0
    assert main(["export", str(tmp_path / "run"), "--to", str(tmp_path / "out")]) == 0
    before, after = _tensors("t5_1_1"), safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    assert set(before) == set(after)
    for name, tensor in before.items():
        np.testing.assert_array_equal(after[name], tensor, err_msg=name)
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (values["model_type"], values["feed_forward_proj"]) == ("t5", "gated-gelu")
