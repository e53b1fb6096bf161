"""Every recipe runs from its first stage to its report, at nano scale on synthetic data (`nano_scale.py`).

A stage is one step, a task two examples. A recipe of more than four arms runs four of them: the first of each family,
and a spread of the others (of objective_families AR, SUNDAE and two more; every objective and sampler by itself is the
business of tests/contracts). Recipes that differ in size alone (ar2diff_base, _large, _xl) are equal at nano scale;
what is equal runs once. Two to three minutes of two cores: `make test-recipes`, which `.ci/run` calls.
"""

import dataclasses
import json
import math

import pytest
from nano_scale import nano, nano_run, train_vocabulary, write_data

from diffusion_lm.cli import config
from diffusion_lm.cli.search_path import packaged_folder
from diffusion_lm.recipes.compare import compare
from diffusion_lm.recipes.comparison import Comparison
from diffusion_lm.training.card import fingerprint
from diffusion_lm.training.loop import train
from diffusion_lm.training.run import TrainRun

pytestmark = pytest.mark.recipes

FOLDER = packaged_folder() / "recipes"
FILES = (path.relative_to(FOLDER) for path in FOLDER.rglob("*.gin"))
NAMES = sorted(path.as_posix() for path in FILES if "parts" not in path.parts)
RECIPES = [name for name in NAMES if "comparison.Comparison" in (FOLDER / name).read_text()]
RUNS = [name for name in NAMES if name not in RECIPES]
MOST_ARMS = 4


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Returns `run(recipe) -> (nano comparison, its folder)`; equal comparisons share a folder."""
    root = tmp_path_factory.mktemp("nano")
    vocabulary = train_vocabulary(root)
    folders = {}

    def run(recipe):
        whole = config.load([f"gin/recipes/{recipe}"]).build(Comparison)
        small = nano(whole, root / "data", vocab_size=vocabulary.size, most_arms=MOST_ARMS)
        small = dataclasses.replace(small, name="nano", title="", notes=())
        key = fingerprint(small)
        if key not in folders:
            write_data(small, vocabulary)
            compare(small, root / key[:12], log=lambda line: None)
            folders[key] = root / key[:12]
        return small, folders[key]

    return run


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_runs_to_its_report(recipe, run):
    comparison, folder = run(recipe)
    results = json.loads((folder / "results.json").read_text())
    arms, tasks = [arm.name for arm in comparison.arms], [task.name for task in comparison.tasks]
    assert [arm["name"] for arm in results["arms"]] == arms
    for arm in arms:
        for task in tasks:
            cell = results["cells"][arm][task]
            assert cell["examples"] == 2
            assert all(math.isfinite(cell[name]) for name in ("value", "low", "high"))
            assert cell["conditions"]["forward_passes_per_sample"] > 0
            if comparison.bound_limit:
                assert math.isfinite(results["bounds"][arm][task]["loss"])
    for stage in comparison.stages:
        rows = [json.loads(line) for line in (folder / "stages" / stage.name / "metrics.jsonl").open()]
        trained = [row for row in rows if row["kind"] == "train"]
        assert [row["step"] for row in trained] == [1] * stage.run.steps
        assert all(math.isfinite(row["loss"]) and row["loss"] > 0 for row in trained)
    table = (folder / "results.md").read_text()
    page = (folder / "report" / "index.html").read_text()
    for arm in comparison.arms:
        assert arm.label in table
        assert arm.label in page
    if comparison.speed:
        rows = json.loads((folder / "speed.json").read_text())["rows"]
        assert [row["label"] for row in rows] == [arm.label for arm in comparison.speed.arms]
        assert all(0 < row["seconds"] < math.inf for row in rows)


@pytest.mark.parametrize("recipe", RUNS)
def test_run_trains_and_is_evaluated(recipe, tmp_path):
    """Recipes of one training run, such as the adaptation of a checkpoint; what they start from is left out."""
    vocabulary = train_vocabulary(tmp_path)
    whole = config.load([f"gin/recipes/{recipe}"]).build(TrainRun)
    small = nano_run(whole, tmp_path / "data", vocab_size=vocabulary.size)
    write_data(small, vocabulary)
    result = train(small, tmp_path / "run")
    names = {evaluation.name for evaluation in small.evaluations}
    assert {name.rpartition("/")[0] for name in result.metrics if "/" in name} >= names
    assert result.metrics["loss"] > 0
    assert all(math.isfinite(value) for value in result.metrics.values())
