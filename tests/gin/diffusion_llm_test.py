"""The recipes of Diffusion-LLM say what the paper says (arXiv 2308.12219)."""

import dataclasses

import pytest

from diffusion_lm.cli import config
from diffusion_lm.cli.arguments import build_root
from diffusion_lm.data.vocabulary_map import UsedTokens
from diffusion_lm.interop.name_maps import family_of
from diffusion_lm.interop.name_maps.family import CheckpointConfig
from diffusion_lm.nn.transformer import TransformerSpec
from diffusion_lm.noise.process import MaskAndReplace
from diffusion_lm.objectives.length_prediction import LengthPrediction
from diffusion_lm.objectives.rdm import Rdm
from diffusion_lm.samplers.decoding import Decoding

FOLDER = "gin/recipes/diffusion_llm"
XLMR = {"bos": 0, "pad": 1, "eos": 2}


def recipe(name, *files, bindings=()):
    return build_root(config.load([f"{FOLDER}/{name}.gin", *files], bindings))


@pytest.mark.parametrize(
    ("name", "tokens", "steps", "metric"),
    [
        ("iwslt14_de_en", 32 * 1024, 150_000, "bleu"),
        ("wmt14_en_de", 128 * 1024, 300_000, "bleu_intl"),
        ("gigaword_10k", 16 * 1024, 30_000, "rouge"),
        ("gigaword", 128 * 1024, 100_000, "rouge"),
    ],
)
def test_task_recipes(name, tokens, steps, metric):
    comparison = recipe(name)
    stages = {stage.name: stage for stage in comparison.stages}
    for stage, smoothing in (("rdm_xlmr", 0.0), ("rdm_scratch", 0.1)):
        run = stages[stage].run
        assert run.batch_size * run.data.row_length == tokens
        assert run.data.row_length == 512
        assert run.data.pack
        assert run.steps == steps
        assert run.objective.label_smoothing == smoothing
        assert isinstance(run.objective, Rdm)
        assert run.objective.time.steps == run.objective.weighting.steps == 50
        assert run.model.spec.dropout_rate == run.model.spec.attention_dropout_rate == 0.1
        assert (run.optimizer.b1, run.optimizer.b2, run.optimizer.weight_decay) == (0.9, 0.98, 0.01)
        warmup = steps // 100
        # A network from scratch has the peak of RDM's own runs, ten times that of tuning XLM-R.
        peak = 5e-4 if stage == "rdm_scratch" else 5e-5
        assert run.optimizer.schedule.value(warmup - 1, steps) == pytest.approx(peak)
        assert run.optimizer.schedule.value(4 * warmup - 1, steps) == pytest.approx(peak / 2)
        head = stages[stage.replace("rdm", "length")].run
        assert isinstance(head.objective, LengthPrediction)
        assert (head.steps, head.model.classes, head.data.pack) == (30_000, 512, False)
        assert head.model.backbone == run.model
        assert head.optimizer.trained == ("length_head",)
    assert stages["rdm_xlmr"].initial == "runs/xlmr_base"
    assert stages["rdm_scratch"].initial is None
    maps = {stage.run.data.vocabulary_map for stage in stages.values()} | {
        t.data.vocabulary_map for t in comparison.tasks
    }
    (only,) = maps
    assert isinstance(only, UsedTokens)
    assert only.size == stages["rdm_xlmr"].run.model.spec.vocab_size
    assert {source.split for source in only.sources} == {"train"}
    beam, oracle = comparison.tasks
    assert (beam.oracle, oracle.oracle) == (None, "length")
    assert "oracle length" in oracle.title
    assert beam.metric == oracle.metric == metric
    for arm in comparison.arms:
        first, second = arm.sampler_for(beam.name), arm.sampler_for(oracle.name)
        assert (first.beam, first.lengths, second.beam, second.lengths) == (10, "head", 1, "window")
        for one in (first, second):
            assert one.sampler.steps == 50
            assert one.sampler.decoding == Decoding(temperature=0.0, forbidden=("eos", "pad"))


@pytest.mark.parametrize(
    ("size", "millions", "layers"), [("base", 86, 12), ("large", 304, 24), ("xl", 2833, 36), ("xxl", 9667, 48)]
)
def test_sizes_are_those_of_xlmr(size, millions, layers):
    """Parameters without embeddings, as the paper counts them."""
    files = ["gin/models/encoder_only.gin", f"gin/models/sizes/xlmr_{size}.gin"]
    model = config.load(files, ["VOCAB_SIZE=250002"], macros=["MODEL"]).build_macro("MODEL")
    counts = model.count_parameters()
    assert counts["blocks"] / 1e6 == pytest.approx(millions, rel=0.015)
    assert model.spec.num_layers == layers
    assert model.spec.num_heads * model.spec.head_dim == model.spec.model_dim


