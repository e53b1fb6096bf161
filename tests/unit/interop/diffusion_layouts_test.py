"""The public layout of a diffusion model follows from the files of a checkpoint, or from the objective of a run."""

import dataclasses
import json
import shutil

import pytest
import safetensors.numpy
from diffusion_cases import CASES, FOLDER, MASK
from huggingface_cases import FOLDER as PLAIN

from diffusion_lm.cli import config as gin_files
from diffusion_lm.core.errors import ConfigError
from diffusion_lm.core.special import SpecialTokens
from diffusion_lm.interop.diffusion import TrainedAs, layout_for, objective_gin, of_objective, sampler_gin, trained_as
from diffusion_lm.interop.huggingface import load, save
from diffusion_lm.interop.name_maps.converted import DIFFUGPT, DIFFULLAMA, FAST_DLLM_V2, SDAR
from diffusion_lm.interop.name_maps.family import CheckpointConfig

OBJECTIVES = {
    "autoregressive": None,
    "sundae": None,  # no MASK
    "sedd_absorb": None,  # ratios, no distribution of tokens
    "nemotron": None,  # a causal clean copy
    "llada": (False, None),
    "mdlm": (False, None),
    "diffullama": (True, None),
    "diffullama_annealed": (True, None),
    "dream": (True, None),
    "sdar": (False, 4),
    "fast_dllm_v2": (True, 32),
}


SPECIAL = SpecialTokens(64, mask_id=4)


def _objective(name):
    return gin_files.load([f"gin/objectives/{name}.gin"], macros=["OBJECTIVE"]).build_macro("OBJECTIVE")


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_determines_how_its_network_is_trained(name):
    found, expected = of_objective(_objective(name), SPECIAL), OBJECTIVES[name]
    assert (found and (found.shifted, found.block_size)) == expected
    assert found is None or found.mask_id == 4


@pytest.mark.parametrize(
    ("shape", "objective", "layout"),
    [
        ("llama", "llada", "llada"),
        ("llama", "diffullama", "diffullama"),
        ("qwen2_some_windows", "dream", None),  # no public diffusion model has windows
        ("gpt2", "diffullama", "diffugpt"),
        ("gpt2", "llada", None),
        ("qwen3", "sdar", "sdar"),
        ("qwen3", "fast_dllm_v2", None),
        ("llama", "sdar", None),
        ("llama", "autoregressive", None),
        ("bert", "llada", None),
    ],
)
def test_shape_and_training_choose_the_layout(shape, objective, layout):
    found = layout_for(load(PLAIN / shape).architecture.spec, of_objective(_objective(objective), SPECIAL))
    assert (found and found.name) == layout


@pytest.mark.parametrize("name", CASES)
def test_a_checkpoint_has_its_own_layout(name):
    one = load(FOLDER / name)
    found = layout_for(one.architecture.spec, one.diffusion)
    assert found.name == ("llada" if name == "llada_tied_biases" else CASES[name].family)


def test_mask_comes_from_the_config_then_other_files_then_the_published_checkpoint():
    meant, nothing = DIFFUGPT.diffusion, (None, "tokenizer")
    said = trained_as(meant, CheckpointConfig({"mask_token_id": 7}), 50257, (9, "tokenizer"))
    assert (said.mask_id, said.mask_from) == (7, "config.json")
    said = trained_as(meant, CheckpointConfig({}), 50257, (9, "tokenizer"))
    assert (said.mask_id, said.mask_from) == (9, "tokenizer")
    # Small reuses a token, medium has one more row (arXiv 2410.17891).
    assert trained_as(meant, CheckpointConfig({}), 50257, nothing).mask_id == 10541
    assert trained_as(meant, CheckpointConfig({}), 50258, nothing).mask_id == 50257
    assert trained_as(DIFFULLAMA.diffusion, CheckpointConfig({}), 32000, nothing).mask_id == 811
    unknown = trained_as(meant, CheckpointConfig({}), 1000, nothing)
    assert (unknown.mask_id, unknown.mask_from) == (None, "")


@pytest.mark.parametrize("mask", [-1, 100])
def test_a_mask_outside_of_the_vocabulary_is_refused(mask):
    with pytest.raises(ConfigError, match="mask_token_id"):
        trained_as(SDAR.diffusion, CheckpointConfig({"mask_token_id": mask}), 100, (None, ""))


