"""`import` and `export`: a checkpoint becomes a run directory from which other runs start, and is exported again."""

import io
import json

import jax
import numpy as np
import pytest
import sentencepiece

from diffusion_lm.architectures.single_stream import SingleStream
from diffusion_lm.cli.main import main
from diffusion_lm.core.rng import example_number
from diffusion_lm.data.schema import Manifest, Record
from diffusion_lm.data.store import split_folder, write_records
from diffusion_lm.data.vocabulary import Vocabulary
from diffusion_lm.interop.huggingface import load, save
from diffusion_lm.nn.rope import YarnRope
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
    rope_scaling=YarnRope(4.0, original_max_positions=16),
    max_positions=48,
    window=9,
    window_layers=(1,),
    attention_scale="inverse_sqrt",
    qkv_bias=True,
    tied_logit_scale=False,
)

# All that AR2Diff needs: the include, the line `initial`, and another objective.
RUN = """
from __gin__ import dynamic_registration
from diffusion_lm.data import converters
from diffusion_lm.data import grain_source
from diffusion_lm.data import iterator
from diffusion_lm.data import target_window
from diffusion_lm.evaluation import likelihood
from diffusion_lm.training import run

include 'models/sizes/nano.gin'
include 'imported/model.gin'
include 'objectives/OBJECTIVE_FILE'

run.TrainRun:
  model = %MODEL
  objective = %OBJECTIVE
  data = @iterator.DataPipeline()
  steps = 1
  batch_size = 4
  initial = 'imported'
  evaluations = (@likelihood.BoundEvaluation(),)
likelihood.BoundEvaluation:
  data = @iterator.DataPipeline()
  objective = %OBJECTIVE
  limit = 4
  batch_size = 4
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


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A directory with a checkpoint, the run directory of `import`, a small task, and two gin files."""
    folder = tmp_path_factory.mktemp("import")
    for name, file in (("ar", "autoregressive.gin"), ("diffusion", "sundae.gin")):
        (folder / f"{name}.gin").write_text(RUN.replace("OBJECTIVE_FILE", file))
    stream = io.BytesIO()
    lines = [f"{number} plus {other}" for number in range(10, 40) for other in ("one", "two", "three")]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=stream, vocab_size=64, hard_vocab_limit=True, model_type="bpe",
        pad_id=0, eos_id=1, bos_id=2, unk_id=3, minloglevel=2, byte_fallback=False, character_coverage=1.0,
    )  # fmt: skip
    vocabulary = Vocabulary(stream.getvalue())
    records = [
        Record(
            vocabulary.encode(f"{number} plus one"),
            vocabulary.encode(str(number + 1)),
            example_number(f"toy/{number}"),
            f"{number} plus one",
            str(number + 1),
            str(number + 1),
        )
        for number in range(10, 26)
    ]
    manifest = Manifest("toy", "train", vocabulary.specials)
    write_records(split_folder("toy", "train", folder / "data"), records, manifest, vocabulary=vocabulary)
    model = SingleStream(SPEC)
    save(
        folder / "checkpoint", model, model.init(jax.random.key(3)), config={"bos_token_id": 2, "eos_token_id": [1, 7]}
    )
    return folder


@pytest.fixture(autouse=True)
def here(folder, monkeypatch):
    monkeypatch.chdir(folder)


@pytest.fixture(scope="module")
def imported(folder):
    arguments = ["import", str(folder / "checkpoint"), "--workdir", str(folder / "imported")]
    assert main([*arguments, "--json", str(folder / "import.json")]) == 0
    return json.loads((folder / "import.json").read_text())


def _equal(a, b) -> bool:
    return jax.tree.all(jax.tree.map(lambda x, y: np.array_equal(np.asarray(x), np.asarray(y)), a, b))


def test_the_result_lists_what_each_tensor_became(imported, folder):
    assert imported["family"] == "qwen2"
    assert imported["causal"]
    assert imported["specials"] == {"pad_id": None, "bos_id": 2, "eos_ids": [1, 7], "mask_id": None}
    assert ["blocks/attention/query", "model.layers.{i}.self_attn.q_proj.weight"] in imported["report"]["mapped"]
    assert imported["report"]["missing"] == []
    stored = json.loads((folder / "imported" / "import.json").read_text())
    assert stored["report"] == imported["report"]
    assert stored["config"]["model_type"] == "qwen2"
    assert {path.name for path in (folder / "imported").iterdir()} == {
        "checkpoints",
        "import.json",
        "model.gin",
        "run_card.json",
    }


def test_what_is_printed(imported, folder, capsys):
    assert main(["import", "checkpoint", "--workdir", "again"]) == 0
    captured = capsys.readouterr()
    assert "qwen2 in again" in captured.out
    assert "with causal attention" in captured.out
    assert "include 'again/model.gin'" in captured.out
    assert "peak host memory" in captured.err


