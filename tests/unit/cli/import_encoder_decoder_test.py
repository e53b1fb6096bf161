"""`import` and `export` of an encoder-decoder: the run directory binds the network of the checkpoint."""

import io
import json

import jax
import numpy as np
import pytest
import safetensors.numpy
import sentencepiece

from diffusion_lm.architectures.encoder_decoder import EncoderDecoder
from diffusion_lm.cli import config
from diffusion_lm.cli.main import main
from diffusion_lm.core.rng import example_number
from diffusion_lm.data.schema import Manifest, Record
from diffusion_lm.data.store import split_folder, write_records
from diffusion_lm.data.vocabulary import Vocabulary
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

RUN = """
from __gin__ import dynamic_registration
from diffusion_lm.data import converters
from diffusion_lm.data import grain_source
from diffusion_lm.data import iterator
from diffusion_lm.training import run

include 'FOLDER/imported/model.gin'
include 'objectives/autoregressive.gin'

run.TrainRun:
  model = %MODEL
  objective = %OBJECTIVE
  data = @iterator.DataPipeline()
  steps = 1
  batch_size = 4
  initial = 'FOLDER/imported'
iterator.DataPipeline:
  sources = (@grain_source.GrainSource(),)
  converter = @converters.EncoderDecoderConverter()
grain_source.GrainSource.task = 'toy'
grain_source.GrainSource.root = 'FOLDER/data'
converters.EncoderDecoderConverter:
  inputs_length = 12
  target_length = 8
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("import")
    model = EncoderDecoder(SPEC)
    tokens = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
    assert save(folder / "checkpoint", model, model.init(jax.random.key(0)), config=tokens) == "t5"
    assert main(["import", str(folder / "checkpoint"), "--workdir", str(folder / "imported")]) == 0
    return folder


def test_the_run_directory_binds_the_network(folder):
    source = load(folder / "checkpoint")
    assert source.architecture.spec.relative_bidirectional is False
    text = (folder / "imported" / "model.gin").read_text()
    assert "MODEL = @encoder_decoder.EncoderDecoder()" in text
    assert "Its special tokens: pad_id 0, bos_id 0, eos_ids (1,)" in text
    built = config.load([str(folder / "imported" / "model.gin")], macros=["MODEL"]).build_macro("MODEL")
    assert built == source.architecture
    jax.tree.map(np.testing.assert_array_equal, restore_params(folder / "imported"), source.params)


def test_an_import_can_be_exported(folder):
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


def test_a_run_starts_from_it_with_a_vocabulary_of_its_kind(folder):
    """T5's vocabulary has no BOS: the decoder starts with padding (`decoder_start_token_id`)."""
    stream, lines = io.BytesIO(), [f"{number} plus {number}" for number in range(10, 40)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=stream, vocab_size=37, hard_vocab_limit=True, model_type="bpe",
        pad_id=0, eos_id=1, bos_id=-1, unk_id=2, minloglevel=2, character_coverage=1.0,
    )  # fmt: skip
    vocabulary = Vocabulary(stream.getvalue())
    read = load(folder / "checkpoint").specials
    specials = vocabulary.specials
    assert (specials.pad_id, specials.bos_id, (specials.eos_id,)) == (read.pad_id, read.bos_id, read.eos_ids)
    assert vocabulary.size == SPEC.vocab_size
    records = [
        Record(vocabulary.encode(text), vocabulary.encode(text[:2]), example_number(f"toy/{text}"), text, text, text)
        for text in lines[:8]
    ]
    manifest = Manifest("toy", "train", specials)
    write_records(split_folder("toy", "train", folder / "data"), records, manifest, vocabulary=vocabulary)
    (folder / "run.gin").write_text(RUN.replace("FOLDER", str(folder)))
    arguments = ["train", "--gin_file", str(folder / "run.gin"), "--workdir", str(folder / "tuned")]
    assert main([*arguments, "--json", str(folder / "train.json")]) == 0
    result = json.loads((folder / "train.json").read_text())
    assert " 29 arrays mapped, 0 resized, 0 added, 0 dropped" in result["initial"]
    before, after = restore_params(folder / "imported"), restore_params(folder / "tuned")
    change = max(jax.tree.leaves(jax.tree.map(lambda a, b: float(abs(a - b).max()), before, after)))
    assert 0 < change < 0.1
    assert main(["export", str(folder / "tuned"), "--to", str(folder / "tuned_t5")]) == 0
    assert load(folder / "tuned_t5").family == "t5"


def test_the_families_are_listed(tmp_path):
    assert main(["list", "families", "--json", str(tmp_path / "families.json")]) == 0
    listed = {one["name"]: one for one in json.loads((tmp_path / "families.json").read_text())}
    assert listed["t5"]["model_types"] == ["t5"]
    assert listed["mt5"]["model_types"] == ["mt5"]
