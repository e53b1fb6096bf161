"""Benchmarks in child processes: requests and answers, errors, and a missing torch."""

import sys

import pytest

from diffusion_lm.bench.children import ChildBenchmark, our_child, torch_child
from diffusion_lm.core.errors import ConfigError


class Counting:
    """A benchmark that returns its requests. The child unpickles it, so it must be in an importable module."""

    labels = ("a", "b")

    def prepare(self, export=None):
        print("what libraries print does not reach the parent")
        return {"export": export, "noise": 1}

    def measure(self, label, number):
        if label == "b":
            raise ConfigError("b cannot be measured", where="somewhere", fix="Leave it.")
        return number + 0.5

    def finish(self):
        return {"done": True}


def without(*modules):
    """Returns the code of a sitecustomize module that hides `modules`."""
    return f"import sys\nfor name in {modules!r}:\n    sys.modules[name] = None\n"


@pytest.fixture
def importable(tmp_path, monkeypatch):
    """A copy of `Counting` that a child can import too."""
    source = (
        "from diffusion_lm.core.errors import ConfigError\n\n"
        + "class Counting:\n"
        + __import__("inspect").getsource(Counting).split("\n", 1)[1]
    )
    (tmp_path / "counting_side.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return __import__("counting_side").Counting()


def test_a_child_answers_as_its_benchmark(importable):
    with our_child(importable) as child:
        assert child.labels == ("a", "b")
        assert child.prepare("folder") == {"export": "folder", "noise": 1}
        assert child.measure("a", 3) == 3.5
        with pytest.raises(ConfigError, match=r"b cannot be measured \(somewhere\)\. Leave it\."):
            child.measure("b", 0)
        assert child.measure("a", 4) == 4.5, "an error does not end it"
        assert child.finish() == {"done": True}
        process = child._process
    assert process.returncode == 0


def test_the_error_of_a_dead_child_has_its_last_line_of_stderr():
    with pytest.raises(ConfigError, match=r"the child process exited: .*no such thing"):
        ChildBenchmark([sys.executable, "-c", "raise SystemExit('no such thing')"], {}, where="here", fix="Do it.")


def test_a_missing_torch_is_an_error_that_says_what_to_do(tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text(without("torch", "transformers"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"cannot import torch \(--against torch\).*--torch_python"):
        torch_child(None, "train")


def test_a_missing_interpreter_is_named():
    with pytest.raises(ConfigError, match=r"cannot run /no/such/python.*--torch_python"):
        torch_child("/no/such/python", "train")
