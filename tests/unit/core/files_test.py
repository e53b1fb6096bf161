import json
import math
import os

import pytest

from diffusion_lm.core import files


def test_equal_values_give_equal_bytes(tmp_path):
    files.write_json(tmp_path / "a" / "one.json", {"b": 1, "a": "é"})
    files.write_json(tmp_path / "two.json", {"a": "é", "b": 1})
    assert (tmp_path / "a" / "one.json").read_bytes() == (tmp_path / "two.json").read_bytes()
    assert files.read_json(tmp_path / "two.json") == {"a": "é", "b": 1}


def strict(text):
    """Parses JSON as the standard has it, which Python's parser does not by default."""

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_numbers_that_are_not_finite_are_null(tmp_path):
    value = {"a": [1.5, math.nan, (math.inf, -math.inf)], "b": {"c": float("nan"), "d": "NaN", "e": None, "f": True}}
    expected = {"a": [1.5, None, [None, None]], "b": {"c": None, "d": "NaN", "e": None, "f": True}}
    files.write_json(tmp_path / "one.json", value)
    assert strict((tmp_path / "one.json").read_text()) == expected
    assert strict(files.json_text(value)) == expected
    assert math.isnan(value["a"][1]), "what is written is not changed"


def test_crash_before_the_rename_leaves_the_old_file(tmp_path, monkeypatch):
    files.write_text(tmp_path / "results.json", "old")

    def crash(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        files.write_text(tmp_path / "results.json", "new")
    assert (tmp_path / "results.json").read_text() == "old"
