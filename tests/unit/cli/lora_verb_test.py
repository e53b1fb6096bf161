"""Trains adapters on another run, then evaluates, decodes, explains and merges them, at nano scale."""

import contextlib
import io
import json
import re

import numpy as np
import pytest
import sentencepiece

from diffusion_lm.cli.main import main
from diffusion_lm.core.rng import example_number
from diffusion_lm.data.schema import Manifest, Record
from diffusion_lm.data.store import split_folder, write_records
from diffusion_lm.data.vocabulary import Vocabulary
from diffusion_lm.training.checkpoint import restore_params

CONFIG = """
from __gin__ import dynamic_registration
from diffusion_lm.data import grain_source
from diffusion_lm.nn import transformer
include '%s'
include 'models/sizes/nano.gin'
VOCAB_SIZE = 64
TASK = 'echo'
INPUTS_LENGTH = 6
TARGET_LENGTH = 8
BATCH_SIZE = 4
TRAIN_STEPS = 2
transformer.TransformerSpec.num_layers = 1
transformer.TransformerSpec.vocab_multiple = 8
grain_source.GrainSource.root = 'data'
"""
FILES = {
    "base": CONFIG % "runs/train.gin",
    "adapted": CONFIG % "runs/lora.gin" + "INITIAL = 'base'\nLORA_RANK = 2\n",
    "included": CONFIG % "runs/finetune.gin" + "include 'models/lora.gin'\nINITIAL = 'base'\n",
    "merged": (CONFIG % "runs/finetune.gin").replace("TRAIN_STEPS = 2", "TRAIN_STEPS = 0") + "INITIAL = 'adapted'\n",
}
WORDS = ("one", "two", "three", "four")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The task `echo`, a run `base` and adapters for it in `adapted`."""
    folder, stream = tmp_path_factory.mktemp("lora"), io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(WORDS * 20), model_writer=stream, vocab_size=64, hard_vocab_limit=False,
        model_type="bpe", pad_id=0, eos_id=1, bos_id=2, unk_id=3, user_defined_symbols=["<mask>"], minloglevel=2,
    )  # fmt: skip
    vocabulary = Vocabulary(stream.getvalue())
    for split in ("train", "validation"):
        records = [
            Record(
                vocabulary.encode(word), vocabulary.encode(word), example_number(f"{split}/{word}"), word, word, word
            )
            for word in WORDS
        ]
        where = split_folder("echo", split, folder / "data")
        write_records(where, records, Manifest("echo", split, vocabulary.specials), vocabulary=vocabulary)
    for name, text in FILES.items():
        (folder / f"{name}.gin").write_text(text.replace("VOCAB_SIZE = 64", f"VOCAB_SIZE = {vocabulary.size}"))
    with contextlib.chdir(folder):
        assert main(["train", "--gin_file", "base.gin", "--workdir", "base"]) == 0
        assert main(["train", "--gin_file", "adapted.gin", "--workdir", "adapted", "--json", "adapted.json"]) == 0
    return folder


@pytest.fixture(autouse=True)
def here(folder, monkeypatch):
    monkeypatch.chdir(folder)


def test_the_folder_evaluates_as_it_was_trained_and_decodes(folder, capsys):
    trained = json.loads((folder / "adapted.json").read_text())["metrics"]
    assert main(["evaluate", "--workdir", "adapted", "--json", "evaluated.json"]) == 0
    values = json.loads((folder / "evaluated.json").read_text())["evaluations"]["bound"]["values"]
    assert values == {name: pytest.approx(trained[f"bound/{name}"], abs=1e-6) for name in values}
    capsys.readouterr()
    flags = ["--task", "echo", "--sampler", "gin/samplers/greedy.gin"]
    assert main(["decode", "--workdir", "adapted", *flags]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(WORDS)
    assert main(["train", "--gin_file", "merged.gin", "--workdir", "merged"]) == 0
    assert "adapters merged" in "".join(capsys.readouterr())
    assert main(["decode", "--workdir", "merged", *flags]) == 0
    base, adapted, merged = (restore_params(name) for name in ("base", "adapted", "merged"))
    np.testing.assert_array_equal(adapted["blocks"]["mlp"]["up"], base["blocks"]["mlp"]["up"])
    assert set(merged) == set(base)
    assert (np.asarray(merged["blocks"]["mlp"]["up"]) != np.asarray(base["blocks"]["mlp"]["up"])).any()


@pytest.mark.parametrize(
    ("model", "run", "complaint"),
    [
        ("base.gin", "adapted", "array lora/.* is not an array of the model"),
        ("adapted.gin", "base", "array lora/.* is missing"),
        ("included.gin", "adapted", "array lora/.* has another shape"),
    ],
)
def test_T58_adapter_not_loaded_from_a_folder(model, run, complaint, capsys):
    """A configuration whose network does not match the checkpoint is an error; adapters are never dropped silently."""
    assert main(["evaluate", "--gin_file", model, "--workdir", run]) == 2
    assert re.search(complaint, capsys.readouterr().err)


def test_explain_counts_what_is_trained(folder, capsys):
    plain = _explained("base.gin", folder)
    adapted = _explained("adapted.gin", folder)
    out = capsys.readouterr().out
    (trained,) = {adapted["trained_parameters"]}
    sizes = restore_params("adapted")["lora"]
    expected = sum(leaf.size for pair in _pairs(sizes) for leaf in pair.values())
    assert trained == expected
    assert f"{trained:,}" in out
    assert "the rest is frozen" in out
    assert plain["trained_parameters"] == plain["total_parameters"]
    assert adapted["total_parameters"] == plain["total_parameters"] + trained + 1
    assert adapted["memory"]["optimizer"] < plain["memory"]["optimizer"] / 3
    assert adapted["memory"]["gradients"] == 4 * trained


def _explained(name, folder):
    assert main(["explain", "--gin_file", name, "--json", "explained.json"]) == 0
    return json.loads((folder / "explained.json").read_text())["runs"]["run"]


def _pairs(tree):
    for node in tree.values():
        if isinstance(node, dict):
            if "a" in node:
                yield node
            else:
                yield from _pairs(node)
