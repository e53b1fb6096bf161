"""The command line: help, exit codes, output streams, and which packages are imported."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from diffusion_lm.cli import doctor, environment, output
from diffusion_lm.cli.main import VERBS, main

HEAVY = ("jax", "tensorflow", "seqio", "gin", "flax", "grain", "numpy")


def test_help_and_verbs(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(verb in out for verb in VERBS)
    assert main([]) == 0


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_each_verb(verb, capsys):
    assert main([verb, "--help"]) == 0
    out = capsys.readouterr().out
    assert "--json" in out
    assert "--debug" in out


@pytest.mark.parametrize("arguments", [["--help"], ["explain", "--help"]])
def test_help_is_fast_and_does_not_import_jax(arguments):
    code = (
        "import sys, time; start = time.perf_counter()\n"
        "from diffusion_lm.cli.main import main\n"
        f"assert main({arguments}) == 0\n"
        f"heavy = [name for name in {HEAVY} if name in sys.modules]\n"
        "print('heavy', heavy, time.process_time(), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy, seconds = done.stderr.rsplit(" ", 1)
    assert heavy.startswith("heavy []")
    assert float(seconds) < 1


def test_importing_the_package_is_fast_and_does_not_import_tensorflow():
    code = "import diffusion_lm, sys, time; print(time.process_time(), *sys.modules)"
    seconds, *modules = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert float(seconds) < 1.5
    assert not {"tensorflow", "seqio", "gin", "jax"} & set(modules)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["trian"], "unknown verb 'trian'; did you mean train, materialise? (VERB)"),
        (["train"], "the following arguments are required: --workdir"),
        (["train", "--workdir", "x"], "no gin file given"),
        (["train", "--workdir", "x", "--gin_fle", "y"], "unrecognized arguments: --gin_fle y"),
        (["train", "--workdir", "x", "--gin_file", "nowhere.gin"], "gin file 'nowhere.gin' not found"),
        (
            ["train", "--workdir", "x", "--module", "no_such_module", "--gin_file", "x.gin"],
            "no module named no_such_module",
        ),
        (["doctor", "--gin.X=1"], "doctor does not accept --gin flags"),
        (["evaluate", "--workdir", "nowhere"], "nowhere is not a run directory"),
    ],
)
def test_wrong_input_is_one_line_on_stderr_and_exit_code_2(arguments, complaint, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == environment.EXIT_CONFIG
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert complaint in captured.err


def test_debug_shows_the_traceback(capsys):
    assert main(["train", "--workdir", "x", "--debug"]) == environment.EXIT_CONFIG
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.splitlines()[-1].startswith("error: no gin file given")


@pytest.fixture
def verb(monkeypatch):
    """Returns `stand_in(run)`, which replaces the function that `doctor` runs."""
    return lambda run: monkeypatch.setattr(doctor, "run", run)


def test_json(verb, tmp_path, capsys):
    verb(lambda arguments: {"value": 1.5, "folder": tmp_path})
    assert main(["doctor", "--json", str(tmp_path / "new" / "result.json")]) == 0
    assert json.loads((tmp_path / "new" / "result.json").read_text()) == {"value": 1.5, "folder": str(tmp_path)}
    assert main(["doctor", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["value"] == 1.5


def test_json_has_no_nan_or_infinity(verb, tmp_path, capsys):
    verb(lambda arguments: {"perplexity": float("inf"), "scores": (float("nan"), 1.0)})
    assert main(["doctor", "--json", str(tmp_path / "result.json")]) == 0
    assert main(["doctor", "--json", "-"]) == 0
    for text in ((tmp_path / "result.json").read_text(), capsys.readouterr().out):
        found = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
        assert found == {"perplexity": None, "scores": [None, 1.0]}


def test_control_c(verb, capsys):
    def run(arguments):
        raise KeyboardInterrupt

    verb(run)
    assert main(["doctor"]) == 130
    assert "resume from the last checkpoint" in capsys.readouterr().err


def test_sigterm_exits_with_the_code_that_launchers_restart_on(verb, capsys):
    def run(arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)

    before = signal.getsignal(signal.SIGTERM)
    verb(run)
    assert main(["doctor"]) == 75
    assert signal.getsignal(signal.SIGTERM) is before
    assert "terminated" in capsys.readouterr().err


def test_preempted_training_exits_with_the_same_code(verb):
    from diffusion_lm.training.hooks import Preempted

    def run(arguments):
        raise Preempted(3)

    verb(run)
    assert main(["doctor"]) == environment.EXIT_PREEMPTED == 75


def test_a_bug_shows_its_traceback(verb):
    def run(arguments):
        raise ZeroDivisionError

    verb(run)
    with pytest.raises(ZeroDivisionError):
        main(["doctor"])


def test_compile_cache_is_on_by_default_and_can_be_turned_off(monkeypatch):
    monkeypatch.delenv("DIFFUSION_LM_COMPILE_CACHE", raising=False)
    monkeypatch.delenv("DIFFUSION_LM_CACHE", raising=False)
    assert environment.compile_cache_folder().parts[-2:] == ("diffusion_lm", "jax")
    monkeypatch.setenv("DIFFUSION_LM_CACHE", "/tmp/y")
    assert str(environment.compile_cache_folder()) == "/tmp/y/jax"
    monkeypatch.setenv("DIFFUSION_LM_COMPILE_CACHE", "/tmp/x")
    assert str(environment.compile_cache_folder()) == "/tmp/x"
    monkeypatch.setenv("DIFFUSION_LM_COMPILE_CACHE", "off")
    assert environment.compile_cache_folder() is None
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    environment.prepare()
    assert "JAX_COMPILATION_CACHE_DIR" not in os.environ


def test_module_is_found_in_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "my_cli_tasks.py").write_text("LOADED = True\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", str(tmp_path))])
    environment.import_modules(["my_cli_tasks"])
    assert sys.modules["my_cli_tasks"].LOADED


def test_doctor_passes_here(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("DIFFUSION_LM_CACHE", str(tmp_path))
    assert main(["doctor", "--no_tasks", "--json", str(tmp_path / "doctor.json")]) == 0
    assert "all checks passed" in capsys.readouterr().out
    checks = {check["name"]: check["status"] for check in json.loads((tmp_path / "doctor.json").read_text())["checks"]}
    assert checks["one training step"] == "ok"


def test_doctor_fails_if_a_check_fails(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DIFFUSION_LM_CACHE", str(tmp_path / "file"))
    monkeypatch.setenv("DIFFUSION_LM_COMPILE_CACHE", "off")
    assert main(["doctor", "--no_tasks"]) == environment.EXIT_FAILED
    out = capsys.readouterr().out
    assert any(line.split()[:3] == ["FAIL", "data", "folder"] for line in out.splitlines())
    assert "failed: data folder" in out


@pytest.mark.parametrize(
    ("number", "text"),
    [(281_562_240, "281.6M (281,562,240)"), (1_680_000_000, "1.68B (1,680,000,000)"), (512, "512")],
)
def test_counts_have_a_human_and_an_exact_form(number, text):
    assert output.count(number) == text


def test_tables_are_plain_and_fit_when_piped(capsys):
    output.table(["name", "value"], [["a" * 30, "word " * 40], ["b", "[not markup]"]], right=[1])
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) <= output.MAX_WIDTH and line == line.rstrip() for line in lines)
    assert "[not markup]" in lines[-1]
    assert not any("\x1b" in line for line in lines)
    output.table(["name", "value"], [["a" * 90, "b" * 60]], fold=[])
    assert "b" * 60 in capsys.readouterr().out, "a table that cannot wrap exceeds the width"


def test_write_result_turns_configured_objects_into_data():
    import numpy as np

    from diffusion_lm.parallel.mesh import MeshSpec

    found = output.plain({"mesh": MeshSpec(), "array": np.arange(2), "pair": (1, None)})
    assert found == {
        "mesh": {"class": "MeshSpec", "data": 1, "fsdp": -1, "sequence": 1, "tensor": 1},
        "array": [0, 1],
        "pair": [1, None],
    }
