"""Verbs whose stdout or stderr is closed: pipes that close while they run, streams closed before they start."""

import json
import subprocess
import sys

import pytest

from diffusion_lm.cli import doctor, environment
from diffusion_lm.cli.main import main

CLOSED = 141

# A verb in a child process: it prints a line to each stream, waits for the test, prints more, then writes a file.
SCRIPT = """
import sys, types
from diffusion_lm.cli import {verb}, main, output
def run(arguments):
    for number in range(200):
        output.progress(f"step {{number}}")
        output.say(f"result {{number}}")
        if number == 0:
            sys.stdin.readline()
    open("finished", "w").close()
    return {{"value": 1.5}}
{verb}.run = run
sys.exit(main.main({arguments}))
"""


def start(folder, verb, *arguments, **streams):
    flags = ["--workdir", "x"] if verb in ("train", "decode") else []
    script = SCRIPT.format(verb=verb, arguments=[verb, *flags, *arguments])
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | streams
    return subprocess.Popen([sys.executable, "-c", script], cwd=folder, text=True, **pipes)


def close_after_a_line(process, *streams):
    """Reads one line of each stream, closes the streams, and lets the verb continue."""
    for stream in streams:
        stream.readline()
        stream.close()
    process.stdin.write("\n")
    process.stdin.close()


def test_training_continues_when_its_output_is_closed(tmp_path):
    """`train 2>&1 | head -1`, which once ended the run early with exit code 0."""
    process = start(tmp_path, "train", stderr=subprocess.STDOUT)
    close_after_a_line(process, process.stdout)
    assert process.wait(60) == 0
    assert (tmp_path / "finished").exists()


@pytest.mark.parametrize("verb", ["train", "decode"])
def test_closed_stderr_is_not_an_error(tmp_path, verb):
    process = start(tmp_path, verb)
    close_after_a_line(process, process.stderr)
    out = process.stdout.read()
    assert process.wait(60) == 0
    assert out.splitlines()[-1] == "result 199"


@pytest.mark.parametrize("verb", ["decode", "doctor"])
def test_a_verb_that_only_prints_stops_with_a_nonzero_exit_code(tmp_path, verb):
    process = start(tmp_path, verb)
    close_after_a_line(process, process.stdout)
    errors = process.stderr.read()
    assert process.wait(60) == CLOSED
    assert not (tmp_path / "finished").exists()
    assert all(line.startswith("step ") for line in errors.splitlines()), "no traceback, no message"


def test_results_in_a_file_are_written_when_stdout_is_closed(tmp_path):
    process = start(tmp_path, "decode", "--json", "result.json")
    close_after_a_line(process, process.stdout)
    process.stderr.read()
    assert process.wait(60) == 0
    assert json.loads((tmp_path / "result.json").read_text()) == {"value": 1.5}


def test_unread_json_on_stdout_is_not_success(tmp_path):
    process = start(tmp_path, "train", "--json", "-")
    close_after_a_line(process, process.stdout)
    process.stderr.read()
    assert process.wait(60) == CLOSED
    assert (tmp_path / "finished").exists(), "the work is finished all the same"


@pytest.mark.parametrize(
    ("redirection", "verb", "code"),
    [("2>&-", "decode", 0), (">&- 2>&-", "train", 0), (">&-", "decode", CLOSED), ("2>/dev/full", "train", 0)],
)
def test_streams_that_are_closed_before_the_start(tmp_path, redirection, verb, code):
    """The next file that is opened must not get the descriptor of stdout or stderr, which libraries write to."""
    (tmp_path / "script.py").write_text(
        SCRIPT.format(verb=verb, arguments=[verb, "--workdir", "x"]).replace(
            'open("finished", "w").close()',
            'import os; file = open("finished", "w"); assert file.fileno() > 2, file.fileno(); os.write(2, b"noise")',
        )
    )
    command = f"echo | {sys.executable} script.py {redirection}"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stderr
    assert (tmp_path / "finished").exists() == (code == 0)
    assert not (tmp_path / "finished").exists() or (tmp_path / "finished").read_text() == ""


def test_another_broken_pipe_is_reported_as_an_error(monkeypatch):
    """A broken pipe of e.g. a worker process is unrelated to stdout; it once ended with exit code 0."""

    def run(arguments):
        raise BrokenPipeError

    monkeypatch.setattr(doctor, "run", run)
    before = sys.stdout, sys.stderr
    with pytest.raises(BrokenPipeError):
        main(["doctor"])
    assert (sys.stdout, sys.stderr) == before, "the streams are put back"


def test_the_exit_code_equals_that_of_a_process_killed_by_sigpipe():
    assert environment.EXIT_OUTPUT_CLOSED == CLOSED == 128 + 13