@pytest.mark.parametrize(("size", "kind", "longest"), [("base", "xlm-roberta", 514), ("xl", "xlm-roberta-xl", 514)])
def test_sizes_take_the_released_checkpoints(size, kind, longest):
    """What `import` would make of the released config.json is the preset, but for the dtype of the computation."""
    files = ["gin/models/encoder_only.gin", f"gin/models/sizes/xlmr_{size}.gin"]
    spec = config.load(files, ["VOCAB_SIZE=250002"], macros=["MODEL"]).build_macro("MODEL").spec
    released = CheckpointConfig(
        {
            "model_type": kind,
            "vocab_size": 250002,
            "hidden_size": spec.model_dim,
            "num_hidden_layers": spec.num_layers,
            "num_attention_heads": spec.num_heads,
            "intermediate_size": spec.mlp_dim,
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-5,
            "max_position_embeddings": longest,
            "pad_token_id": 1,
        }
    )
    imported = TransformerSpec(**family_of(released).read_config(released))
    execution = ("dtype", "remat", "dropout_rate", "attention_dropout_rate", "vocab_multiple")
    assert dataclasses.asdict(imported) == dataclasses.asdict(
        dataclasses.replace(spec, **{name: getattr(imported, name) for name in execution})
    )


def test_another_size_is_a_file_and_two_macros():
    comparison = recipe(
        "iwslt14_de_en", "gin/models/sizes/xlmr_xl.gin", bindings=["XLMR='runs/xlmr_xl'", "RDM_STEPS=100000"]
    )
    tuned = next(stage for stage in comparison.stages if stage.name == "rdm_xlmr")
    assert (tuned.run.model.spec.num_layers, tuned.run.steps, tuned.initial) == (36, 100_000, "runs/xlmr_xl")


def test_instruction_recipe():
    comparison = recipe("instruction")
    runs = {stage.name: stage.run for stage in comparison.stages}
    assert {name: (run.batch_size, run.steps, run.data.row_length) for name, run in runs.items()} == {
        "flan_2021": (512, 5_000, 512),
        "flan_2022": (512, 70_000, 512),
        "length_flan_2021": (512, 16_000, 512),
        "length_flan_2022": (512, 16_000, 512),
    }
    assert runs["flan_2021"].optimizer.schedule.peak == 5e-5
    assert runs["flan_2022"].optimizer.schedule.peak == 1e-5
    data = runs["flan_2022"].data
    assert sum(data.weights) == 1000
    shares = {}
    for source, weight in zip(data.sources, data.weights, strict=True):
        shares.setdefault(source.task.split("_")[2], []).append(weight)
    assert shares == {
        "flan": [100] * 4, "t0": [106, 107, 107], "niv2": [100, 100], "cot": [25, 25], "dialog": [15, 15],
    }  # fmt: skip
    assert all(run.data.vocabulary_map is None and run.model.spec.vocab_size == 250_002 for run in runs.values())
    arm = comparison.arms[0]
    steps = {task.name: (arm.sampler_for(task.name).sampler.steps, arm.sampler_for(task.name).beam)
             for task in comparison.tasks}  # fmt: skip
    assert steps["iwslt"] == (50, 3)
    assert steps["tydiqa"] == (10, 3)
    assert steps["tydiqa_1shot_oracle"] == (10, 1)
    assert steps["mmlu_oracle"] == steps["mmlu_2shot_oracle"] == (1, 1)
    assert all(("oracle" in task.name) == (task.oracle == "length") for task in comparison.tasks)
    assert {task.metric for task in comparison.tasks} == {"bleu", "squad", "exact_match", "number_match"}


def test_embedded_recipe_prunes_what_it_tunes():
    comparison = recipe("embedded")
    runs = {stage.name: stage.run for stage in comparison.stages}
    assert isinstance(runs["mlm"].objective.process, MaskAndReplace)
    assert (runs["mlm"].objective.time.t, runs["mlm"].objective.normaliser) == (0.15, "replaced")
    assert runs["mlm"].data.vocabulary_map is None
    assert {name: run.model.spec.vocab_size for name, run in runs.items()} == {
        "mlm": 1280, "rdm_mlm": 768, "rdm_scratch": 768, "length_mlm": 768, "length_scratch": 768,
    }  # fmt: skip
    assert runs["rdm_scratch"].objective.label_smoothing == 0.1
    assert runs["rdm_mlm"].objective.label_smoothing == 0.0
    assert runs["rdm_mlm"].steps == runs["rdm_scratch"].steps
