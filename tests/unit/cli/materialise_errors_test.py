"""Errors of `materialise` when a package or a task is missing."""

import sys

import pytest

from diffusion_lm.cli.main import main


def fails_after_progress(capsys, *argv):
    capsys.readouterr()
    assert main(list(argv)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return next(line for line in captured.err.splitlines() if line.startswith("error: "))


def test_materialise_without_tensorflow(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "seqio", None)
    monkeypatch.delitem(sys.modules, "diffusion_lm.data.seqio_source", raising=False)
    message = fails_after_progress(capsys, "materialise", "--task", "unheard_of", "--root", "elsewhere")
    assert "needs the package seqio, which is not installed" in message


def test_unknown_task_suggests_similar_names_and_the_module_flag(tmp_path, capsys, monkeypatch):
    pytest.importorskip("seqio")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_seqio_tasks.py").write_text(
        "import seqio\n"
        "source = seqio.FunctionDataSource(lambda split, shuffle_files, seed=None: None, splits=['train'])\n"
        "seqio.TaskRegistry.add('my_cli_task', source, output_features={}, preprocessors=[], metric_fns=[])\n"
    )
    message = fails_after_progress(
        capsys, "materialise", "--task", "my_cli_tusk", "--root", "elsewhere", "--module", "my_seqio_tasks"
    )
    assert "did you mean my_cli_task" in message
    assert "--module" in message
