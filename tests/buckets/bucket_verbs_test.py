"""The verbs on a run folder and on data in a bucket, against the same on a disk."""

import json

import numpy as np
import pytest
from verbs_test import folder  # noqa: F401 (a fixture: data, and a run on a disk)

from diffusion_lm.cli.main import main

pytestmark = pytest.mark.thorough


@pytest.fixture
def there(folder, bucket, monkeypatch):  # noqa: F811
    """The data of the run in the bucket, and the folder of its gin file as the current one."""
    for path in (folder / "data").rglob("*"):
        if path.is_file():
            bucket.put(f"bucket/{path.relative_to(folder)}", path.read_bytes())
    monkeypatch.chdir(folder)
    monkeypatch.setenv("DIFFUSION_LM_CACHE", str(folder / "cache"))
    return folder


def test_verbs_take_buckets_where_they_take_folders(there, bucket, capsys):
    train = ["train", "--gin_file", "run.gin", "--gin.ROOT='gs://bucket/data'", "--workdir", "gs://bucket/run"]
    assert main([*train, "--json", "gs://bucket/train.json"]) == 0
    result = json.loads(bucket.OBJECTS["bucket/train.json"][0])
    assert result["workdir"] == "gs://bucket/run"
    assert result["metrics"] == json.loads((there / "train.json").read_text())["metrics"]
    assert main(["evaluate", "--workdir", "gs://bucket/run", "--only", "bound", "--json", "scores.json"]) == 0
    scores = json.loads((there / "scores.json").read_text())["evaluations"]["bound"]["values"]
    trained = {name.removeprefix("bound/"): value for name, value in result["metrics"].items()}
    assert all(np.isclose(trained[name], value, atol=1e-6) for name, value in scores.items())
    (there / "prompts").write_text("12 plus one\n")
    assert main(["decode", "--workdir", "gs://bucket/run", "--input", "prompts"]) == 0
    assert main(train) == 0, "a finished run returns at once"
    assert not list(there.glob("gs:*")), "no local folder of that name"


def test_writing_what_needs_a_disk_is_refused(there, bucket, capsys):
    before = dict(bucket.OBJECTS)
    assert main(["import", "data", "--workdir", "gs://bucket/imported"]) == 2
    assert before == bucket.OBJECTS
