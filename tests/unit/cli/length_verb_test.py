"""Trains a length head on a run and decodes with the length beam and the oracle length, at nano scale."""

import contextlib
import io
import json

import jax
import numpy as np
import pytest
import sentencepiece

from diffusion_lm.cli.main import main
from diffusion_lm.core.rng import example_number
from diffusion_lm.data.schema import Manifest, Record
from diffusion_lm.data.store import split_folder, write_records
from diffusion_lm.data.vocabulary import Vocabulary
from diffusion_lm.training.checkpoint import restore_params

MODEL = """
from __gin__ import dynamic_registration
from diffusion_lm.data import grain_source
from diffusion_lm.nn import transformer
include '%s'
include 'models/sizes/nano.gin'
VOCAB_SIZE = 64
TASK = 'echo'
INPUTS_LENGTH = 6
TARGET_LENGTH = 8
BATCH_SIZE = 16
transformer.TransformerSpec.num_layers = 1
transformer.TransformerSpec.vocab_multiple = 8
grain_source.GrainSource.root = 'data'
"""
BASE = MODEL % "runs/train.gin" + "include 'objectives/rdm.gin'\nTRAIN_STEPS = 2\n"
HEAD = (
    MODEL % "runs/length_head.gin"
    + "INITIAL = 'base'\nTRAIN_STEPS = 80\nWARMUP_STEPS = 5\nPEAK_LEARNING_RATE = 2e-2\nLENGTH_CLASSES = 9\n"
)
ORACLE = """
from __gin__ import dynamic_registration
from diffusion_lm.data import converters
from diffusion_lm.data import iterator
from diffusion_lm.data import target_window
from diffusion_lm.evaluation import generation
from diffusion_lm.training import run
include 'base.gin'
include 'samplers/oracle_length.gin'
run.TrainRun.evaluations = (@generation.GenerationEvaluation(),)
generation.GenerationEvaluation:
  task = @generation.GenerationTask()
  sampler = %SAMPLER
generation.GenerationTask:
  name = 'echo'
  data = @validation/iterator.DataPipeline()
  metric = 'exact_match'
  limit = 4
  batch_size = 4
TARGET_WINDOW = @target_window.OracleLength()
"""
WORDS = ("one", "two", "three", "four")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The task `echo` (a number word and that many "x"), a masked run `base` and its length head in `head`."""
    folder, stream = tmp_path_factory.mktemp("length"), io.BytesIO()
    lines = [f"{word} {'x ' * count}" for count, word in enumerate(WORDS, 1)] * 20
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=stream, vocab_size=64, hard_vocab_limit=False, model_type="bpe",
        pad_id=0, eos_id=1, bos_id=2, unk_id=3, user_defined_symbols=["<mask>"], minloglevel=2,
    )  # fmt: skip
    vocabulary = Vocabulary(stream.getvalue())
    for split in ("train", "validation"):
        records = [
            Record(
                vocabulary.encode(word),
                vocabulary.encode(" ".join("x" * count)),
                example_number(f"echo/{split}/{count}"),
                word,
                " ".join("x" * count),
                " ".join("x" * count),
            )
            for count, word in enumerate(WORDS, 1)
        ]
        write_records(
            split_folder("echo", split, folder / "data"),
            records,
            Manifest("echo", split, vocabulary.specials),
            vocabulary=vocabulary,
        )
    for name, text in (("base", BASE), ("head", HEAD), ("oracle", ORACLE)):
        (folder / f"{name}.gin").write_text(text.replace("VOCAB_SIZE = 64", f"VOCAB_SIZE = {vocabulary.size}"))
    with contextlib.chdir(folder):
        assert main(["train", "--gin_file", "base.gin", "--workdir", "base"]) == 0
        assert main(["train", "--gin_file", "head.gin", "--workdir", "head", "--json", "head.json"]) == 0
    return folder


@pytest.fixture(autouse=True)
def here(folder, monkeypatch):
    monkeypatch.chdir(folder)


def lines_of(capsys, *argv):
    capsys.readouterr()
    assert main(list(argv)) == 0
    captured = capsys.readouterr()
    return [json.loads(line) for line in captured.out.splitlines()], captured.err


def test_the_head_learns_lengths_and_the_network_is_unchanged(folder):
    metrics = json.loads((folder / "head.json").read_text())["metrics"]
    assert metrics["bound/length_accuracy"] == 1.0
    assert metrics["bound/length_error"] == 0.0
    before, after = restore_params(folder / "base"), restore_params(folder / "head")
    assert set(after) == {*before, "length_head"}
    jax.tree.map(np.testing.assert_array_equal, before, {part: after[part] for part in before})


def test_the_length_beam_decodes_texts_of_the_predicted_length(capsys):
    flags = ["decode", "--workdir", "head", "--task", "echo", "--sampler", "gin/samplers/length_beam.gin"]
    lines, _ = lines_of(capsys, *flags, "--gin.LengthBeam.beam=1", "--gin.MaskedSampler.steps=2")
    assert [line["tokens"] for line in lines] == [1, 2, 3, 4]
    assert "oracle" not in lines[0]
    assert lines[0]["forward_passes"] in (2, 3)


def test_a_network_without_a_head_is_an_error(capsys):
    flags = ["--task", "echo", "--sampler", "gin/samplers/length_beam.gin"]
    assert main(["decode", "--workdir", "base", *flags]) == 2
    assert "the model has no length head" in capsys.readouterr().err


def test_an_oracle_is_named_in_every_result(folder, capsys):
    """In completions, table, JSON and training log; prompts without a reference are an error."""
    files = ["--gin_file", "oracle.gin"]
    lines, err = lines_of(capsys, "decode", "--workdir", "base", *files)
    assert [(line["tokens"], line["oracle"]) for line in lines] == [
        (1, "length"),
        (2, "length"),
        (3, "length"),
        (4, "length"),
    ]
    assert "given the oracle length" in err
    assert main(["evaluate", "--workdir", "base", *files, "--json", "oracle.json"]) == 0
    assert "decode/echo/oracle_length" in capsys.readouterr().out
    (result,) = json.loads((folder / "oracle.json").read_text())["evaluations"].values()
    assert result["conditions"]["oracle"] == "length"
    (folder / "prompts.txt").write_text("one\n")
    assert main(["decode", "--workdir", "base", *files, "--input", "prompts.txt"]) == 2
    assert "OracleLength needs the length of a reference" in capsys.readouterr().err


def test_packed_rows_are_an_error(capsys):
    flags = ["train", "--gin_file", "head.gin", "--workdir", "packed", "--gin.train/DataPipeline.pack=True"]
    assert main(flags) == 2
    assert "needs one example per row" in capsys.readouterr().err
