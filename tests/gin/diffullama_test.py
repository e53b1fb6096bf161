"""The recipes of DiffuGPT and DiffuLLaMA say what the paper says (arXiv 2410.17891)."""

import pytest

from diffusion_lm.architectures.lora import WithLoRA
from diffusion_lm.architectures.single_stream import SingleStream
from diffusion_lm.cli import config
from diffusion_lm.cli.arguments import build_root
from diffusion_lm.core.alignment import SamePosition, Shifted
from diffusion_lm.noise.weighting import InverseRate, Nelbo
from diffusion_lm.parallel.mesh import MeshSpec
from diffusion_lm.parallel.rules import LogicalRules
from diffusion_lm.planning.estimates import layout

FOLDER = "gin/recipes/diffullama"


def build(name, *files, bindings=()):
    return build_root(config.load([f"{FOLDER}/{name}.gin", *files], list(bindings)))


@pytest.mark.parametrize(
    ("name", "context", "batch", "steps", "mask", "peak", "warmup", "annealing"),
    [
        ("diffugpt_small", 512, 256, 1_000_000, 10541, 3e-4, 2000, 10_000),
        ("diffugpt_medium", 1024, 1280, 160_000, 50257, 3e-4, 2000, 10_000),
        ("diffullama_7b", 2048, 60 * 4 * 64, 20_000, 811, 2e-5, 0, None),
    ],
)
def test_adaptations(name, context, batch, steps, mask, peak, warmup, annealing):
    run = build(name, bindings=["INITIAL='imported'"])
    assert (run.data.row_length, run.batch_size, run.steps, run.initial) == (context, batch, steps, "imported")
    assert run.data.pack
    assert {source.chunk_length for source in run.data.sources} == {context - 1}
    objective, schedule = run.objective, run.optimizer.schedule
    assert objective.needs().mask_token
    assert (objective.alignment, objective.weighting, objective.normaliser) == (Shifted(), Nelbo(), "scored")
    assert (objective.annealing.steps if objective.annealing else None) == annealing
    assert schedule.value(steps // 2 if warmup == 0 else warmup, steps) == pytest.approx(peak)
    assert run.optimizer.weight_decay == 0
    assert run.model.spec.compute_dtype == "bfloat16"
    assert not run.model.spec.max_positions or run.model.spec.max_positions >= context


def test_code_loss_is_one_file_away_and_keeps_the_annealing():
    run = build("diffugpt_small", "gin/objectives/diffullama_code.gin")
    assert (run.objective.weighting, run.objective.normaliser) == (InverseRate(), "replaced")
    assert run.objective.annealing.steps == 10_000


def test_mixture_of_the_7b():
    run = build("diffullama_7b")
    assert [source.task for source in run.data.sources] == ["slimpajama", "starcoder"]
    assert run.data.weights == (0.693584, 0.306416)
    assert run.batch_size == 60 * 4 * 64
    assert run.batch_size // run.microbatches == 12 * 64 == 3 * 256, "what 64 chips of v5p and 256 of v5e hold"


@pytest.mark.parametrize(
    ("size", "vocabulary", "total"),
    [("gpt2_small", 50257, 124_439_808), ("gpt2_medium", 50257, 354_823_168), ("llama2_7b", 32000, 6_738_415_616)],
)
def test_sizes_have_the_parameters_of_the_released_models(size, vocabulary, total):
    files = ["gin/models/decoder_only.gin", f"gin/models/sizes/{size}.gin"]
    loaded = config.load(files, [f"VOCAB_SIZE={vocabulary}", "TransformerSpec.vocab_multiple=1"], macros=["MODEL"])
    assert loaded.build_macro("MODEL").count_parameters()["total"] == total


def test_ablations_differ_in_one_thing_each():
    comparison = build("gsm8k_symbolic", bindings=["INITIAL='gpt2'", "ADAPTED='diffugpt'"])
    (task,) = comparison.tasks
    arms = {arm.name: arm for arm in comparison.arms}
    stages = {name: arm.stage_for(task.name) for name, arm in arms.items()}
    initial = {name: stage.initial for name, stage in stages.items()}
    assert initial == {
        "scratch_ar": None,
        "scratch": None,
        "ar": "gpt2",
        "no_shift": "gpt2",
        "no_annealing": "gpt2",
        "full": "gpt2",
        "adapted": "diffugpt",
    }
    runs = {name: stage.run for name, stage in stages.items()}
    assert (
        len({(run.model, run.optimizer, run.steps, run.batch_size, run.data.row_length) for run in runs.values()}) == 1
    )
    full = runs["full"].objective
    assert runs["scratch"].objective == full
    assert runs["scratch_ar"].objective == runs["ar"].objective
    assert (full.alignment, full.annealing.steps) == (Shifted(), 10_000)
    assert (runs["no_shift"].objective.alignment, runs["no_shift"].objective.annealing) == (
        SamePosition(),
        full.annealing,
    )
    for name in ("no_annealing", "adapted"):
        assert (runs[name].objective.alignment, runs[name].objective.annealing) == (Shifted(), None)
    for name, arm in arms.items():
        if "ar" not in name:
            sampler = arm.sampler_for(task.name)
            assert sampler.alignment == runs[name].objective.alignment
            assert (sampler.steps, sampler.decoding.temperature) == (64, 0.0)
        converter = runs[name].data.converter
        assert type(converter.target_window).__name__ == ("ExactEos" if name in ("ar", "scratch_ar") else "PadFilled")
        assert (converter.row_length, converter.separator_id) == (256, 198)
    assert (task.metric, task.data.row_length, task.data.converter.separator_id) == ("final_answer", 256, 198)


def test_countdown_and_medium_share_the_arms():
    small, medium, countdown = (build(name) for name in ("gsm8k_symbolic", "gsm8k_symbolic_medium", "countdown"))
    assert [arm.name for arm in small.arms] == [arm.name for arm in medium.arms] == [arm.name for arm in countdown.arms]
    assert medium.stages[0].run.model.spec.num_layers == 24
    assert countdown.stages[0].run.data.sources[0].task == countdown.tasks[0].data.sources[0].task == "countdown4"
    assert countdown.tasks[0].metric == "countdown"


def test_the_7b_is_tuned_by_151_million_parameters():
    run = build("gsm8k_symbolic_7b", bindings=["TransformerSpec.vocab_size=32000"])
    assert isinstance(run.model, WithLoRA)
    assert isinstance(run.model.backbone, SingleStream)
    placed = layout(run.model, MeshSpec(), LogicalRules())
    assert placed.trained_parameters == 32000 * 4096 + 32 * 8 * (4 * 2 * 4096 + 3 * (4096 + 11008)) == 151_060_480
    assert placed.trained_parameters / placed.total_parameters == pytest.approx(0.022, abs=5e-4)
    assert run.optimizer.schedule.peak == 1e-4
    assert run.evaluations[0].task.metric == "final_answer"


@pytest.mark.parametrize("name", ["decoder_only", "encoder_decoder"])
def test_one_include_makes_a_lora_run(name):
    both = "_encoder_decoder" if name == "encoder_decoder" else ""
    files = ["gin/runs/train.gin", f"gin/models/{name}.gin", f"gin/models/sizes/nano{both}.gin", "gin/models/lora.gin"]
    run = build_root(config.load(files, ["LORA_RANK=3", "LORA_TRAINED_TOO=('final_norm',)"]))
    assert run.model.rank == 3
    assert type(run.model.backbone).__name__.lower() == name.replace("_", "").replace("decoderonly", "singlestream")
    assert "final_norm/scale" not in run.model.frozen_arrays()


def test_a_recipe_of_many_arms_becomes_a_lora_recipe():
    comparison = build_root(config.load(["gin/recipes/quickstart.gin", "gin/models/lora.gin"]))
    assert {type(stage.run.model) for stage in comparison.stages} == {WithLoRA}
    assert {type(arm.architecture) for arm in comparison.speed.arms} == {WithLoRA}
