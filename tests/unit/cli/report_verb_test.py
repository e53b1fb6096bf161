"""`diffusion-lm report` makes the page of a comparison again from its files."""

import importlib.util
import json
import pathlib

import pytest

from diffusion_lm.cli.main import main
from diffusion_lm.recipes import report

RECIPES = pathlib.Path(__file__).parents[1] / "recipes"
_spec = importlib.util.spec_from_file_location("synthetic_results", RECIPES / "synthetic_results.py")
synthetic = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(synthetic)


@pytest.fixture
def folder(tmp_path):
    """A comparison's folder with every file that the page shows, and the page that `compare` wrote."""
    for name in ("results", "speed", "samples", "playback"):
        (tmp_path / f"{name}.json").write_text(json.dumps(getattr(synthetic, name)()))
    for stage, rows in synthetic.curves().items():
        log = tmp_path / "stages" / stage / "metrics.jsonl"
        log.parent.mkdir(parents=True)
        log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def page_of(capsys, folder):
    assert main(["report", "--workdir", str(folder)]) == 0, capsys.readouterr().err
    return (folder / "report" / "index.html").read_text(encoding="utf-8")


def test_the_page_is_that_of_the_comparison(folder, capsys):
    names = ("speed", "samples", "playback", "curves")
    given = {name: json.loads(json.dumps(getattr(synthetic, name)())) for name in names}
    expected = report.render(json.loads((folder / "results.json").read_text()), **given)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert page_of(capsys, folder) == expected
    assert str(folder / "report" / "index.html") in capsys.readouterr().out
    assert all(path.read_bytes() == content for path, content in before.items()), "only the page is written"


def test_results_alone_give_a_page_without_the_other_parts(folder, capsys):
    for name in ("speed", "samples", "playback"):
        (folder / f"{name}.json").unlink()
    results = json.loads((folder / "results.json").read_text())
    for log in folder.rglob("metrics.jsonl"):
        log.unlink()
    assert page_of(capsys, folder) == report.render(results, curves={}, speed=None, samples={}, playback={})


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("results.json", None, "has no results.json (--workdir)"),
        ("results.json", "{", "results.json is not valid JSON"),
        ("speed.json", "nonsense", "speed.json is not valid JSON"),
        ("results.json", '{"name": "x"}', "are not those of a comparison: KeyError: 'arms'"),
        ("results.json", "[1, 2]", "are not those of a comparison"),
    ],
    ids=["absent", "broken", "broken_speed", "incomplete", "another"],
)
def test_other_folders_are_one_sentence(folder, capsys, name, content, complaint):
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(content)
    assert main(["report", "--workdir", str(folder)]) == 2
    error = capsys.readouterr().err
    assert complaint in error
    assert "Traceback" not in error
    assert not (folder / "report").exists()


@pytest.mark.parametrize(
    "name", sorted(path.parent.name for path in pathlib.Path("docs/results").glob("*/results.json"))
)
def test_published_results_have_a_page(name, tmp_path, capsys):
    (tmp_path / "results.json").write_bytes((pathlib.Path("docs/results") / name / "results.json").read_bytes())
    assert "<html" in page_of(capsys, tmp_path)
