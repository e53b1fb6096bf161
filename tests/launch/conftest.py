"""Fake gcloud, kubectl and sbatch on the PATH; the fake gcloud connects to local directories as machines."""

import json
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]

# The installer that `curl` fetches creates a uv, which creates a diffusion-lm, which records its arguments and exits
# with the next planned exit code.
_CURL = "cat $FAKE_FOLDER/bin/install_uv"
_INSTALL = "mkdir -p ~/.local/bin; cp $FAKE_FOLDER/bin/uv ~/.local/bin/uv"
_UV = """\
echo "$WORKER uv $*" >> $FAKE_FOLDER/uv.log
[ "$1" = venv ] && mkdir -p env/bin && cp $FAKE_FOLDER/bin/diffusion-lm env/bin/
exit 0
"""
_PROGRAM = """\
import json, os, pathlib, sys
folder = pathlib.Path(os.environ["FAKE_FOLDER"])
plan = folder / f"exit_codes.{os.environ['WORKER']}"
codes = plan.read_text().split() if plan.exists() else []
plan.write_text(" ".join(codes[1:]))
with open(folder / f"runs.{os.environ['WORKER']}", "a") as file:
    given = {name: value for name, value in os.environ.items() if name.startswith(("DIFFUSION_LM", "MY_"))}
    file.write(json.dumps({"arguments": sys.argv[1:], "environment": given, "files": sorted(os.listdir())}) + "\\n")
print("step 1 of worker", os.environ["WORKER"], flush=True)
sys.exit(int(codes[0]) if codes else 0)
"""


class Fake:
    """Planned answers and recorded calls of the fake programs."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self.slept: list[float] = []

    def plan(self, answers: dict[str, list[dict]]) -> None:
        (self.folder / "answers.json").write_text(json.dumps(answers))

    def exit_codes(self, *codes: int, worker: int = 0) -> None:
        (self.folder / f"exit_codes.{worker}").write_text(" ".join(map(str, codes)))

    @property
    def calls(self) -> list[dict]:
        path = self.folder / "calls.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def runs(self, worker: int = 0) -> list[dict]:
        path = self.folder / f"runs.{worker}"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def verbs(self) -> list[str]:
        """The gcloud commands that ran, without read-only ones."""
        words = [call["arguments"][3] for call in self.calls]
        return [word for word in words if word != "describe"]


@pytest.fixture
def fake(tmp_path, monkeypatch):
    folder = tmp_path / "fake"
    programs = tmp_path / "programs"
    for path in (folder / "bin", programs):
        path.mkdir(parents=True)
    script = f"#!{sys.executable} -IS\n" + pathlib.Path(__file__).with_name("fake_program.py").read_text()
    for name in ("gcloud", "kubectl", "sbatch"):
        _program(programs / name, script)
    _program(folder / "bin" / "curl", f"#!/bin/sh\n{_CURL}\n")
    _program(folder / "bin" / "install_uv", f"{_INSTALL}\n")
    _program(folder / "bin" / "uv", f"#!/bin/sh\n{_UV}")
    _program(folder / "bin" / "hostname", "#!/bin/sh\necho host-$WORKER\n")
    _program(folder / "bin" / "diffusion-lm", f"#!{sys.executable} -IS\n{_PROGRAM}")
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    monkeypatch.setenv("FAKE_FOLDER", str(folder))
    monkeypatch.setenv("FAKE_WORKERS", "1")
    found = Fake(folder)
    monkeypatch.setattr("launch.commands.time.sleep", found.slept.append)
    return found


def _program(path: pathlib.Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)
