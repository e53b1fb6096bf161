"""The verbs in this process on a small run: train, evaluate, decode, explain, materialise, and their errors."""

import contextlib
import io
import json
import shutil

import pytest
import sentencepiece

from diffusion_lm.cli import config
from diffusion_lm.cli.main import main
from diffusion_lm.core.rng import example_number
from diffusion_lm.data.schema import Manifest, Record
from diffusion_lm.data.store import split_folder, write_records
from diffusion_lm.data.vocabulary import Vocabulary
from diffusion_lm.training.run import TrainRun

RUN = """
from __gin__ import dynamic_registration
from diffusion_lm.architectures import single_stream
from diffusion_lm.data import converters
from diffusion_lm.data import grain_source
from diffusion_lm.data import iterator
from diffusion_lm.evaluation import generation
from diffusion_lm.evaluation import likelihood
from diffusion_lm.nn import transformer
from diffusion_lm.objectives import autoregressive
from diffusion_lm.samplers import autoregressive as decoders
from diffusion_lm.training import checkpoint
from diffusion_lm.training import run

STEPS = 4
ROOT = 'data'
run.TrainRun:
  model = @single_stream.SingleStream()
  objective = @autoregressive.Autoregressive()
  data = @train/iterator.DataPipeline()
  steps = %STEPS
  batch_size = 4
  log_every = 2
  checkpoint = @checkpoint.CheckpointPolicy()
  evaluations = (@likelihood.BoundEvaluation(), @generation.GenerationEvaluation())
checkpoint.CheckpointPolicy.every = 2
single_stream.SingleStream.spec = @transformer.TransformerSpec()
transformer.TransformerSpec:
  vocab_size = 64
  num_layers = 1
  model_dim = 16
  num_heads = 2
  head_dim = 8
  mlp_dim = 32
  vocab_multiple = 8
iterator.DataPipeline:
  sources = (@grain_source.GrainSource(),)
  converter = @converters.SingleStreamConverter()
grain_source.GrainSource.task = 'toy'
grain_source.GrainSource.root = %ROOT
train/grain_source.GrainSource.split = 'train'
held_out/grain_source.GrainSource.split = 'validation'
converters.SingleStreamConverter:
  inputs_length = 12
  target_length = 8
likelihood.BoundEvaluation:
  data = @held_out/iterator.DataPipeline()
  objective = @autoregressive.Autoregressive()
  limit = 4
  batch_size = 4
generation.GenerationEvaluation.task = @generation.GenerationTask()
generation.GenerationEvaluation.sampler = @decoders.AutoregressiveSampler()
generation.GenerationTask:
  name = 'toy'
  data = @held_out/iterator.DataPipeline()
  metric = 'exact_match'
  limit = 4
  batch_size = 4
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A directory with run.gin, a small materialised task, and a finished run in `run`."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "run.gin").write_text(RUN)
    stream = io.BytesIO()
    lines = [f"{number} plus {other}" for number in range(10, 40) for other in ("one", "two", "three")]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=stream, vocab_size=64, hard_vocab_limit=True, model_type="bpe",
        pad_id=0, eos_id=1, bos_id=2, unk_id=3, minloglevel=2, byte_fallback=False, character_coverage=1.0,
    )  # fmt: skip
    vocabulary = Vocabulary(stream.getvalue())
    for split, count in (("train", 16), ("validation", 6)):
        records = [
            Record(
                vocabulary.encode(f"{number} plus one"),
                vocabulary.encode(str(number + 1)),
                example_number(f"toy/{split}/{number}"),
                f"{number} plus one",
                str(number + 1),
                str(number + 1),
            )
            for number in range(10, 10 + count)
        ]
        manifest = Manifest("toy", split, vocabulary.specials)
        write_records(split_folder("toy", split, folder / "data"), records, manifest, vocabulary=vocabulary)
    with contextlib.chdir(folder):
        assert main(["train", "--gin_file", "run.gin", "--workdir", "run", "--json", "train.json"]) == 0
    return folder


@pytest.fixture(autouse=True)
def here(folder, monkeypatch):
    monkeypatch.chdir(folder)


def fails(capsys, *argv, code=2):
    capsys.readouterr()
    assert main(list(argv)) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err


def test_train_writes_a_run_directory(folder):
    result = json.loads((folder / "train.json").read_text())
    assert result["step"] == 4
    assert "toy/exact_match" in " ".join(result["metrics"])
    assert {"resolved.gin", "run_card.json", "metrics.jsonl", "checkpoints"} <= {
        p.name for p in (folder / "run").iterdir()
    }


def test_train_again_returns_at_once_and_prints_results_to_stdout(capsys):
    assert main(["train", "--gin_file", "run.gin", "--workdir", "run"]) == 0
    assert "4 steps, in run" in capsys.readouterr().out


def test_resolved_configuration_trains_the_same_run(folder, capsys):
    assert main(["train", "--gin_file", "run/resolved.gin", "--workdir", "run", "--json", "again.json"]) == 0
    again = json.loads((folder / "again.json").read_text())
    assert again["metrics"] == json.loads((folder / "train.json").read_text())["metrics"]


def test_directory_of_another_configuration_keeps_its_resolved_gin(folder, capsys):
    before = (folder / "run" / "resolved.gin").read_text()
    message = fails(
        capsys,
        "train",
        "--gin_file",
        "run.gin",
        "--workdir",
        "run",
        "--gin.TransformerSpec.mlp_dim=64",
        "--gin.STEPS=9",
    )
    assert "mlp_dim is 32 there and 64 here" in message
    assert (folder / "run" / "resolved.gin").read_text() == before


def test_evaluate_reproduces_the_values_of_training(folder, capsys):
    assert main(["evaluate", "--workdir", "run", "--json", "scores.json"]) == 0
    assert "exact_match" in capsys.readouterr().out
    scores = json.loads((folder / "scores.json").read_text())
    trained = json.loads((folder / "train.json").read_text())["metrics"]
    for name, evaluation in scores["evaluations"].items():
        for metric, value in evaluation["values"].items():
            assert trained[f"{name}/{metric}"] == pytest.approx(value, abs=1e-6)
    assert scores["evaluations"]["bound"]["conditions"]["bound"] == "exact"
    assert scores["evaluations"]["decode/toy"]["conditions"]["sampler"]["class"] == "AutoregressiveSampler"


def test_evaluate_accepts_flags(folder, capsys):
    arguments = ["evaluate", "--workdir", "run", "--only", "bound", "--limit", "2", "--step", "2", "--json", "two.json"]
    assert main(arguments) == 0
    scores = json.loads((folder / "two.json").read_text())
    assert scores["step"] == 2
    assert list(scores["evaluations"]) == ["bound"]
    assert "did you mean bound?" in fails(capsys, "evaluate", "--workdir", "run", "--only", "bond")
    assert "no checkpoint of step 3" in fails(capsys, "evaluate", "--workdir", "run", "--step", "3")


def test_decode_prompts_of_a_file(folder, capsys):
    (folder / "prompts.txt").write_text('10 plus one\n\n{"inputs": "11 plus one"}\n12 plus one\n')
    assert main(["decode", "--workdir", "run", "--input", "prompts.txt", "--batch_size", "2"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["inputs"] for line in lines] == ["10 plus one", "11 plus one", "12 plus one"]
    assert all(line["forward_passes"] >= 1 for line in lines)


def test_decode_does_not_depend_on_the_batch(capsys):
    found = []
    for size in ("1", "4"):
        capsys.readouterr()
        assert main(["decode", "--workdir", "run", "--task", "toy", "--batch_size", size, "--limit", "3"]) == 0
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        found.append([(line["inputs"], line["output"], line["reference"]) for line in lines])
    assert found[0] == found[1]


def test_decode_with_a_sampler_file_and_samples(folder, capsys):
    (folder / "warm.gin").write_text(
        "from __gin__ import dynamic_registration\n"
        "include 'samplers/greedy.gin'\n"
        "from diffusion_lm.samplers import decoding\n"
        "left_to_right/decoding.Decoding.temperature = 5.0\n"
    )
    arguments = [
        "decode",
        "--workdir",
        "run",
        "--task",
        "toy",
        "--limit",
        "2",
        "--samples",
        "2",
        "--sampler",
        "warm.gin",
    ]
    assert main(arguments) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["sample"] for line in lines] == [0, 1, 0, 1]
    assert main([*arguments, "--gin.left_to_right/Decoding.temperature=0.0"]) == 0
    cold = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert cold[0]["output"] == cold[1]["output"]


def test_decode_errors(folder, capsys):
    assert "cannot read nowhere.txt" in fails(capsys, "decode", "--workdir", "run", "--input", "nowhere.txt")
    (folder / "broken.txt").write_text('{"prompt": "x"}\n')
    assert "not a JSON object with a field 'inputs'" in fails(
        capsys, "decode", "--workdir", "run", "--input", "broken.txt"
    )
    assert "not materialised" in fails(capsys, "decode", "--workdir", "run", "--task", "toys")


SHORT = ("--gin.SingleStreamConverter.inputs_length=2", "--gin.SingleStreamConverter.target_length=2")


def test_every_verb_reports_truncation(folder, capsys):
    """Prompts of three or more tokens with a length of two; targets of two tokens and EOS with a length of two."""
    prompts = "toy/train: 16 of 16 prompts truncated on the left to 2 tokens (SingleStreamConverter.inputs_length)"
    assert main(["train", "--gin_file", "run.gin", "--workdir", "short", *SHORT, "--json", "short.json"]) == 0
    assert f"training  {prompts}" in capsys.readouterr().err
    found = json.loads((folder / "short.json").read_text())["cuts"]
    assert {(cut["used_by"], cut["part"]) for cut in found} >= {("training", "prompts"), ("decode/toy", "prompts")}
    card = json.loads((folder / "short" / "run_card.json").read_text())
    assert card["cuts"] == found
    assert prompts in [cut["text"] for cut in card["cuts"]]

    for verb in (["explain", "--no_config"], ["materialise"]):
        assert main([*verb, "--gin_file", "run.gin", *SHORT]) == 0
        assert prompts in capsys.readouterr().out

    decoded = "toy/validation: 4 of 4 prompts truncated on the left to 2 tokens (SingleStreamConverter.inputs_length)"
    only = ["--only", "decode/toy", "--json", "evaluated.json"]
    assert main(["evaluate", "--workdir", "short", *only]) == 0
    captured = capsys.readouterr()
    assert decoded in captured.err
    assert f"decode/toy: {decoded}" in captured.out
    scores = json.loads((folder / "evaluated.json").read_text())["evaluations"]["decode/toy"]
    assert [cut["text"] for cut in scores["cuts"] if cut["part"] == "prompts"] == [decoded]


def test_decode_reports_truncation_per_prompt(folder, capsys):
    (folder / "mixed.txt").write_text("10 plus one\n" + "10 plus one " * 9 + "\n")
    assert main(["decode", "--workdir", "run", "--input", "mixed.txt"]) == 0
    captured = capsys.readouterr()
    short, long = [json.loads(line) for line in captured.out.splitlines()]
    assert "cut_tokens" not in short
    (sentence,) = [line for line in captured.err.splitlines() if line.startswith("prompt ")]
    count, total = long["cut_tokens"]["inputs"], int(sentence.split(" of ")[1].split()[0])
    assert total - count == 12
    assert sentence == (
        f"prompt 2: {count} of {total} tokens of its inputs cut at the left (SingleStreamConverter.inputs_length = 12)"
    )
    assert "1 of 2 prompts were cut" in captured.err


def test_prompts_that_the_vocabulary_cannot_encode_are_a_warning(folder, capsys):
    (folder / "strange.txt").write_text("10 plus one\n10 {plus} one\n", encoding="utf-8")
    assert main(["decode", "--workdir", "run", "--input", "strange.txt"]) == 0
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert warnings == ["warning: prompt 2: the vocabulary cannot encode '{' 1, '}' 1"]


def test_every_verb_reports_what_the_vocabulary_cannot_encode(folder, capsys, monkeypatch, tmp_path):
    manifest_file = folder / "data" / "toy" / "train" / "manifest.json"
    before = manifest_file.read_text()
    lost = {"count": 3, "of": 16, "characters": {"\n": 4, "{": 1}, "first": "example 2: '{'"}
    sentence = (
        "toy/train: the vocabulary cannot encode all characters of 3 of 16 targets: newline 4, '{' 1; "
        "first in example 2: '{'"
    )
    try:
        manifest_file.write_text(json.dumps(json.loads(before) | {"unwritten": {"targets": lost}}))
        assert main(["explain", "--gin_file", "run.gin", "--no_config"]) == 0
        assert sentence in capsys.readouterr().out
        assert main(["materialise", "--gin_file", "run.gin"]) == 0
        assert sentence in capsys.readouterr().err
        assert main(["train", "--gin_file", "run.gin", "--workdir", "lossy"]) == 0
        assert sentence in capsys.readouterr().err
        from diffusion_lm.cli import doctor

        monkeypatch.setenv("DIFFUSION_LM_CACHE", str(folder))
        assert doctor._materialised() == f"2 splits; {sentence}"
    finally:
        manifest_file.write_text(before)


BEST = """
from __gin__ import dynamic_registration
from diffusion_lm.evaluation import generation
from diffusion_lm.training import checkpoint
from diffusion_lm.training import selection
include 'run.gin'
checkpoint.CheckpointPolicy.best = @selection.BestCheckpoint()
selection.BestCheckpoint.metric = 'decode/toy/exact_match'
generation.GenerationEvaluation.every = 2
"""


def test_verbs_use_the_best_checkpoint(folder, capsys):
    """Steps 2 and 4 have equal values, so the earlier one is selected."""
    (folder / "best.gin").write_text(BEST)
    assert main(["explain", "--gin_file", "best.gin", "--no_config"]) == 0
    assert (
        "its best checkpoint: maximum of decode/toy/exact_match on toy/validation, every 2" in capsys.readouterr().out
    )
    assert main(["train", "--gin_file", "best.gin", "--workdir", "best", "--json", "best.json"]) == 0
    assert "best checkpoint: step 2: decode/toy/exact_match 0 is the maximum" in capsys.readouterr().out
    assert json.loads((folder / "best.json").read_text())["selected"]["step"] == 2
    for flags, step, by in (([], 2, "decode/toy/exact_match"), (["--step", "4"], 4, None)):
        assert main(["evaluate", "--workdir", "best", "--only", "bound", "--json", "best.json", *flags]) == 0
        result = json.loads((folder / "best.json").read_text())
        assert (result["step"], result.get("selected_by")) == (step, by)
    assert main(["decode", "--workdir", "best", "--limit", "1"]) == 0
    assert "step 2 of best" in capsys.readouterr().err
    message = fails(capsys, "explain", "--gin_file", "best.gin", "--gin.BestCheckpoint.metric='decode/toy/em'")
    assert "metric='decode/toy/em': no evaluation of the run measures it" in message


@pytest.mark.parametrize("verb", [["evaluate"], ["decode", "--limit", "1"]])
def test_parameters_with_nan_are_neither_evaluated_nor_decoded(folder, capsys, break_checkpoint, tmp_path, verb):
    shutil.copytree(folder / "run", tmp_path / "broken")
    break_checkpoint(tmp_path / "broken", 4)
    message = fails(capsys, *verb, "--workdir", str(tmp_path / "broken"))
    assert "checkpoints/4 holds NaN or Inf in 1 of" in message
    assert "final_norm/scale" in message


def test_missing_checkpoint(folder, capsys):
    assert "nowhere is not a run directory" in fails(capsys, "evaluate", "--workdir", "nowhere")
    (folder / "empty").mkdir(exist_ok=True)
    message = fails(capsys, "evaluate", "--workdir", "empty", "--gin_file", "run.gin")
    assert "no checkpoint in empty (--workdir). Train first" in message


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--gin.TransformerSpec.vocab_size=100"], "vocab_size=100: the vocabulary of the data has 64 tokens"),
        (
            ["--gin.TrainRun.microbatches=3"],
            "microbatches=3: must divide batch_size=4 (TrainRun.microbatches, set at --gin.",
        ),
        (
            ["--gin.TransformerSpec.position='learned'", "--gin.TransformerSpec.max_positions=8"],
            "max_positions=8: the rows of the data have",
        ),
        (["--gin.TrainRun.step=3"], "TrainRun has no parameter 'step'; did you mean steps"),
        (["--gin.STEPPS=3"], "no binding uses the macro STEPPS; did you mean STEPS?"),
        (["--gin.STEPS='three'"], "TrainRun.steps = 'three' (from STEPS, --gin.STEPS): must be an int"),
        (
            ["--gin.TrainRun.model=@Autoregressive()"],
            "TrainRun.model = @Autoregressive(): must be an Architecture (--gin.TrainRun.model). Autoregressive has no",
        ),
        (["--gin.MeshSpec.data=3"], "MeshSpec.data has no effect: no MeshSpec is built (--gin.MeshSpec.data)"),
        (["--gin.TrainRun.mesh=@MeshSpec()", "--gin.MeshSpec.data=3"], "a mesh of data 3"),
    ],
)
def test_one_sentence_per_error(capsys, flags, complaint):
    assert complaint in fails(capsys, "train", "--gin_file", "run.gin", "--workdir", "other", *flags)


def test_explain_needs_no_data(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder / "data")  # the root 'data' of run.gin is not here
    assert main(["explain", "--gin_file", "../run.gin", "--json", "../explain.json", "--devices", "4"]) == 0
    out = capsys.readouterr().out
    result = json.loads((folder / "explain.json").read_text())["runs"]["run"]
    assert "run.TrainRun.steps" in out or "TrainRun.steps = " in out
    assert f"({result['total_parameters']:,})" in out or f"{result['total_parameters']:,}" in out
    assert result["devices"] == 4
    assert result["tokens_per_step"] == 4 * 21
    assert result["total_parameters"] == sum(result["parameters"].values())
    by_name = {row["name"]: row for row in result["rows"]}
    assert by_name["embed/tokens"]["bytes_per_device"] * 4 == 64 * 16 * 4
    assert max(len(line) for line in out.splitlines() if not line.startswith("#")) <= 120


def test_explain_parameters_are_those_of_the_checkpoint(folder, capsys):
    import jax

    from diffusion_lm.training.checkpoint import restore_params

    assert main(["explain", "--gin_file", "run.gin", "--no_config", "--json", "explain2.json"]) == 0
    result = json.loads((folder / "explain2.json").read_text())["runs"]["run"]
    assert result["total_parameters"] == sum(leaf.size for leaf in jax.tree.leaves(restore_params(folder / "run")))


def test_bench_data_counts_examples_and_tokens(folder, capsys):
    arguments = ["bench", "data", "--gin_file", "run.gin", "--rounds", "2", "--steps", "3"]
    assert main([*arguments, "--json", "bench.json"]) == 0
    result = json.loads((folder / "bench.json").read_text())
    data = config.load(["run.gin"]).build(TrainRun).data
    # One batch before the first round, and a discarded warm-up round of three batches.
    tokens = [int((data.batch(number, 4).segment_ids > 0).sum()) for number in range(1, 10)]
    facts, (row,) = result["facts"], result["rows"]
    assert facts["tokens_per_batch"] == pytest.approx(sum(tokens) / 9)
    assert facts["examples_per_batch"] == 4
    assert facts["filled"] == pytest.approx(sum(tokens) / 9 / (4 * 21))
    assert len(row["rounds"]) == 2
    assert row["examples_per_second"] == pytest.approx(4 / row["seconds"]["median"])


def test_materialise_without_a_task_is_an_error(capsys):
    assert "Pass --task NAME, or a recipe" in fails(capsys, "materialise")
    assert "--gin.GrainSource.root=DIR" in fails(capsys, "materialise", "--gin_file", "run.gin", "--root", "x")


def test_materialise_of_a_recipe_skips_existing_data(folder, capsys):
    assert main(["materialise", "--gin_file", "run.gin", "--json", "data.json"]) == 0
    splits = json.loads((folder / "data.json").read_text())
    assert {(row["task"], row["split"], row["records"]) for row in splits} == {
        ("toy", "train", 16),
        ("toy", "validation", 6),
    }


def test_unknown_module(capsys):
    message = fails(capsys, "materialise", "--task", "toy", "--module", "no_such_module")
    assert "no module named no_such_module" in message


def test_train_materialises_missing_data_in_a_child_process(capsys, monkeypatch):
    import subprocess

    commands = []

    def run(command, **options):
        commands.append((command, options))
        return subprocess.CompletedProcess(command, 2)

    monkeypatch.setattr(subprocess, "run", run)
    flags = ["--gin_file", "run.gin", "--gin.ROOT='elsewhere'", "--module", "json"]
    assert main(["train", "--workdir", "other", *flags]) == 2
    ((command, options),) = commands
    assert command[3:] == ["materialise", "--gin_file", "run.gin", "--module", "json", "--gin.ROOT='elsewhere'"]
    assert options["env"]["JAX_PLATFORMS"] == "cpu"


def test_failed_start_leaves_no_stale_configuration(tmp_path):
    import types

    from diffusion_lm.cli.arguments import RESOLVED, record_config

    def loaded(text):
        return types.SimpleNamespace(resolved=lambda: text)

    record_config(loaded("wrong"), tmp_path, claimed_by="run_card.json")
    record_config(loaded("right"), tmp_path, claimed_by="run_card.json")
    assert (tmp_path / RESOLVED).read_text() == "right"
    (tmp_path / "run_card.json").write_text("{}")
    record_config(loaded("another"), tmp_path, claimed_by="run_card.json")
    assert (tmp_path / RESOLVED).read_text() == "right"


def test_a_sampler_of_another_noise_process_is_an_error_and_recorded_with_force(folder, capsys):
    """A masked sampler on an autoregressive run gives plausible garbage: special ids agree, but not the process."""
    masked = ["decode", "--workdir", "run", "--task", "toy", "--limit", "1"]
    masked += ["--sampler", "gin/samplers/llada_low_confidence.gin"]
    message = fails(capsys, *masked)
    for part in ("no noise (next tokens", "MASK noise", "'causal' in training and 'full'", "--force"):
        assert part in message
    # The vocabulary of this run has no MASK, so forcing does not help.
    assert main([*masked, "--force"]) == 2
    assert "error: the vocabulary of the data has no MASK token" in capsys.readouterr().err
    assert main([*masked[:-1], "gin/samplers/sundae.gin", "--force"]) == 0
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert any("uniform noise" in one for one in line["unlike_training"])
    prefix = ["evaluate", "--workdir", "run", "--only", "decode/toy", "--gin.AutoregressiveSampler.visibility='prefix'"]
    # Training with the same configuration fails before its first step.
    train = ["train", "--gin_file", "run.gin", "--workdir", "prefixed", prefix[-1]]
    for command in (prefix, train):
        assert "visibility is 'causal' in training and 'prefix' in the sampler" in fails(capsys, *command)
    assert main([*prefix, "--force", "--json", str(folder / "forced.json")]) == 0
    conditions = json.loads((folder / "forced.json").read_text())["evaluations"]["decode/toy"]["conditions"]
    assert conditions["unlike_training"] == ["visibility is 'causal' in training and 'prefix' in the sampler"]
