"""`evaluate --estimator` and `--suite`: likelihood, multiple choice and infilling with two nano runs, AR and masked."""

import contextlib
import dataclasses
import io
import json
import math

import numpy as np
import pytest
import sentencepiece

from diffusion_lm.cli.main import build_parser, main
from diffusion_lm.cli.run_folder import open_run
from diffusion_lm.core.alignment import Shifted
from diffusion_lm.core.rng import StreamKeys, example_number
from diffusion_lm.data.converters import SingleStreamConverter
from diffusion_lm.data.fitting import Example
from diffusion_lm.data.schema import Manifest, Record
from diffusion_lm.data.store import split_folder, write_records
from diffusion_lm.data.target_window import OracleLength
from diffusion_lm.data.vocabulary import Vocabulary
from diffusion_lm.evaluation.scoring import continuation_batch, score
from diffusion_lm.evaluation.scoring_estimators import ExactAutoregressive, UnweightedGrid
from diffusion_lm.samplers.autoregressive import AutoregressiveSampler
from diffusion_lm.samplers.masked import MaskedSampler
from diffusion_lm.samplers.unmasking import Ranked

RUN = """
from __gin__ import dynamic_registration
from diffusion_lm.data import grain_source
from diffusion_lm.data import target_window
from diffusion_lm.nn import transformer
include 'runs/train.gin'
include 'models/sizes/nano.gin'
include 'objectives/%s.gin'
VOCAB_SIZE = 64
TASK = 'toy'
INPUTS_LENGTH = 12
TARGET_LENGTH = 9
TRAIN_STEPS = 2
BATCH_SIZE = 4
TARGET_WINDOW = @target_window.%s()
transformer.TransformerSpec.num_layers = 1
transformer.TransformerSpec.vocab_multiple = 8
grain_source.GrainSource.root = 'data'
"""
SUITE = """
from __gin__ import dynamic_registration
from diffusion_lm.data import converters
from diffusion_lm.data import grain_source
from diffusion_lm.data import iterator
from diffusion_lm.data import target_window
from diffusion_lm.evaluation import generation
from diffusion_lm.evaluation import scoring_task
include 'scoring/diffullama_grid.gin'
include 'samplers/infilling.gin'
SUITE = (@pick/scoring_task.ScoringEvaluation(), @gaps/generation.GenerationEvaluation())
grain_source.GrainSource:
  split = 'validation'
  root = 'data'
pick/grain_source.GrainSource.task = 'pick_parts'
pick/converters.SingleStreamConverter:
  inputs_length = 12
  target_length = 9
pick/iterator.DataPipeline:
  sources = (@pick/grain_source.GrainSource(),)
  converter = @pick/converters.SingleStreamConverter()
pick/scoring_task.ScoringEvaluation:
  name = 'pick'
  data = @pick/iterator.DataPipeline()
  estimator = %ESTIMATOR
gaps/grain_source.GrainSource.task = 'gaps'
target_window.OracleLength.closing = False
gaps/converters.SingleStreamConverter:
  inputs_length = 12
  target_length = 4
  suffix_length = 6
  target_window = @target_window.OracleLength()
gaps/iterator.DataPipeline:
  sources = (@gaps/grain_source.GrainSource(),)
  converter = @gaps/converters.SingleStreamConverter()
gaps/generation.GenerationTask:
  name = 'gaps'
  data = @gaps/iterator.DataPipeline()
  metric = 'rouge'
gaps/generation.GenerationEvaluation:
  task = @gaps/generation.GenerationTask()
  sampler = %SAMPLER
"""
DECODING = """
from diffusion_lm.data import converters
from diffusion_lm.data import iterator
from diffusion_lm.evaluation import generation
from diffusion_lm.training import run
include 'samplers/mdlm_ancestral.gin'
toy/grain_source.GrainSource.task = 'toy'
toy/grain_source.GrainSource.split = 'validation'
toy/converters.SingleStreamConverter:
  inputs_length = 12
  target_length = 9
  target_window = @target_window.PadFilled()
toy/iterator.DataPipeline:
  sources = (@toy/grain_source.GrainSource(),)
  converter = @toy/converters.SingleStreamConverter()
generation.GenerationTask:
  name = 'toy'
  data = @toy/iterator.DataPipeline()
  metric = 'exact_match'
generation.GenerationEvaluation:
  task = @generation.GenerationTask()
  sampler = %SAMPLER
run.TrainRun.evaluations = (@generation.GenerationEvaluation(),)
"""
QUESTIONS = [(number, [str(number + 1), "seven", str(number + 2)]) for number in (12, 20, 31)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A directory with the task `toy`, the questions `pick`, and finished runs `exact` and `masked`."""
    folder, stream = tmp_path_factory.mktemp("scoring"), io.BytesIO()
    lines = [f"{number} plus {other} seven" for number in range(10, 40) for other in ("one", "two", "three")]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=stream, vocab_size=64, hard_vocab_limit=True, model_type="bpe",
        pad_id=0, eos_id=1, bos_id=2, unk_id=3, user_defined_symbols=["<mask>"], minloglevel=2,
    )  # fmt: skip
    vocabulary = Vocabulary(stream.getvalue())
    assert vocabulary.specials.mask_id == 4
    made = {("toy", "train"): [(n, str(n + 1), str(n + 1)) for n in range(10, 26)]}
    made["toy", "validation"] = made["toy", "train"][:5]
    made["pick", "validation"] = [(n, c[0], {"choices": c, "answer": 0}) for n, c in QUESTIONS]
    parts = [[*"13", " one"], ["se", "ven"], ["one"]]
    made["pick_parts", "validation"] = [(12, "13 one", {"choices": parts, "answer": 0})]
    made["gaps", "validation"] = [(n, "plus", "plus") for n in (12, 20)]
    for (task, split), examples in made.items():
        records = [
            Record(
                vocabulary.encode(f"{number} plus one"),
                vocabulary.encode(target),
                example_number(f"{task}/{split}/{number}"),
                f"{number} plus one",
                target,
                reference,
                vocabulary.encode("seven one") if task == "gaps" else (),
            )
            for number, target, reference in examples
        ]
        write_records(
            split_folder(task, split, folder / "data"),
            records,
            Manifest(task, split, vocabulary.specials),
            vocabulary=vocabulary,
        )
    with contextlib.chdir(folder):
        for name, objective, window in (("exact", "autoregressive", "ExactEos"), ("masked", "llada", "PadFilled")):
            (folder / f"{name}.gin").write_text(RUN % (objective, window))
            assert main(["train", "--gin_file", f"{name}.gin", "--workdir", name]) == 0
    return folder


@pytest.fixture(autouse=True)
def here(folder, monkeypatch):
    monkeypatch.chdir(folder)


def evaluate(workdir, file, *flags, path="scores.json"):
    arguments = ["evaluate", "--workdir", workdir, "--estimator", f"gin/scoring/{file}.gin", "--json", path]
    assert main([*arguments, *flags]) == 0
    with open(path, encoding="utf-8") as stream:
        ((name, result),) = json.load(stream)["evaluations"].items()
    return name, result


def opened_run(workdir):
    return open_run(build_parser().parse_args(["evaluate", "--workdir", workdir]), bindings=())


def test_exact_scores_are_the_training_bound(folder, capsys):
    name, result = evaluate("exact", "autoregressive", path="exact.json")
    printed = capsys.readouterr().out
    assert name == "score/toy/validation"
    assert main(["evaluate", "--workdir", "exact", "--json", "bound.json"]) == 0
    bound = json.loads((folder / "bound.json").read_text())["evaluations"]["bound"]["values"]
    values = result["values"]
    assert values["nats_per_token"] == pytest.approx(bound["nll_per_real_token"], rel=1e-5)
    assert values["bits_per_token"] == pytest.approx(bound["bits_per_real_token"], rel=1e-5)
    assert values["bytes"] == 5 * 2, "two-digit numbers"
    assert values["bits_per_byte"] == pytest.approx(values["bits_per_token"] * values["tokens"] / 10)
    assert values["perplexity_exact"] == pytest.approx(math.exp(values["nats_per_token"]))
    assert (values["draws"], values["draw_error"]) == (1, 0)
    assert result["conditions"]["kind"] == "exact"
    assert result["conditions"]["tokeniser"]["size"] == 64
    assert "exact: -log p" in printed
    assert "tokenizer" in printed
    assert max(map(len, printed.splitlines())) <= 120
    kept = json.loads((folder / result["file"]).read_text())
    assert kept["values"] == values
    assert kept["configuration"]["step"] == 2


def test_rolling_scores_the_stored_targets_without_a_window(folder, capsys):
    """Targets that fit in one row: the stored tokens without EOS, each scored once after the whole prompt."""
    name, result = evaluate("exact", "autoregressive", "--rolling", "--context", "3", path="rolling.json")
    assert "at least 3 are context" in capsys.readouterr().out
    assert name == "rolling/toy/validation"
    assert result["conditions"]["window"] == 21
    opened = opened_run("exact")
    vocabulary, nats, tokens = opened.run.data.vocabulary, 0.0, 0
    for number in range(10, 15):
        target = vocabulary.encode(str(number + 1))
        row = continuation_batch([vocabulary.encode(f"{number} plus one")], [target], 22, special=vocabulary.specials)
        nats -= score(ExactAutoregressive(), opened.load(), row, StreamKeys.create(0)).log_likelihood[0]
        tokens += len(target)
    assert result["values"]["tokens"] == tokens
    assert result["values"]["nats_per_token"] == pytest.approx(nats / tokens, rel=1e-5)


def test_an_autoregressive_run_scores_completions_of_a_masked_run(folder, capsys):
    (folder / "judged.gin").write_text(RUN % ("llada", "PadFilled") + DECODING)
    command = ["evaluate", "--workdir", "masked", "--gin_file", "judged.gin", "--limit", "3", "--json", "judged.json"]
    assert main([*command, "--judge", "exact"]) == 0
    assert "unigram_entropy" in capsys.readouterr().out
    (result,) = json.loads((folder / "judged.json").read_text())["evaluations"].values()
    values = result["values"]
    assert values["texts"] == 3
    assert 1.0 < values["generative_perplexity"] == pytest.approx(math.exp(values["generative_nats_per_token"]))
    assert {"unigram_entropy", "distinct_1", "distinct_4", "mean_length", "empty"} <= set(values)
    assert result["conditions"]["sampler"]["decoding"]["temperature"] == 1.0
    assert result["conditions"]["judge"]["step"] == 2
    assert json.loads((folder / result["file"]).read_text())["values"] == values
    assert "no exact likelihood" in fails(capsys, *command[:-2], "--judge", "masked")
    assert "no evaluation of the run decodes" in fails(capsys, "evaluate", "--workdir", "masked", "--judge", "exact")
    both = ["--judge", "exact", "--estimator", "gin/scoring/autoregressive.gin"]
    assert "--judge cannot be combined" in fails(capsys, *command[:-2], *both)
    assert "--rolling requires an estimator" in fails(capsys, "evaluate", "--workdir", "masked", "--rolling")


def test_bounds_of_a_masked_run_agree_within_their_errors(folder, capsys):
    """Two estimators of the same integral and the midpoint rule of training agree, with scored padding."""
    values = {}
    for file, flags in (
        ("llada_exact_count", ["--gin.ExactCount.draws=64"]),
        ("dream_stratified", ["--gin.StratifiedRates.draws=192", "--gin.StratifiedRates.alignment=@SamePosition()"]),
    ):
        _, result = evaluate("masked", file, *flags, path=f"{file}.json")
        values[file] = result["values"]
        assert result["conditions"]["kind"] == "nelbo"
        assert "perplexity_bound" in result["values"]
    assert "warning" not in capsys.readouterr().err
    first, second = values.values()
    spread = math.hypot(first["draw_error"], second["draw_error"])
    assert 0 < spread < 0.1 * first["nats_per_token"]
    assert abs(first["nats_per_token"] - second["nats_per_token"]) < 5 * spread
    assert first["tokens"] == values["dream_stratified"]["tokens"]


def test_choices_are_scored_without_eos_on_common_noise(folder, capsys):
    name, result = evaluate("exact", "autoregressive", "--task", "pick", path="pick.json")
    assert name == "score/pick/validation"
    values = result["values"]
    assert values["examples"] == 3
    assert values["bytes"] == 6
    # The same rows laid out by another function, and the preferred choices by their definition.
    opened = opened_run("exact")
    vocabulary, right, nats, tokens = opened.run.data.vocabulary, [], 0.0, 0
    for number, choices in QUESTIONS:
        rows = continuation_batch(
            [vocabulary.encode(f"{number} plus one")] * 3,
            [vocabulary.encode(c) for c in choices],
            22,
            special=vocabulary.specials,
        )
        scores = score(ExactAutoregressive(), opened.load(), rows, StreamKeys.create(0))
        right.append([
            np.argmax(scores.log_likelihood) == 0,
            np.argmax(scores.log_likelihood / [len(c) for c in choices]) == 0,
        ])  # fmt: skip
        nats, tokens = nats - scores.log_likelihood[0], tokens + scores.tokens[0]
    assert values["nats_per_token"] == pytest.approx(nats / tokens, rel=1e-5)
    assert [values["acc"], values["acc_norm"]] == pytest.approx(np.mean(right, axis=0))
    assert values["acc_bytes"] == values["acc_norm"], "all ASCII"


def test_guidance_changes_masked_choices_and_files_do_not_collide(folder, capsys):
    flags = ["--task", "pick", "--batch_size", "3", "--gin.ExactCount.draws=4"]
    _, plain = evaluate("masked", "llada_exact_count", *flags, path="plain.json")
    _, guided = evaluate("masked", "llada_exact_count", *flags, "--gin.ExactCount.guidance=2.0", path="guided.json")
    assert plain["values"]["nats_per_token"] != guided["values"]["nats_per_token"]
    assert plain["file"] != guided["file"]
    assert json.loads((folder / plain["file"]).read_text())["values"] == plain["values"]
    _, again = evaluate("masked", "llada_exact_count", *flags, "--batch_size", "2", path="plain.json")
    assert again["file"] == plain["file"]
    assert again["values"] == pytest.approx(plain["values"], rel=1e-5), "results do not depend on the batch size"


def fails(capsys, *argv):
    capsys.readouterr()
    assert main(list(argv)) == 2
    return next(line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))


def test_a_file_of_another_configuration_is_not_overwritten(folder, capsys):
    flags = ["evaluate", "--workdir", "exact", "--estimator", "gin/scoring/autoregressive.gin", "--json", "kept.json"]
    assert main(flags) == 0
    before = (folder / "kept.json").read_text()
    message = fails(capsys, *flags, "--limit", "2")
    assert "kept.json holds scores of another configuration" in message
    assert "limit is None there and 2 here" in message
    assert (folder / "kept.json").read_text() == before
    (folder / "notes.json").write_text("[1, 2]")
    assert "notes.json holds" in fails(capsys, *flags[:-1], "notes.json")


def test_estimators_for_other_noise_are_errors_and_other_alignments_are_reported(folder, capsys):
    flags = ["evaluate", "--workdir", "exact", "--estimator"]
    assert "trained without MASK" in fails(capsys, *flags, "gin/scoring/llada_exact_count.gin")
    assert "the gin files do not define the macro ESTIMATOR" in fails(capsys, *flags, "gin/models/sizes/nano.gin")
    masked = ["evaluate", "--workdir", "masked", "--estimator", "gin/scoring/diffullama_grid.gin", "--limit", "1"]
    assert main([*masked, "--gin.UnweightedGrid.draws=2", "--json", "shift.json"]) == 0
    captured = capsys.readouterr()
    assert "warning: alignment is" in captured.err
    assert "perplexity" not in captured.out
    (result,) = json.loads((folder / "shift.json").read_text())["evaluations"].values()
    assert "alignment" in result["conditions"]["unlike_training"][0]


def test_a_suite_does_not_depend_on_the_evaluations_of_the_run(folder, capsys):
    (folder / "suite.gin").write_text(SUITE)
    command = ["evaluate", "--workdir", "masked", "--suite", "suite.gin"]
    assert main([*command, "--json", "suite.json", "--gin.UnweightedGrid.draws=8"]) == 0
    assert "warning: pick: alignment is" in capsys.readouterr().err
    found = json.loads((folder / "suite.json").read_text())["evaluations"]
    assert set(found) == {"pick", "decode/gaps/oracle_length"}
    assert found["decode/gaps/oracle_length"]["conditions"]["oracle"] == "length"
    assert "rougeL" in found["decode/gaps/oracle_length"]["values"]
    for name, by in (("pick", "UnweightedGrid"), ("decode/gaps/oracle_length", "MaskedSampler")):
        kept = json.loads((folder / found[name]["file"]).read_text())
        assert by in found[name]["file"]
        assert kept["values"] == found[name]["values"]
    assert "holds scores of another configuration" in fails(capsys, *command, "--json", "suite.json")
    values = found["pick"]["values"]
    assert values["draws"] == 8
    # A choice of several pieces has the tokens of all of them; choices are compared by loss per token.
    opened = opened_run("masked")
    vocabulary = opened.run.data.vocabulary
    choices = [[*vocabulary.encode("1"), *vocabulary.encode("3"), *vocabulary.encode(" one")]]
    choices += [[*vocabulary.encode("se"), *vocabulary.encode("ven")], vocabulary.encode("one")]
    rows = continuation_batch([vocabulary.encode("12 plus one")] * 3, choices, 22, special=vocabulary.specials)
    rows = rows.replace(example_ids=np.full(rows.tokens.shape, example_number("pick_parts/validation/12"), np.uint32))
    scores = score(UnweightedGrid(draws=8, alignment=Shifted()), opened.load(), rows, StreamKeys.create(0))
    assert values["tokens"] == scores.tokens[0]
    assert values["pseudo_nats_per_token"] == pytest.approx(-scores.log_likelihood[0] / scores.tokens[0], rel=1e-5)
    assert values["acc_tokens"] == (np.argmax(scores.log_likelihood / scores.tokens) == 0)

    assert "Pass only one of" in fails(capsys, *command, "--estimator", "gin/scoring/llada_exact_count.gin")
    (folder / "none.gin").write_text("SUITE = (1, 2)\n")
    assert "SUITE = (1, 2): must be a non-empty tuple" in fails(capsys, *command[:-1], "none.gin")
    assert "do not define the macro SUITE" in fails(capsys, *command[:-1], "gin/models/sizes/nano.gin")


def test_only_bidirectional_models_condition_on_the_suffix(folder):
    converter = SingleStreamConverter(6, 4, OracleLength(closing=False), suffix_length=4)
    vocabulary = opened_run("masked").run.data.vocabulary
    before, gap = (np.asarray(vocabulary.encode(text), np.int32) for text in ("12 plus", "one"))
    behind = [np.asarray(vocabulary.encode(text), np.int32) for text in ("seven", "two one")]
    examples = [Example(before, gap, 5, suffix=suffix) for suffix in (*behind, np.zeros(0, np.int32))]
    prompts = converter.prompts(examples, vocabulary.specials)
    whole = AutoregressiveSampler().generate(opened_run("exact").load(), prompts, StreamKeys.create(0))
    assert len(np.unique(whole.scores)) == 1, "causal: the same row three times"
    prefix, model = AutoregressiveSampler(visibility="prefix"), opened_run("exact").load()
    seen = prefix.generate(model, prompts, StreamKeys.create(0))
    assert len(np.unique(seen.scores)) == 3, "a prefix LM attends to all conditioning, also after the gap"
    slow = dataclasses.replace(prefix, use_cache=False).generate(model, prompts, StreamKeys.create(0))
    np.testing.assert_array_equal(seen.tokens, slow.tokens)
    np.testing.assert_allclose(seen.scores, slow.scores, rtol=1e-5)
    masked = MaskedSampler(unmask=Ranked())
    filled = masked.generate(opened_run("masked").load(), prompts, StreamKeys.create(0))
    assert len(np.unique(filled.scores)) == 3
    starts = 1 + len(before)
    np.testing.assert_array_equal(filled.tokens[:, :starts], prompts.tokens[:, :starts])
    np.testing.assert_array_equal(filled.tokens[:, starts + len(gap) :], prompts.tokens[:, starts + len(gap) :])


def test_infilling_fills_a_gap(folder, capsys):
    lines = [
        {"inputs": "12 plus", "suffix": "seven", "slots": 3},
        {"inputs": "20", "suffix": "", "slots": 1},
        {"inputs": "31 plus", "suffix": "one one", "slots": 2},
    ]
    (folder / "gaps.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = ["decode", "--workdir", "masked", "--sampler", "gin/samplers/infilling.gin", "--input"]
    capsys.readouterr()
    assert main([*command, "gaps.jsonl", "--batch_size", "2"]) == 0
    out = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [one["tokens"] for one in out] == [3, 1, 2], "EOS and PAD are forbidden, so the whole gap is filled"
    assert [one.get("suffix") for one in out] == ["seven", None, "one one"]
    assert [one["inputs"] for one in out] == [line["inputs"] for line in lines]
    assert all("oracle" not in one for one in out), "a length given by the user is not an oracle"
    for bad, what in (
        ([lines[0], {"inputs": "20"}], "1 of 2 prompts have the field"),
        ([{"inputs": "20", "slots": 0}], "line 1: suffix='', slots=0: suffix must be a string"),
        ([{"inputs": "20", "suffix": 7}], "line 1: suffix=7"),
    ):
        (folder / "gaps.jsonl").write_text("".join(json.dumps(line) + "\n" for line in bad))
        assert what in fails(capsys, *command, "gaps.jsonl")
