"""Imports, trains, decodes and exports a diffusion checkpoint with the verbs, in the layout of its family."""

import io
import json
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy
import sentencepiece
import tokenizers

from diffusion_lm.architectures.single_stream import SingleStream
from diffusion_lm.cli.main import main
from diffusion_lm.core.rng import example_number
from diffusion_lm.data.schema import Manifest, Record
from diffusion_lm.data.store import split_folder, write_records
from diffusion_lm.data.vocabulary import Vocabulary
from diffusion_lm.interop.huggingface import load, save
from diffusion_lm.nn.transformer import TransformerSpec
from diffusion_lm.training.checkpoint import restore_params

SPEC = TransformerSpec(
    vocab_size=64,
    num_layers=2,
    model_dim=16,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    mlp_dim=24,
    mlp="swiglu",
    position="rope",
    max_positions=48,
    attention_scale="inverse_sqrt",
    tied_embeddings=False,
)

# One include binds the network, one its objective.
RUN = """
from __gin__ import dynamic_registration
from diffusion_lm.data import converters
from diffusion_lm.data import grain_source
from diffusion_lm.data import iterator
from diffusion_lm.data import target_window
from diffusion_lm.evaluation import likelihood
from diffusion_lm.training import run

include 'imported/model.gin'
include 'OBJECTIVE_FILE'

run.TrainRun:
  model = %MODEL
  objective = %OBJECTIVE
  data = @iterator.DataPipeline()
  steps = 1
  batch_size = 4
  initial = 'imported'
iterator.DataPipeline:
  sources = (@grain_source.GrainSource(),)
  converter = @converters.SingleStreamConverter()
grain_source.GrainSource.task = 'toy'
grain_source.GrainSource.root = 'data'
converters.SingleStreamConverter:
  inputs_length = 12
  target_length = 8
  target_window = @target_window.PadFilled()
"""
EVALUATED = """
run.TrainRun.evaluations = (@likelihood.BoundEvaluation(),)
likelihood.BoundEvaluation:
  data = @iterator.DataPipeline()
  objective = %OBJECTIVE
  limit = 4
  batch_size = 4
"""


