"""`import` and `export` of an encoder-decoder: the run folder binds the network that the files hold."""

import json

import jax
import numpy as np
import pytest
import safetensors.numpy

from diffusion_lm.architectures.encoder_decoder import EncoderDecoder
from diffusion_lm.cli import config
from diffusion_lm.cli.main import main
from diffusion_lm.interop.huggingface import load, save
from diffusion_lm.nn.transformer import TransformerSpec
from diffusion_lm.training.checkpoint import restore_params

SPEC = TransformerSpec(
    vocab_size=37,
    num_layers=1,
    encoder_layers=2,
    model_dim=8,
    num_heads=2,
    head_dim=3,
    mlp_dim=12,
    relative_buckets=8,
    relative_max_distance=9,
    relative_bidirectional=False,
    tied_embeddings=False,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("import")
    model = EncoderDecoder(SPEC)
    tokens = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
    assert save(folder / "checkpoint", model, model.init(jax.random.key(0)), config=tokens) == "t5"
    assert main(["import", str(folder / "checkpoint"), "--workdir", str(folder / "imported")]) == 0
    return folder


def test_the_run_folder_binds_the_network(folder):
    source = load(folder / "checkpoint")
    assert source.architecture.spec.relative_bidirectional is False
    text = (folder / "imported" / "model.gin").read_text()
    assert "MODEL = @encoder_decoder.EncoderDecoder()" in text
    assert "Its special tokens: pad_id 0, bos_id 0, eos_ids (1,)" in text
    built = config.load([str(folder / "imported" / "model.gin")], macros=["MODEL"]).build_macro("MODEL")
    assert built == source.architecture
    jax.tree.map(np.testing.assert_array_equal, restore_params(folder / "imported"), source.params)


def test_what_is_imported_can_be_exported(folder):
    assert main(["export", str(folder / "imported"), "--to", str(folder / "exported")]) == 0
    before, after = (
        safetensors.numpy.load_file(folder / name / "model.safetensors") for name in ("checkpoint", "exported")
    )
    assert set(before) == set(after)
    for name, tensor in before.items():
        np.testing.assert_array_equal(tensor, after[name], err_msg=name)
    values = json.loads((folder / "exported" / "config.json").read_text())
    assert values["architectures"] == ["T5ForConditionalGeneration"]
    assert values["decoder_start_token_id"] == 0


def test_the_families_are_listed(tmp_path):
    assert main(["list", "families", "--json", str(tmp_path / "families.json")]) == 0
    listed = {one["name"]: one for one in json.loads((tmp_path / "families.json").read_text())}
    assert listed["t5"]["model_types"] == ["t5"]
    assert listed["mt5"]["model_types"] == ["mt5"]