@pytest.mark.parametrize("block", [0, -4, "four"])
def test_a_block_size_that_is_not_a_number_is_refused(block):
    with pytest.raises(ConfigError, match="bd_size"):
        trained_as(FAST_DLLM_V2.diffusion, CheckpointConfig({"bd_size": block}), 100, (None, ""))
    assert trained_as(FAST_DLLM_V2.diffusion, CheckpointConfig({}), 100, (None, "")).block_size == 32


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("alibi", True),
        ("attention_layer_norm", True),
        ("include_bias", True),
        ("input_emb_norm", True),
        ("scale_logits", True),
        ("bias_for_layer_norm", True),
        ("block_type", "sequential"),
        ("block_group_size", 2),
        ("layer_norm_type", "default"),
        ("activation_type", "swiglu"),
        ("rope", False),
    ],
)
def test_options_of_the_llada_code_that_this_network_does_not_have_are_refused(field, value, tmp_path):
    shutil.copytree(FOLDER / "llada", tmp_path / "in")
    path = tmp_path / "in" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(ConfigError, match=field):
        load(tmp_path / "in")


def test_plain_llama_files_are_diffullama_with_that_layout(tmp_path):
    assert load(PLAIN / "llama").diffusion is None
    one = load(PLAIN / "llama", layout="diffullama")
    assert (one.family, one.diffusion.shifted, one.diffusion.mask_id) == ("diffullama", True, None)
    # The export says it, so that it is not asked for twice; the files are LLaMA's.
    save(tmp_path / "out", one.architecture, one.params, family="diffullama", trained_as=one.diffusion.facts())
    assert load(tmp_path / "out").family == "diffullama"
    assert set(safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")) == set(
        safetensors.numpy.load_file(PLAIN / "llama" / "model.safetensors")
    )
    assert load(tmp_path / "out", layout="llama").diffusion is None


@pytest.mark.parametrize("layout", ["dream", "nonsense"])
def test_a_layout_of_another_model_type_is_refused(layout):
    with pytest.raises(ConfigError, match="Leave it out, or choose one of llama, diffullama"):
        load(PLAIN / "llama", layout=layout)


def test_the_embedding_gives_the_size_of_diffugpts_vocabulary():
    """The published config is GPT-2's, which does not count the row of MASK."""
    told = json.loads((FOLDER / "diffugpt" / "config.json").read_text())["vocab_size"]
    assert load(FOLDER / "diffugpt").architecture.spec.vocab_size == told + 1


def test_mixtures_of_experts_are_still_refused(tmp_path):
    shutil.copytree(FOLDER / "llada", tmp_path / "in")
    path = tmp_path / "in" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_experts": 64}))
    with pytest.raises(ConfigError, match="mixture of experts"):
        load(tmp_path / "in")


@pytest.mark.parametrize("name", CASES)
def test_gin_files_of_a_checkpoint_build(name, tmp_path):
    """Objective and sampler have the alignment and the visibility of the checkpoint."""
    trained = load(FOLDER / name).diffusion
    (tmp_path / "objective.gin").write_text(objective_gin(trained))
    (tmp_path / "sampler.gin").write_text(sampler_gin(trained))
    (tmp_path / "all.gin").write_text(f"include '{tmp_path}/objective.gin'\n")
    objective = gin_files.load([str(tmp_path / "all.gin")], macros=["OBJECTIVE"]).build_macro("OBJECTIVE")
    sampler = gin_files.load([str(tmp_path / "sampler.gin")], macros=["SAMPLER"]).build_macro("SAMPLER")
    asked = of_objective(objective, SpecialTokens(1 << 20, mask_id=MASK))
    assert (asked.shifted, asked.block_size, asked.mask_id) == (trained.shifted, trained.block_size, MASK)
    assert sampler.alignment == objective.alignment
    assert sampler.visibility == ("full" if trained.block_size is None else f"example_blocks:{trained.block_size}")


def test_a_smaller_block_makes_the_sub_block_smaller():
    small = TrainedAs(True, 4, 7, "config.json", "fast_dllm_v2", "fast_dllm_v2", 8)
    assert "Blocks.size = 4\n" in sampler_gin(small)
    assert "Blocks.size = 8\n" in sampler_gin(dataclasses.replace(small, block_size=32))
