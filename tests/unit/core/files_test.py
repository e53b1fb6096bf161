import os

import pytest

from diffusion_lm.core import files


def test_equal_values_give_equal_bytes(tmp_path):
    files.write_json(tmp_path / "a" / "one.json", {"b": 1, "a": "é"})
    files.write_json(tmp_path / "two.json", {"a": "é", "b": 1})
    assert (tmp_path / "a" / "one.json").read_bytes() == (tmp_path / "two.json").read_bytes()
    assert files.read_json(tmp_path / "two.json") == {"a": "é", "b": 1}


def test_crash_before_the_rename_leaves_the_old_file(tmp_path, monkeypatch):
    files.write_text(tmp_path / "results.json", "old")

    def crash(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        files.write_text(tmp_path / "results.json", "new")
    assert (tmp_path / "results.json").read_text() == "old"
