"""The files of docs/extending.md work as they are printed there."""

import dataclasses
import json
import pathlib
import re
import sys

import jax
import model_stubs as stubs
import numpy as np
import pytest
from huggingface_cases import FOLDER as CHECKPOINTS

from diffusion_lm.cli import config
from diffusion_lm.cli.arguments import build_root
from diffusion_lm.cli.main import main
from diffusion_lm.core.rng import StreamKeys
from diffusion_lm.interop import name_maps
from diffusion_lm.interop.huggingface import load
from diffusion_lm.parallel.mesh import MeshSpec
from diffusion_lm.parallel.rules import LogicalRules
from diffusion_lm.training.optimizers import AdamW
from diffusion_lm.training.step import TrainStep

ROOT = pathlib.Path(__file__).parents[2]
FILES = dict(
    re.findall(r"<!-- (\w+\.\w+) -->\n```python\n(.*?)```", (ROOT / "docs" / "extending.md").read_text(), re.DOTALL)
)


@pytest.fixture
def page(tmp_path, monkeypatch):
    """A folder with the files of the page, which Python and gin find."""
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in FILES:
        sys.modules.pop(pathlib.Path(name).stem, None)


def test_every_section_has_its_files():
    assert set(FILES) == {
        "joint.py", "joint.gin", "falling_threshold.py", "falling_threshold.gin", "my_tasks.py", "my_family.py",
    }  # fmt: skip
    assert all(len(text.splitlines()) < 45 for text in FILES.values())


def test_the_objective_trains(page):
    files = [str(ROOT / "gin" / "runs" / "train.gin"), str(page / "joint.gin")]
    objective = build_root(config.load(files)).objective
    needs = objective.needs()
    assert needs.mask_token
    assert needs.passes == 2

    model, batch = stubs.nano(), stubs.make_batch([3, 2], [6, 5], 9)
    terms, _ = stubs.loss_and_grad(objective, model, batch, StreamKeys.create(0))
    parts = [
        stubs.loss_and_grad(part, model, batch, StreamKeys.create(0))[0]
        for part in (objective.autoregressive, objective.diffusion)
    ]
    np.testing.assert_allclose(terms.loss, parts[0].loss + 0.3 * parts[1].loss, rtol=1e-5)

    train_step = TrainStep(model.architecture, objective, AdamW(), MeshSpec(data=1, fsdp=1), LogicalRules())
    before = train_step.adopt(model.params)
    after, stats = train_step(train_step.adopt(model.params), batch, jax.random.key(0), 1e-3)
    assert np.isfinite(stats.terms.loss)
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), before.params, after.params)
    assert max(jax.tree.leaves(moved)) > 0


def test_the_rule_fills_every_window_in_fewer_passes_where_more_is_certain(page):
    sampler = config.load([str(page / "falling_threshold.gin")], macros=["SAMPLER"]).build_macro("SAMPLER")
    prompt = stubs.as_prompt(stubs.make_batch([3, 2], [8, 8], 11))
    passes = []
    for scale in (0.0, 30.0):
        model = stubs.table_model(scale * np.random.default_rng(0).normal(size=(11, stubs.VOCAB)))
        decoded = stubs.generate(sampler, model, prompt, StreamKeys.create(0))
        assert not (np.asarray(decoded.tokens) == stubs.SPECIAL.mask).any()
        passes.append(int(decoded.forward_passes[0]))
    assert passes[1] < passes[0]
    # With equal logits no probability reaches the first threshold, so only a state that falls unmasks several slots.
    flat = stubs.table_model(np.zeros((11, stubs.VOCAB)))
    constant, falling = (
        stubs.generate(
            dataclasses.replace(sampler, unmask=dataclasses.replace(sampler.unmask, decay=decay)),
            flat,
            prompt,
            StreamKeys.create(0),
        )
        for decay in (1.0, 0.3)
    )
    assert int(constant.forward_passes[0]) == 8
    assert int(falling.forward_passes[0]) < 8


def test_the_task_is_materialised(page, monkeypatch, capsys):
    pytest.importorskip("seqio")
    monkeypatch.chdir(page)
    (page / "pairs.tsv").write_text("one\tun\ntwo\tdeux\nthree\ttrois\n")
    flags = ["--module", "my_tasks", "--task", "my_translation", "--split", "train", "--root", "data"]
    assert main(["materialise", *flags]) == 0, capsys.readouterr().err
    manifest = json.loads((page / "data" / "my_translation" / "train" / "manifest.json").read_text())
    assert manifest["count"] == 3


def test_the_family_reads_its_checkpoints(page, monkeypatch):
    import my_family
    from safetensors.numpy import load_file, save_file

    folder = page / "checkpoint"
    folder.mkdir()
    source = CHECKPOINTS / "llama"
    renamed = {"input_layernorm": "ln_1", "post_attention_layernorm": "ln_2"}
    tensors = load_file(source / "model.safetensors")
    for old, new in renamed.items():
        tensors = {name.replace(old, new): value for name, value in tensors.items()}
    save_file(tensors, folder / "model.safetensors")
    values = json.loads((source / "config.json").read_text())
    values |= {"model_type": "my_family", "architectures": ["MyForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(values))
    family = my_family.MY_FAMILY
    monkeypatch.setattr(name_maps, "FAMILIES", (*name_maps.FAMILIES, family))
    monkeypatch.setitem(name_maps._BY_TYPE, "my_family", family)
    monkeypatch.setitem(name_maps._BY_NAME, "my_family", family)
    jax.tree.map(np.testing.assert_array_equal, load(folder).params, load(source).params)