# The metadata of an export follows from the configuration, so no training step needs to be compiled.
UNTRAINED = ["--gin.TrainRun.steps=0"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A LLaDA checkpoint with its tokenizer, a small task, gin files, and the run directory of `import`."""
    folder = tmp_path_factory.mktemp("diffusion")
    files = {"own": "imported/objective.gin", "shifted": "objectives/diffullama.gin", "random": "objectives/sundae.gin"}
    for name, file in files.items():
        text = RUN + (EVALUATED if name == "own" else "")
        (folder / f"{name}.gin").write_text(text.replace("OBJECTIVE_FILE", file))
    stream = io.BytesIO()
    lines = [f"{number} plus {other}" for number in range(10, 40) for other in ("one", "two", "three")]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=stream, vocab_size=64, hard_vocab_limit=True, model_type="bpe",
        pad_id=0, eos_id=1, bos_id=2, unk_id=3, control_symbols=["<mask>"], minloglevel=2, character_coverage=1.0,
    )  # fmt: skip
    vocabulary = Vocabulary(stream.getvalue())
    texts = [(f"{number} plus one", str(number + 1), number) for number in range(10, 26)]
    records = [
        Record(
            vocabulary.encode(text),
            vocabulary.encode(answer),
            example_number(f"toy/{number}"),
            text,
            answer,
            answer,
        )
        for text, answer, number in texts
    ]
    manifest = Manifest("toy", "train", vocabulary.specials, count=len(records), target_tokens=48)
    write_records(split_folder("toy", "train", folder / "data"), records, manifest, vocabulary=vocabulary)
    model = SingleStream(SPEC)
    config = {"eos_token_id": 1, "pad_token_id": 0}
    told, tokenizer = {"mask_token_id": 4}, {"tokenizer.model": stream.getvalue(), "modeling_llada.py": b"raise\n"}
    save(
        folder / "checkpoint", model, model.init(jax.random.key(3)), family="llada", config=config, trained_as=told,
        files=tokenizer,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["import", "checkpoint", "--workdir", "imported", "--json", "import.json"]) == 0
        assert main(["train", "--gin_file", "own.gin", "--workdir", "tuned"]) == 0
    return folder


@pytest.fixture(autouse=True)
def here(folder, monkeypatch):
    monkeypatch.chdir(folder)


def _equal(a, b) -> bool:
    return jax.tree.all(jax.tree.map(lambda x, y: np.array_equal(np.asarray(x), np.asarray(y)), a, b))


def test_the_import_reports_how_the_model_was_trained(folder):
    result = json.loads((folder / "import.json").read_text())
    assert result["family"] == "llada"
    assert result["diffusion"]["mask_id"] == 4
    assert not result["diffusion"]["shifted"]
    names = {path.name for path in (folder / "imported").iterdir()}
    assert {"model.gin", "objective.gin", "sampler.gin", "tokenizer"} <= names
    assert [path.name for path in (folder / "imported" / "tokenizer").iterdir()] == ["tokenizer.model"]


def test_what_is_printed(capsys):
    assert main(["import", "checkpoint", "--workdir", "again"]) == 0
    printed = capsys.readouterr().out
    assert "by masked diffusion: same position, visibility full, MASK 4 (config.json)" in printed
    assert "--sampler again/sampler.gin" in printed


def test_it_decodes_with_its_sampler_file(capsys):
    arguments = ["decode", "--workdir", "imported", "--gin_file", "own.gin", "--task", "toy", "--split", "train"]
    assert main([*arguments, "--sampler", "imported/sampler.gin", "--limit", "2", "--batch_size", "2"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 2
    assert all(row["forward_passes"] > 0 for row in rows)


def test_an_imported_checkpoint_is_exported_unchanged(folder):
    assert main(["export", "imported", "--to", "back", "--json", "export.json"]) == 0
    result = json.loads((folder / "export.json").read_text())
    assert (result["model_type"], result["layout"], result["tokenizer"]) == ("llada", "llada", ["tokenizer.model"])
    before, after = load("checkpoint"), load("back")
    assert _equal(before.params, after.params)
    assert (before.architecture, before.specials, before.diffusion) == (
        after.architecture,
        after.specials,
        after.diffusion,
    )
    card = (folder / "back" / "README.md").read_text()
    assert "Imported from `checkpoint`" in card
    assert "license: unknown" in card
    assert not list((folder / "back").glob("*.py"))


def test_parameters_with_nan_are_not_exported(folder, tmp_path, break_checkpoint, capsys):
    shutil.copytree(folder / "tuned", tmp_path / "tuned")
    break_checkpoint(tmp_path / "tuned", 1)
    assert main(["export", str(tmp_path / "tuned"), "--to", str(tmp_path / "out")]) == 2
    assert "NaN or Inf in 1 of" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_parameters_with_nan_are_not_imported(folder, tmp_path, capsys):
    shutil.copytree(folder / "checkpoint", tmp_path / "checkpoint")
    file = tmp_path / "checkpoint" / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    name = next(name for name in tensors if "norm" in name)
    tensors[name] = np.full_like(tensors[name], np.nan)
    safetensors.numpy.save_file(tensors, file)
    assert main(["import", str(tmp_path / "checkpoint"), "--workdir", str(tmp_path / "imported")]) == 2
    assert f"tensor '{name}' holds" in capsys.readouterr().err
    assert not (tmp_path / "imported").exists()


def test_a_trained_model_gets_the_public_layout_card_and_tokenizer(folder):
    assert main(["export", "tuned", "--to", "trained", "--json", "export.json"]) == 0
    result = json.loads((folder / "export.json").read_text())
    assert (result["layout"], result["step"]) == ("llada", 1)
    again = load("trained")
    assert _equal(restore_params("tuned"), again.params)
    assert again.diffusion == load("checkpoint").diffusion
    assert (again.specials.mask_id, again.specials.eos_ids, again.specials.pad_id) == (4, (1,), 0)
    tokenizer = tokenizers.Tokenizer.from_file("trained/tokenizer.json")
    vocabulary = Vocabulary((folder / "checkpoint" / "tokenizer.model").read_bytes())
    assert tokenizer.encode("12 plus one").ids == vocabulary.encode("12 plus one")
    # Importing the export gives the same ids.
    assert Vocabulary.load("trained").specials == vocabulary.specials
    card = (folder / "trained" / "README.md").read_text()
    for expected in (
        "# trained",
        "from the parameters of `imported` (imported from `checkpoint`, family llada)",
        "step 1, batch size 4",
        "`toy`, split train: 16 examples",
        "MaskedDiffusion(",
        "an upper bound of the negative log-likelihood (nelbo)",
        "| bound/loss |",
        "published in GSAI-ML/LLaDA-8B-Base",
        "Unknown: the run directory does not state one.",
        f"jax {jax.__version__}",
    ):
        assert expected in card, expected
    assert str(folder) not in card


def test_other_alignments_get_other_layouts(folder, capsys):
    assert main(["train", "--gin_file", "shifted.gin", "--workdir", "shifted", *UNTRAINED]) == 0
    assert main(["export", "shifted", "--to", "shifted_out", "--json", "export.json"]) == 0
    assert json.loads((folder / "export.json").read_text())["layout"] == "diffullama"
    assert load("shifted_out").diffusion.shifted
    capsys.readouterr()
    assert main(["export", "shifted", "--to", "wrong", "--layout", "llada"]) == 2
    assert "has same position" in capsys.readouterr().err
    # --layout selects a family by shape alone; the file still records how the model was trained.
    assert main(["export", "shifted", "--to", "plain", "--layout", "llama"]) == 0
    told = json.loads((folder / "plain" / "config.json").read_text())
    assert told["diffusion_lm"]["prediction"] == "shifted"
    assert load("plain").family == "llama"


def test_uniform_diffusion_has_no_masked_diffusion_layout(folder, capsys):
    assert main(["train", "--gin_file", "random.gin", "--workdir", "random", *UNTRAINED]) == 0
    assert main(["export", "random", "--to", "random_out", "--tokenizer", "none", "--json", "export.json"]) == 0
    result = json.loads((folder / "export.json").read_text())
    assert (result["layout"], result["tokenizer"]) == ("llama", [])
    capsys.readouterr()
    assert main(["export", "random", "--to", "wrong", "--layout", "llada"]) == 2
    assert "was not trained by masked diffusion" in capsys.readouterr().err
    assert not (folder / "wrong").exists()


def test_an_unnamed_mask_token_is_not_guessed(folder, capsys):
    """Published checkpoints are recognised by their shape; this one is not published."""
    source = load("checkpoint")
    save(folder / "nameless", source.architecture, source.params, family="llada")
    assert main(["import", "nameless", "--workdir", "nameless_run"]) == 0
    assert "The checkpoint does not name its mask token" in capsys.readouterr().out
    assert not (folder / "nameless_run" / "sampler.gin").exists()
