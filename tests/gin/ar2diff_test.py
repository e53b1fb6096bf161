"""What the recipes of gin/recipes/ar2diff promise: arms that differ in what is studied and in nothing else."""

import dataclasses

import pytest

from diffusion_lm.cli import config
from diffusion_lm.recipes.comparison import Comparison

ARCHITECTURES = ("ar2diff/architectures.gin", "ar2diff/architectures_embedded.gin")
DECODING = ("ar2diff/decoding_ablation.gin", "ar2diff/decoding_ablation_embedded.gin")


def build(name):
    return config.load([f"gin/recipes/{name}"]).build(Comparison)


@pytest.mark.parametrize("recipe", ARCHITECTURES)
@pytest.mark.parametrize("objective", ["prefix", "span"])
def test_both_architectures_cut_and_split_text_alike(recipe, objective):
    stages = {stage.name: stage.run for stage in build(recipe).stages}
    one, two = (stages[f"pretrain_{name}_{objective}"].data for name in ("decoder_only", "encoder_decoder"))
    assert one.converter.max_piece(one.pretraining) == two.converter.max_piece(two.pretraining)
    assert dataclasses.replace(two, converter=one.converter) == one
    assert (one.encoder_length, two.encoder_length is None) == (None, False)


@pytest.mark.parametrize("recipe", ARCHITECTURES)
def test_architectures_are_tuned_and_scored_with_the_same_lengths(recipe):
    comparison = build(recipe)
    assert {arm.name for arm in comparison.arms} == {
        f"{layout}_{objective}" for layout in ("encoder_decoder", "decoder_only") for objective in ("prefix", "span")
    }
    for task in comparison.tasks:
        runs = [arm.stage_for(task.name).run for arm in comparison.arms]
        single = [run.data.with_encoder(False) for run in runs]
        assert all(data == single[0] for data in single)
        assert {(run.steps, run.batch_size, run.optimizer, run.objective) for run in runs} == {
            (runs[0].steps, runs[0].batch_size, runs[0].optimizer, runs[0].objective)
        }
        window = single[0].converter.target_window
        assert dataclasses.replace(task.data.converter, target_window=window) == single[0].converter


@pytest.mark.parametrize("recipe", ARCHITECTURES)
def test_the_encoder_decoder_is_the_same_network_twice(recipe):
    specs = {arm.name: arm.stage_for("qa").run.model.spec for arm in build(recipe).arms}
    single, double = specs["decoder_only_span"], specs["encoder_decoder_span"]
    assert double == dataclasses.replace(single, encoder_layers=single.num_layers, tied_embeddings=False)


@pytest.mark.parametrize("recipe", DECODING)
def test_arms_of_the_decoding_ablation_differ_in_steps_and_candidates_only(recipe):
    comparison = build(recipe)
    samplers = [arm.sampler for arm in comparison.arms]
    assert [(one.steps, one.candidates) for one in samplers] == [(5, 8), (10, 8), (20, 8), (10, 4), (10, 16)]
    assert len({dataclasses.replace(one, steps=1, candidates=1) for one in samplers}) == 1
    assert samplers[0].exit_tolerance is None
    assert all(arm.stage == comparison.arms[0].stage for arm in comparison.arms)


@pytest.mark.parametrize(("recipe", "study"), [(DECODING[0], "ar2diff_base.gin"), (DECODING[1], "quickstart.gin")])
def test_the_decoding_ablation_decodes_the_arm_of_the_main_study(recipe, study):
    decoded = build(recipe).arms[0]
    trained = next(arm for arm in build(study).arms if arm.name == "diffusion")
    for task in ("code", "qa"):
        assert decoded.stage_for(task) == trained.stage_for(task)


def test_speed_is_studied_to_4000_tokens_with_the_samplers_of_the_figure():
    study = build("ar2diff/speed.gin").speed
    assert study.lengths[-1] == 4000
    assert {arm.architecture.spec.vocab_size for arm in study.arms} == {256_000}
    assert [arm.family for arm in study.arms] == ["ar"] + ["diffusion"] * 4
    single = [arm.sampler for arm in study.arms if getattr(arm.sampler, "candidates", 0) == 1]
    assert [sampler.steps for sampler in single] == [10, 20, 50]


@pytest.mark.parametrize("size", ["base", "large", "xl"])
def test_adaptation_restarts_the_schedule_of_pretraining_or_continues_it(size):
    """The paper does not say which; `ADAPT_STEPS_BEFORE` chooses. Restarted starts at ten times the continued rate."""

    def schedule(name, bindings=()):
        comparison = config.load([f"gin/recipes/ar2diff_{size}.gin"], list(bindings)).build(Comparison)
        return {stage.name: stage.run for stage in comparison.stages}[name].optimizer.schedule

    for name in ("adapt_small", "adapt_large"):
        assert schedule(name).value(0, 1) == pytest.approx(1e-2)
        assert schedule(name) == schedule("pretrain_ar")
        continued = schedule(name, ["ADAPT_STEPS_BEFORE=1000000"])
        assert continued.value(0, 1) == pytest.approx(1e-3)
    assert schedule("pretrain_ar", ["ADAPT_STEPS_BEFORE=1000000"]).steps_before == 0


@pytest.mark.parametrize("recipe", ["ar2diff_base.gin", "ar2diff_large.gin", "ar2diff_xl.gin", *ARCHITECTURES[:1]])
def test_the_paper_scores_the_best_checkpoint_on_squad_and_mbpp(recipe):
    """Every 1,000 and every 50 steps (arXiv 2401.17181), on data that neither training nor the tables read."""
    comparison = build(recipe)
    found = {"qa": set(), "code": set(), "translation": set()}
    for arm in comparison.arms:
        for task in comparison.tasks:
            run = arm.stage_for(task.name).run
            best = run.checkpoint.best
            if best is None:
                found[task.name].add(None)
                continue
            evaluation = best.evaluation(run.evaluations)
            found[task.name].add((best.metric, best.mode, evaluation.every))
            (source,) = evaluation.task.data.sources
            assert source.folder not in {one.folder for one in (*run.data.sources, *task.data.sources)}
            assert dataclasses.replace(evaluation.task.data.converter) == task.data.converter
            sampler = arm.sampler_for(task.name)
            assert evaluation.sampler == sampler, "the sampler of the table"
    untrained = {None} if "untrained" in {arm.name for arm in comparison.arms} else set()
    assert found == {
        "qa": {("decode/qa_selection/f1", "max", 1000)} | untrained,
        "code": {("decode/code_selection/pass_at_k", "max", 50)} | untrained,
        "translation": {None},
    }


@pytest.mark.parametrize("recipe", ["quickstart.gin", "local_data.gin"])
def test_recipes_at_laptop_scale_score_the_last_checkpoint(recipe):
    assert not any(stage.run.checkpoint.best for stage in build(recipe).stages)


def test_arms_of_the_quickstart_are_the_graph_of_the_paper():
    """Per task, AR2Diff_N is fine-tuned from the adapted AR model, and all diffusion arms share one run."""
    arms = {arm.name: arm for arm in build("quickstart.gin").arms}
    before = {
        "ar": "pretrain_ar", "diffusion": "pretrain_diffusion", "ar2diff_0": "pretrain_ar",
        "ar2diff_small": "adapt_small", "ar2diff_large": "adapt_large",
    }  # fmt: skip
    for name, initial in before.items():
        for task in ("translation", "code", "qa"):
            stage = arms[name].stage_for(task)
            assert (stage.name, stage.initial.name) == (f"tune_{task}_{name}", initial)
            assert (stage.run == arms["diffusion"].stage_for(task).run) == (name != "ar")
