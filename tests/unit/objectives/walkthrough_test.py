"""The code of docs/add_an_objective.md, as it stands there, trains a step."""

import pathlib
import re
import sys

import jax
import model_stubs as stubs
import numpy as np

from diffusion_lm.cli import config
from diffusion_lm.cli.arguments import build_root
from diffusion_lm.core.rng import StreamKeys
from diffusion_lm.parallel.mesh import MeshSpec
from diffusion_lm.parallel.rules import LogicalRules
from diffusion_lm.training.optimizers import AdamW
from diffusion_lm.training.step import TrainStep

ROOT = pathlib.Path(__file__).parents[3]
PAGE = ROOT / "docs" / "add_an_objective.md"


def test_the_objective_of_the_page_trains(tmp_path, monkeypatch):
    blocks = dict(re.findall(r"<!-- (joint\.\w+) -->\n```python\n(.*?)```", PAGE.read_text(), re.DOTALL))
    assert set(blocks) == {"joint.py", "joint.gin"}
    assert len(blocks["joint.py"].splitlines()) < 40
    for name, text in blocks.items():
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        files = [str(ROOT / "gin" / "runs" / "train.gin"), str(tmp_path / "joint.gin")]
        objective = build_root(config.load(files)).objective
    finally:
        sys.modules.pop("joint", None)
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
