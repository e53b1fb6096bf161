"""Fine-tunes with a pruned vocabulary and returns to the full one, at nano scale."""

import contextlib
import io
import json
import shutil

import numpy as np
import pytest
import sentencepiece

from diffusion_lm.cli.main import main
from diffusion_lm.core.rng import example_number
from diffusion_lm.data.schema import Manifest, Record
from diffusion_lm.data.store import split_folder, write_records
from diffusion_lm.data.vocabulary import Vocabulary
from diffusion_lm.data.vocabulary_map import read_map
from diffusion_lm.training.checkpoint import restore_params

CONFIG = """
from __gin__ import dynamic_registration
from diffusion_lm.data import grain_source
from diffusion_lm.nn import transformer
include 'runs/%s.gin'
include 'models/sizes/nano.gin'
VOCAB_SIZE = %d
TASK = 'echo'
INPUTS_LENGTH = 6
TARGET_LENGTH = 8
BATCH_SIZE = 8
TRAIN_STEPS = %d
transformer.TransformerSpec.num_layers = 1
transformer.TransformerSpec.vocab_multiple = 8
grain_source.GrainSource.root = 'data'
"""
TRAIN = [("ef", "effe"), ("fe", "feef"), ("efef", "ff")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Runs `base` (all tokens), `pruned` (from it, no step), `tuned` (from that, two steps) and their task `echo`."""
    folder, stream = tmp_path_factory.mktemp("pruned"), io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["ab ba cd dc ef fe"] * 50), model_writer=stream, vocab_size=64, hard_vocab_limit=False,
        model_type="char", pad_id=0, eos_id=1, bos_id=2, unk_id=3, user_defined_symbols=["<mask>"], minloglevel=2,
    )  # fmt: skip
    vocabulary = Vocabulary(stream.getvalue())
    for split, pairs in (("train", TRAIN), ("validation", [("ef", "af"), ("fe", "ef")])):
        records = [
            Record(vocabulary.encode(a), vocabulary.encode(b), example_number(f"echo/{split}/{number}"), a, b, b)
            for number, (a, b) in enumerate(pairs)
        ]
        path = split_folder("echo", split, folder / "data")
        write_records(path, records, Manifest("echo", split, vocabulary.specials), vocabulary=vocabulary)
    for name, run, size, steps, initial in (
        ("base", "train", vocabulary.size, 1, None),
        ("pruned", "pruned_vocabulary", 8, 0, "base"),
        ("tuned", "pruned_vocabulary", 8, 2, "pruned"),
        ("restored", "finetune", vocabulary.size, 0, "tuned"),
    ):
        text = CONFIG % (run, size, steps) + (f"INITIAL = '{initial}'\n" if initial else "")
        (folder / f"{name}.gin").write_text(text)
    with contextlib.chdir(folder):
        for name in ("base", "pruned", "tuned", "restored"):
            assert main(["train", "--gin_file", f"{name}.gin", "--workdir", name, "--json", f"{name}.json"]) == 0
    return folder


@pytest.fixture(autouse=True)
def here(folder, monkeypatch):
    monkeypatch.chdir(folder)


def rows(name):
    return np.asarray(restore_params(name)["embed"]["tokens"])


def test_the_run_directory_stores_the_ids_and_the_network_keeps_their_rows(folder):
    stored = read_map(folder / "pruned")
    vocabulary = Vocabulary.load("data/echo/train/vocabulary.model")
    used = {token for pair in TRAIN for text in pair for token in vocabulary.encode(text)}
    assert stored["full_size"] == vocabulary.size > len(stored["kept"]) == 8
    assert set(stored["kept"]) >= used | {0, 1, 2, 3, 4}
    np.testing.assert_array_equal(rows("pruned")[:8], rows("base")[stored["kept"]])
    assert rows("pruned").shape[0] == 8
    report = json.loads((folder / "pruned.json").read_text())["initial"]
    assert "vocabulary: 8 of 8 tokens moved to their new ids" in report
    assert read_map(folder / "base") is None


def test_continuing_with_the_same_vocabulary_changes_no_parameter(folder):
    report = json.loads((folder / "tuned.json").read_text())["initial"]
    assert "0 resized, 0 added, 0 dropped" in report
    assert "moved" not in report
    assert not np.array_equal(rows("tuned"), rows("pruned"))


def test_a_run_without_a_map_restores_the_full_vocabulary(folder):
    kept = read_map(folder / "tuned")["kept"]
    np.testing.assert_array_equal(rows("restored")[kept], rows("tuned")[:8])
    assert read_map(folder / "restored") is None
    assert kept != list(range(8)), "the token ids changed"


def test_decoding_maps_ids_back_and_counts_unknown_tokens(folder, capsys):
    assert main(["decode", "--workdir", "tuned", "--task", "echo", "--root", "data",
                 "--sampler", "gin/samplers/greedy.gin"]) == 0  # fmt: skip
    captured = capsys.readouterr()
    lines = [json.loads(line) for line in captured.out.splitlines()]
    assert [line["reference"] for line in lines] == ["af", "ef"]
    assert not any(set(line["output"]) & set("abcd") for line in lines)
    assert "8 of 12 tokens kept; UNK for 1 of 12 tokens of echo/validation" in captured.err
    (folder / "prompts.txt").write_text("efa\n")
    assert main(["decode", "--workdir", "tuned", "--input", "prompts.txt", "--sampler", "gin/samplers/greedy.gin"]) == 0
    assert "1 of 4 prompt tokens become UNK" in capsys.readouterr().err


def test_a_stored_map_replaces_the_training_data(folder, tmp_path, monkeypatch, capsys):
    for name in ("tuned", "data/echo/validation"):
        shutil.copytree(folder / name, tmp_path / name)
    (tmp_path / "stored.gin").write_text(
        CONFIG % ("finetune", 8, 2) + "INITIAL = 'pruned'\nfrom diffusion_lm.data import iterator\n"
        "from diffusion_lm.data import vocabulary_map\n"
        "iterator.DataPipeline.vocabulary_map = @vocabulary_map.StoredMap()\n"
        "vocabulary_map.StoredMap.folder = 'tuned'\n"
    )
    monkeypatch.chdir(tmp_path)
    flags = ["--gin_file", "stored.gin", "--sampler", "gin/samplers/greedy.gin", "--task", "echo", "--root", "data"]
    assert main(["decode", "--workdir", "tuned", *flags]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_data_with_another_vocabulary_than_the_network_are_an_error(capsys):
    flags = ["train", "--gin_file", "pruned.gin", "--workdir", "other"]
    assert main([*flags, "--gin.VOCAB_SIZE=7"]) == 2
    assert "size=7: the data use 8 of 12 tokens" in capsys.readouterr().err
    assert main([*flags, "--gin.UsedTokens.size=None", "--gin.VOCAB_SIZE=10"]) == 2
    assert "vocab_size=10: the vocabulary of the data has 8 tokens" in capsys.readouterr().err
