"""The base network compiled for v5e-16 as a pod would compile it: it fits, its state is donated, no logits are whole.

With the kernels of attention = "flash" no scores are written either.

Needs the `plan` extra and minutes: `make test-aot` runs it.
"""

import dataclasses

import pytest

from diffusion_lm.cli import config
from diffusion_lm.planning import hlo, plan, programs, topologies
from diffusion_lm.planning.accelerators import GIB, parse
from diffusion_lm.recipes.comparison import Comparison

pytestmark = pytest.mark.aot
V5E_16 = parse("v5e-16")


@pytest.fixture(scope="module")
def comparison():
    return config.load(["gin/recipes/ar2diff_base.gin"]).build(Comparison)


@pytest.fixture(scope="module")
def stages(comparison):
    return {stage.name: stage.run for stage in comparison.stages}


def written_arrays(compiled):
    """The arrays that a program's instructions return."""
    module = hlo.parse(compiled.executable.as_text())
    return [
        array
        for one, _, _ in module.executed()
        if one.opcode not in ("while", "tuple", "parameter", "get-tuple-element")
        for array in one.arrays
    ]


@pytest.mark.parametrize(("stage", "attention"), [("pretrain_ar", "xla"), ("pretrain_diffusion", "flash")])
def test_a_training_step_of_the_base_network_fits_v5e_16(stages, stage, attention):
    run = stages[stage]
    architecture = dataclasses.replace(run.model, spec=dataclasses.replace(run.model.spec, attention=attention))
    run = dataclasses.replace(run, model=architecture)
    compiled = programs.train(run, topologies.devices(V5E_16))
    assert compiled.executable is not None, compiled.refusal
    found = plan.examine(compiled, V5E_16, model_flops=0.0, tokens=1)
    assert found.memory.spare > 4 * GIB, f"{found.memory.spare / GIB:.2f} GiB to spare"
    assert found.memory.donated > 0.99 * (found.memory.donated + found.memory.outputs), "the state is updated in place"
    spec = run.model.spec
    tokens_per_device = run.batch_size * run.data.row_length // V5E_16.devices
    logits = 4 * tokens_per_device * spec.padded_vocab_size
    written = written_arrays(compiled)
    largest = max(array.bytes for array in written)
    assert largest < logits / 4, f"{largest / GIB:.2f} GiB; all logits of a device are {logits / GIB:.2f}"
    length = run.data.row_length
    scores = [array for array in written if array.dtype in ("f32", "bf16") and array.shape[-2:] == (length, length)]
    assert bool(scores) == (attention == "xla"), f"the kernels of 'flash' write no scores: {scores[:3]}"


@pytest.mark.parametrize("name", ["ar", "diffusion"])
def test_decoding_with_the_base_network_fits_v5e_16(comparison, name):
    task = next(task for task in comparison.tasks if task.name == "code")
    arm = next(arm for arm in comparison.arms if arm.name == name)
    stage, sampler = arm.stage_for(task.name), arm.sampler_for(task.name)
    run = dataclasses.replace(stage.run, data=task.data.with_encoder(False))
    prompts = V5E_16.devices * 2
    compiled = programs.decode(run, sampler, prompts, topologies.devices(V5E_16))
    assert compiled.executable is not None, compiled.refusal
    found = plan.examine(compiled, V5E_16, model_flops=0.0, tokens=1)
    assert found.memory.spare > 4 * GIB, f"{found.memory.spare / GIB:.2f} GiB to spare"
    rows = 2 * getattr(sampler, "candidates", 1)
    logits = 4 * rows * run.data.row_length * run.model.spec.padded_vocab_size
    largest = max(array.bytes for array in written_arrays(compiled))
    assert largest < logits / 2, f"{largest / GIB:.2f} GiB; all logits of a device are {logits / GIB:.2f}"
