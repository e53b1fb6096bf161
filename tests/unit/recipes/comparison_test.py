"""A whole comparison on a nano network: shared stages, skipping, interruption, refusal of another configuration."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import sentencepiece

from diffusion_lm.architectures.base import BoundModel
from diffusion_lm.architectures.single_stream import SingleStream
from diffusion_lm.core.errors import ConfigError
from diffusion_lm.core.rng import example_number
from diffusion_lm.data.converters import SingleStreamConverter
from diffusion_lm.data.grain_source import GrainSource
from diffusion_lm.data.iterator import DataPipeline
from diffusion_lm.data.schema import Manifest, Record
from diffusion_lm.data.store import split_folder, write_records
from diffusion_lm.data.target_window import OracleLength, PadFilled
from diffusion_lm.data.vocabulary import Vocabulary
from diffusion_lm.evaluation.generation import GenerationEvaluation, GenerationTask, generate
from diffusion_lm.evaluation.speed import SpeedArm, SpeedStudy, measure
from diffusion_lm.nn.transformer import TransformerSpec
from diffusion_lm.objectives.autoregressive import Autoregressive
from diffusion_lm.objectives.sundae import Sundae
from diffusion_lm.recipes import tables
from diffusion_lm.recipes.compare import compare, run_stage
from diffusion_lm.recipes.comparison import Arm, Comparison
from diffusion_lm.recipes.results import assemble
from diffusion_lm.recipes.stage import Stage, stage_graph
from diffusion_lm.samplers.autoregressive import AutoregressiveSampler
from diffusion_lm.samplers.canvas import CanvasSampler
from diffusion_lm.training.checkpoint import CheckpointPolicy
from diffusion_lm.training.run import TrainRun
from diffusion_lm.training.selection import BestCheckpoint
from diffusion_lm.training.trained import trained_model

COLOURS = ("red", "green", "blue", "black", "white")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Three splits of a tiny task, `repeat: COLOUR` -> COLOUR."""
    folder = tmp_path_factory.mktemp("data")
    lines = folder / "lines.txt"
    lines.write_text("".join(f"repeat: {colour}\n{colour}\n" for colour in COLOURS) * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(lines), model_prefix=str(folder / "tiny"), vocab_size=300, byte_fallback=True, hard_vocab_limit=False,
        pad_id=0, eos_id=1, bos_id=2, unk_id=3, user_defined_symbols=["<mask>"], minloglevel=2,
    )  # fmt: skip
    vocabulary = Vocabulary.load(folder / "tiny.model")
    for split, count in (("train", 40), ("validation", 4), ("test", 6)):
        records = [
            Record(
                inputs=np.asarray(vocabulary.encode(f"repeat: {COLOURS[i % 5]}"), np.int32),
                targets=np.asarray(vocabulary.encode(COLOURS[i % 5]), np.int32),
                example_id=example_number(f"repeat/{split}/{i}"),
                inputs_text=f"repeat: {COLOURS[i % 5]}",
                targets_text=COLOURS[i % 5],
                reference=COLOURS[i % 5],
            )
            for i in range(count)
        ]
        manifest = Manifest("repeat", split, vocabulary.specials)
        write_records(split_folder("repeat", split, folder), records, manifest, vocabulary=vocabulary)
    return folder


@pytest.fixture(scope="module")
def comparison(root):
    specials = GrainSource("repeat", "train", root=root).manifest.specials
    spec = TransformerSpec(
        vocab_size=specials.vocab_size, num_layers=1, model_dim=16, num_heads=2, head_dim=8, mlp_dim=32
    )

    def data(split="train", **window):
        return DataPipeline(GrainSource("repeat", split, root=root), SingleStreamConverter(16, 8, **window))

    def run(objective, steps, **window):
        return TrainRun(SingleStream(spec), objective, data(**window), steps=steps, batch_size=4, log_every=2)

    pretrained = Stage("pretrain", run(Autoregressive(), 4))
    diffusion = Stage("tune_diffusion", run(Sundae(), 3, target_window=PadFilled()), initial=pretrained)
    autoregressive = Stage("tune_ar", run(Autoregressive(), 3), initial=pretrained)
    return Comparison(
        name="tiny",
        arms=(
            Arm("ar", autoregressive, AutoregressiveSampler(), family="ar"),
            Arm("ar2diff_0", {"repeat": diffusion}, {"repeat": CanvasSampler(steps=2, candidates=2)}),
        ),
        tasks=(GenerationTask("repeat", data("test"), "exact_match", batch_size=4),),
        bound_limit=4,
        resamples=50,
        shown=2,
    )


