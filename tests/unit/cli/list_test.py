"""`diffusion-lm list`: every packaged file has a description; directories of the user are listed too."""

import json

import pytest

from diffusion_lm.cli.list import KINDS, describe
from diffusion_lm.cli.main import main
from diffusion_lm.cli.search_path import packaged_folder


@pytest.mark.parametrize("kind", KINDS)
def test_every_file_is_listed_with_one_sentence(kind, tmp_path, capsys):
    assert main(["list", kind, "--json", str(tmp_path / "list.json")]) == 0
    entries = json.loads((tmp_path / "list.json").read_text())
    folder = packaged_folder() / KINDS[kind]
    files = folder.rglob("*.gin") if kind == "recipes" else folder.glob("*.gin")
    names = [file.relative_to(folder).with_suffix("").as_posix() for file in files if file.parent.name != "parts"]
    assert [e["name"] for e in entries] == sorted(names)
    printed = capsys.readouterr().out
    for entry in entries:
        assert entry["name"] in printed
        assert 10 < len(entry["description"]) < 300, entry
        assert entry["sources"] or kind not in ("objectives", "samplers", "scoring"), entry


def test_the_listed_path_of_a_recipe_in_a_subdirectory_can_be_included(tmp_path):
    main(["list", "recipes", "--json", str(tmp_path / "list.json")])
    includes = {e["name"]: e["include"] for e in json.loads((tmp_path / "list.json").read_text())}
    assert includes["ar2diff/architectures"] == "recipes/ar2diff/architectures.gin"
    assert all((packaged_folder() / name).is_file() for name in includes.values())


def test_methods_of_papers_name_them(tmp_path):
    main(["list", "objectives", "--json", str(tmp_path / "list.json")])
    sources = {e["name"]: e["sources"] for e in json.loads((tmp_path / "list.json").read_text())}
    assert sources["sundae"] == ["2401.17181", "2112.06749"]


def test_description_is_the_first_sentence_without_its_source():
    text = "# Next token, e.g. of a prefix-LM\n# (T5, arXiv 1910.10683, section 3). More: 2112.06749.\n\n# Not this.\n"
    assert describe(text) == ("Next token, e.g. of a prefix-LM", ["1910.10683", "2112.06749"])


def test_a_source_may_be_named():
    text = "# Draft and verify.\n#\n# Details follow.\n# Source: a report (2026).\nX = 1\n"
    assert describe(text) == ("Draft and verify", ["a report (2026)"])


def test_own_files_come_first(tmp_path, capsys):
    (tmp_path / "objectives").mkdir()
    (tmp_path / "objectives" / "mine.gin").write_text("# What nobody tried.\nX = 1\n")
    (tmp_path / "objectives" / "sundae.gin").write_text("# Sundae with cherries.\nX = 1\n")
    assert main(["list", "objectives", "--gin_search_path", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "What nobody tried" in printed
    assert "Sundae with cherries" in printed


def test_unknown_kind_is_an_error(capsys):
    assert main(["list", "objectivs"]) == 2
    assert "objectivs" in capsys.readouterr().err