def test_the_parameters_and_the_network_are_those_of_the_checkpoint(imported):
    source = load("checkpoint")
    assert _equal(restore_params("imported"), source.params)
    from diffusion_lm.cli import config

    built = config.load(["imported/model.gin"], macros=["MODEL"]).build_macro("MODEL")
    assert built == source.architecture
    # Bindings of an earlier file (here nano.gin) have no effect.
    run = config.load(["ar.gin"]).build(__import__("diffusion_lm.training.run", fromlist=["run"]).TrainRun)
    assert run.model == source.architecture
    assert run.model.spec.window_layers == (1,)
    assert run.model.spec.rope_scaling == SPEC.rope_scaling


@pytest.mark.parametrize("name", ["ar", "diffusion"])
def test_a_run_starts_from_it(name, imported, folder):
    assert main(["train", "--gin_file", f"{name}.gin", "--workdir", f"tuned_{name}", "--json", "train.json"]) == 0
    result = json.loads((folder / "train.json").read_text())
    assert result["step"] == 1
    assert " 14 arrays mapped, 0 resized, 0 added, 0 dropped" in result["initial"]
    # After one step the parameters are close to the checkpoint but not equal.
    before, after = restore_params("imported"), restore_params(f"tuned_{name}")
    change = max(jax.tree.leaves(jax.tree.map(lambda a, b: float(abs(a - b).max()), before, after)))
    assert 0 < change < 0.1


def test_the_run_directory_contains_the_checkpoint(imported):
    assert _equal(restore_params("imported"), load("checkpoint").params)


def test_decode_and_evaluate_use_it(imported, folder, capsys):
    sampler = ["--sampler", "gin/samplers/greedy.gin"]
    arguments = ["decode", "--workdir", "imported", "--gin_file", "ar.gin", "--task", "toy", "--split", "train"]
    assert main([*arguments, *sampler, "--limit", "2", "--batch_size", "2"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert main(["evaluate", "--workdir", "imported", "--gin_file", "ar.gin", "--json", "scores.json"]) == 0
    assert "nan" not in (folder / "scores.json").read_text()
    assert main(["decode", "--workdir", "imported", "--task", "toy"]) == 2
    assert "add --gin_file" in capsys.readouterr().err


def test_it_cannot_be_trained_in(imported, capsys):
    assert main(["train", "--gin_file", "ar.gin", "--workdir", "imported"]) == 2
    assert "is imported checkpoint there and TrainRun here" in capsys.readouterr().err


def test_an_import_can_be_exported(imported, folder):
    assert main(["export", "imported", "--to", "exported", "--json", "export.json"]) == 0
    assert json.loads((folder / "export.json").read_text())["model_type"] == "qwen2"
    before, after = load("checkpoint"), load("exported")
    assert _equal(before.params, after.params)
    assert before.architecture == after.architecture
    assert before.specials == after.specials


def test_a_trained_model_can_be_exported(imported, folder, capsys):
    assert main(["train", "--gin_file", "ar.gin", "--workdir", "to_export"]) == 0
    assert main(["export", "to_export", "--to", "trained", "--dtype", "bfloat16"]) == 0
    trained, again = restore_params("to_export"), load("trained").params
    difference = jax.tree.map(lambda a, b: float(abs(a - b).max()), trained, again)
    assert 0 < max(jax.tree.leaves(difference)) < 0.05
    capsys.readouterr()
    assert main(["export", "to_export", "--to", "other", "--family", "gpt2"]) == 2
    assert "the family gpt2 does not have this network" in capsys.readouterr().err
    assert not (folder / "other").exists()


def test_nothing_is_written_on_errors(imported, folder, capsys):
    broken = folder / "broken"
    broken.mkdir()
    (broken / "config.json").write_bytes((folder / "checkpoint" / "config.json").read_bytes())
    (broken / "model.safetensors").write_bytes((folder / "checkpoint" / "model.safetensors").read_bytes()[:-5])
    before = sorted(path.name for path in folder.iterdir())
    assert main(["import", "broken", "--workdir", "never"]) == 2
    assert "cut off" in capsys.readouterr().err
    assert main(["import", "checkpoint", "--workdir", "imported"]) == 2
    assert "already exists" in capsys.readouterr().err
    assert sorted(path.name for path in folder.iterdir()) == before


def test_a_full_disk_leaves_no_files(folder, monkeypatch, capsys):
    from diffusion_lm.interop import run_folder

    def full(*_):
        raise OSError("no space left on device")

    before = sorted(path.name for path in folder.iterdir())
    monkeypatch.setattr(run_folder, "claim_folder", full)
    with pytest.raises(OSError, match="no space"):
        main(["import", "checkpoint", "--workdir", "never"])
    assert sorted(path.name for path in folder.iterdir()) == before


def test_families_are_listed(tmp_path, capsys):
    assert main(["list", "families", "--json", str(tmp_path / "families.json")]) == 0
    listed = {one["name"]: one for one in json.loads((tmp_path / "families.json").read_text())}
    assert {"gpt2", "llama", "mistral", "qwen2", "qwen3", "roberta", "xlm-roberta-xl"} <= set(listed)
    assert "xlm-roberta" in listed["roberta"]["model_types"]
    assert "1911.02116" in capsys.readouterr().out