@pytest.fixture(scope="module")
def undisturbed(comparison, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed")
    compare(comparison, workdir, log=lambda line: None)
    return workdir


def test_a_shared_stage_stands_once_and_before_its_children(comparison):
    assert [stage.name for stage in comparison.stages] == ["pretrain", "tune_ar", "tune_diffusion"]


def test_an_oracle_stands_in_the_label_and_in_every_cell(comparison):
    """From scored tasks to results.json and the tables that print its labels."""
    task = comparison.tasks[0]
    converter = dataclasses.replace(task.data.converter, target_window=OracleLength())
    told = dataclasses.replace(task, data=dataclasses.replace(task.data, converter=converter))
    found = {
        "statistics": [[1.0]] * 6,
        "value": 100.0,
        "secondary": {},
        "bound": None,
        "forward_passes": 1.0,
        "generated_tokens": 1.0,
    }
    for one, oracle, label in ((told, "length", "repeat (oracle length)"), (task, None, "repeat")):
        changed = dataclasses.replace(comparison, tasks=(one,))
        results = assemble(changed, [{(arm.name, "repeat"): found for arm in comparison.arms}])
        assert results["tasks"][0]["label"] == label
        assert results["tasks"][0]["oracle"] == oracle
        assert {cell["repeat"]["conditions"]["oracle"] for cell in results["cells"].values()} == {oracle}
        assert ("oracle length" in tables.quality_markdown(results)) == (oracle is not None)


def test_results_hold_values_intervals_conditions_and_bounds(comparison, undisturbed):
    results = json.loads((undisturbed / "results.json").read_text())
    cell = results["cells"]["ar2diff_0"]["repeat"]
    assert cell["low"] <= cell["value"] <= cell["high"]
    assert cell["examples"] == 6
    assert cell["conditions"]["steps"] == 2
    assert cell["conditions"]["forward_passes_per_sample"] == 4
    assert results["bounds"]["ar"]["repeat"]["kind"] == "exact"
    assert results["bounds"]["ar2diff_0"]["repeat"]["kind"] == "pseudo"
    budgets = {arm["name"]: arm["train_tokens"] for arm in results["arms"]}
    assert budgets["ar"] == (4 + 3) * 4 * 25
    assert (undisturbed / "report" / "index.html").stat().st_size > 10_000


def test_what_windows_cut_is_in_results_table_report_and_log(comparison, undisturbed, tmp_path):
    """Counted for the examples that are decoded, and for every stage's training data."""
    assert json.loads((undisturbed / "results.json").read_text())["cuts"] == []
    stage = Stage("short", dataclasses.replace(comparison.stages[0].run, steps=0))
    narrow = SingleStreamConverter(4, 2, too_long="truncate")
    stage = Stage("short", dataclasses.replace(stage.run, data=dataclasses.replace(stage.run.data, converter=narrow)))
    task = comparison.tasks[0]
    task = dataclasses.replace(task, data=dataclasses.replace(task.data, converter=narrow), limit=2)
    arm = Arm("ar", stage, AutoregressiveSampler(), family="ar")
    lines = []
    result = compare(dataclasses.replace(comparison, arms=(arm,), tasks=(task,)), tmp_path, log=lines.append)
    texts = {cut["used_by"]: cut["text"] for cut in result.results["cuts"] if cut["part"] == "prompts"}
    field = "tokens (SingleStreamConverter.inputs_length)"
    assert texts == {
        "stage short": f"repeat/train: 40 of 40 prompts truncated on the left to 4 {field}",
        "task repeat": f"repeat/test: 2 of 2 prompts truncated on the left to 4 {field}",
        "bound repeat": f"repeat/test: 4 of 4 prompts truncated on the left to 4 {field}",
    }
    for used_by, text in texts.items():
        assert f"warning: {text}: {used_by}" in lines
        for written in ((tmp_path / "results.md").read_text(), (tmp_path / "report" / "index.html").read_text()):
            assert text.partition(" (")[0] in written


def test_a_finished_comparison_trains_nothing_again(comparison, undisturbed):
    before = {path: path.stat().st_mtime_ns for path in undisturbed.glob("stages/*/metrics.jsonl")}
    compare(comparison, undisturbed, log=lambda line: None)
    assert before == {path: path.stat().st_mtime_ns for path in undisturbed.glob("stages/*/metrics.jsonl")}


@pytest.mark.parametrize("moment", ["tune_diffusion", "evaluate  ar2diff_0"])
def test_an_interrupted_comparison_ends_with_the_same_results(comparison, undisturbed, tmp_path, moment):
    class Interrupted(Exception):
        pass

    def stop(line):
        if moment in line:
            raise Interrupted

    with pytest.raises(Interrupted):
        compare(comparison, tmp_path, log=stop)
    compare(comparison, tmp_path, log=lambda line: None)
    assert (tmp_path / "results.json").read_bytes() == (undisturbed / "results.json").read_bytes()


@pytest.fixture
def selecting(comparison):
    """Returns `f(split)`: the comparison whose AR arm hands on its best checkpoint on that split of the task."""

    def make(split):
        stage, (task,) = comparison.arms[0].stage, comparison.tasks
        source = dataclasses.replace(task.data.sources[0], split=split)
        held_out = dataclasses.replace(task, name="held_out", data=dataclasses.replace(task.data, sources=(source,)))
        evaluation = GenerationEvaluation(held_out, AutoregressiveSampler(), every=1)
        policy = CheckpointPolicy(best=BestCheckpoint("decode/held_out/exact_match"))
        run = dataclasses.replace(stage.run, evaluations=(evaluation,), checkpoint=policy)
        arm = dataclasses.replace(comparison.arms[0], stage=dataclasses.replace(stage, run=run))
        return dataclasses.replace(comparison, arms=(arm, comparison.arms[1]))

    return make


def test_the_best_checkpoint_is_scored_and_results_and_report_say_so(selecting, undisturbed, tmp_path):
    """Untrained networks match nothing, so all steps tie and the first is selected."""
    shutil.copytree(undisturbed / "stages" / "pretrain", tmp_path / "stages" / "pretrain")
    comparison = dataclasses.replace(selecting("validation"), replicates=2)
    result = compare(comparison, tmp_path, log=lambda line: None)
    cell, other = (result.results["cells"][name]["repeat"] for name in ("ar", "ar2diff_0"))
    assert (cell["selected_step"], cell["selected_by"]) == ([1, 1], "decode/held_out/exact_match")
    assert "selected_step" not in other
    one = json.loads((tmp_path / "evaluations" / "ar" / "repeat.json").read_text())
    assert one["selected_step"] == 1
    (task,), stage = comparison.tasks, comparison.arms[0].stage
    model = trained_model(stage.run, tmp_path / "stages" / "tune_ar", step=1)
    assert [list(texts) for texts in generate(model, AutoregressiveSampler(), task).predictions] == one["predictions"]
    card = next(arm for arm in result.results["arms"] if arm["name"] == "ar")
    assert [stage.get("selected_by") for stage in card["stages"]] == [None, "decode/held_out/exact_match"]
    sentence = "ar on repeat: checkpoint at steps 1, 1 of 3, selected by decode/held_out/exact_match."
    assert sentence in result.table.read_text().replace("\\_", "_")
    assert sentence in result.report.read_text()


def test_checkpoints_are_never_selected_on_what_the_comparison_scores(selecting):
    with pytest.raises(
        ConfigError, match=r"'tune_ar' selects .* on repeat/test, which the task 'repeat' scores.*another split"
    ):
        selecting("test")


def test_a_network_that_holds_nan_is_not_published(comparison, undisturbed, tmp_path, break_checkpoint):
    shutil.copytree(undisturbed / "stages", tmp_path / "stages")
    break_checkpoint(tmp_path / "stages" / "tune_ar", 3)
    with pytest.raises(ConfigError, match=r"stages/tune_ar/checkpoints/3 holds NaN or Inf .*final_norm/scale"):
        compare(comparison, tmp_path, log=lambda line: None)
    assert not (tmp_path / "results.json").exists()


def test_replicates_repeat_all_with_other_seeds_and_are_averaged(comparison, undisturbed, tmp_path):
    twice = dataclasses.replace(comparison, replicates=2)
    result = compare(twice, tmp_path, log=lambda line: None)
    for arm in comparison.arms:
        first = (tmp_path / "evaluations" / arm.name / "repeat.json").read_bytes()
        assert first == (undisturbed / "evaluations" / arm.name / "repeat.json").read_bytes()
        found = [
            json.loads((folder / "evaluations" / arm.name / "repeat.json").read_text())
            for folder in (tmp_path, tmp_path / "replicate_1")
        ]
        cell, bound = result.results["cells"][arm.name]["repeat"], result.results["bounds"][arm.name]["repeat"]
        assert cell["replicates"] == [one["value"] for one in found]
        assert cell["value"] == pytest.approx(np.mean(cell["replicates"]))
        assert found[0]["bound"]["loss"] != found[1]["bound"]["loss"]
        assert bound["loss"] == pytest.approx(np.mean([one["bound"]["loss"] for one in found]))
        assert bound["kind"] == found[0]["bound"]["kind"]
    cards = [
        json.loads((folder / "stages" / "pretrain" / "run_card.json").read_text())
        for folder in (tmp_path, tmp_path / "replicate_1")
    ]
    assert len({json.dumps(card, sort_keys=True) for card in cards}) == 2
    assert "2 replicates" in result.table.read_text()


def test_replicates_share_no_seed(comparison):
    seeds = set()
    for index in range(3):
        replicate = comparison.replicate(index)
        assert [stage.name for stage in replicate.stages] == [stage.name for stage in comparison.stages]
        seeds |= {(stage.run.seed, stage.run.data.seed, replicate.seed) for stage in replicate.stages}
    assert comparison.replicate(0) is comparison
    assert len(seeds) == 3
    with pytest.raises(ConfigError, match=r"Comparison\.replicates"):
        dataclasses.replace(comparison, replicates=0)


def test_a_folder_of_another_comparison_is_refused(comparison, undisturbed):
    with pytest.raises(ConfigError, match="another configuration"):
        compare(dataclasses.replace(comparison, seed=1), undisturbed, log=lambda line: None)


def test_equal_names_must_mean_equal_stages(comparison):
    one = comparison.stages[0]
    other = dataclasses.replace(one, run=dataclasses.replace(one.run, steps=5))
    with pytest.raises(ConfigError, match=r"run\.steps"):
        stage_graph([one, other])


def test_a_stage_name_must_be_a_folder_name(comparison):
    with pytest.raises(ConfigError, match="directory name"):
        Stage("a/b", comparison.stages[0].run)


def test_a_task_without_its_stage_is_named(comparison):
    arm = Arm("lost", {"other": comparison.stages[0]}, AutoregressiveSampler())
    with pytest.raises(ConfigError, match="'repeat'"):
        arm.stage_for("repeat")


def test_T40_completions_do_not_depend_on_the_batch(comparison, undisturbed):
    task, arm = comparison.tasks[0], comparison.arms[1]
    stage = arm.stage_for("repeat")
    model = BoundModel(stage.run.model, run_stage(stage, undisturbed))
    whole = generate(model, arm.sampler_for("repeat"), task)
    single = generate(model, arm.sampler_for("repeat"), dataclasses.replace(task, batch_size=1, limit=3))
    assert whole.predictions[:3] == single.predictions
    assert len(whole.records) == 6


def test_speed_arms_run_every_step_and_fill_the_window(comparison):
    model = comparison.stages[0].run.model
    study = SpeedStudy(
        arms=(
            SpeedArm("ar", "ar", model, AutoregressiveSampler()),
            SpeedArm("diffusion", "diffusion", model, CanvasSampler(steps=3, candidates=2)),
        ),
        lengths=(4, 6),
        prompt_length=3,
        repeats=1,
    )
    passes = [(row["label"], row["length"], row["forward_passes"]) for row in measure(study)["rows"]]
    assert passes == [("ar", 4, 4), ("diffusion", 4, 6), ("ar", 6, 6), ("diffusion", 6, 6)]
