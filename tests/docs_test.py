"""Commands of README and docs that are marked with `<!-- test -->` work; links between the pages lead somewhere."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"<!-- test -->\s*\n+```(?:bash|sh)\n(.*?)```", re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
NAMED = re.compile(r"(?<![\w/.:-])(?:gin|docs|tests|tasks|launch|diffusion_lm)/[a-z0-9_/]+\.(?:gin|md|py)\b")
IN_COMMENT = re.compile(r"(?<![\w/])[a-z][\w/]*\.gin\b")
STAYS_HERE = {".git", "runs", "build", "dist", ".jax_cache", ".pytest_cache", ".ruff_cache", ".mypy_cache"}


def _blocks() -> list:
    return [
        pytest.param(match[1], id=f"{page.relative_to(ROOT)}:{page.read_text()[: match.start(1)].count(chr(10)) + 1}")
        for page in PAGES
        for match in BLOCK.finditer(page.read_text())
    ]


def test_blocks_are_found():
    text = "text\n<!-- test -->\n```bash\necho 1\n```\n\n```bash\nnot marked\n```\n"
    assert BLOCK.findall(text) == ["echo 1\n"]


@pytest.mark.parametrize("commands", _blocks())
def test_commands_work(commands, tmp_path):
    """In a folder that shows the repository's files, the environment's commands first; what they write is dropped."""
    for entry in ROOT.iterdir():
        if entry.name not in STAYS_HERE:
            (tmp_path / entry.name).symlink_to(entry)
    environment = os.environ | {
        "PATH": os.pathsep.join([str(pathlib.Path(sys.executable).parent), os.environ["PATH"]]),
        "JAX_PLATFORMS": "cpu",
    }
    run = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", commands],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, f"{commands}\n{run.stdout[-3000:]}\n{run.stderr[-3000:]}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_relative_links_lead_somewhere(page):
    targets = [link.split("#")[0] for link in LINK.findall(page.read_text()) if "://" not in link]
    missing = [target for target in targets if target and not (page.parent / target).exists()]
    assert not missing


def test_files_that_pages_comments_and_docstrings_name_exist():
    """Of this repository's folders; in comments of gin files also names without a folder. `my_...` is the reader's."""
    named = {
        (name, path)
        for folder in ("diffusion_lm", "docs", "gin", "launch", "tasks")
        for end in ("gin", "md", "py")
        for path in (ROOT / folder).rglob(f"*.{end}")
        for name in NAMED.findall(path.read_text())
    }
    named |= {(name, page) for page in PAGES for name in NAMED.findall(page.read_text())}
    missing = {(name, path) for name, path in named if not (ROOT / name).exists()}
    files = {path.name for path in (ROOT / "gin").rglob("*.gin")} | {"sampler.gin"}  # of an imported run
    for path in (ROOT / "gin").rglob("*.gin"):
        comments = "\n".join(line.partition("#")[2] for line in path.read_text().splitlines())
        missing |= {(name, path) for name in IN_COMMENT.findall(comments) if pathlib.Path(name).name not in files}
    found = sorted(f"{path.relative_to(ROOT)}: {name}" for name, path in missing if "my_" not in name)
    assert not found
