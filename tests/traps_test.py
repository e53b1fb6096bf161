"""`docs/traps.md` has an entry for every number that code, tests and pages refer to, and names tests that exist."""

import ast
import functools
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PAGE = ROOT / "docs" / "traps.md"
NUMBER = re.compile(r"(?:\b|(?<=_))T(\d\d)(?=\b|_)")
ENTRY = re.compile(r"^\*\*T(\d\d) [^*]+\*\* (.*?)(?=^\*\*T\d\d |^#|\Z)", re.MULTILINE | re.DOTALL)
TEST = re.compile(r"`(tests/[\w/]+_test\.py)::(\w+)`")


def _entries() -> dict[str, str]:
    return dict(ENTRY.findall(PAGE.read_text()))


@functools.cache
def _texts() -> dict[pathlib.Path, str]:
    """Every text in which the number of a trap may occur, this page and this file left out."""
    folders = [ROOT / name for name in ("diffusion_lm", "docs", "gin", "launch", "tasks", "tests")]
    files = [path for folder in folders for end in ("py", "md", "gin") for path in sorted(folder.rglob(f"*.{end}"))]
    return {
        path: path.read_text() for path in [*files, *ROOT.glob("*.md")] if path not in (PAGE, pathlib.Path(__file__))
    }


@functools.cache
def _functions(path: pathlib.Path) -> set[str]:
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}


def _bearers(path: pathlib.Path, number: str) -> list[str]:
    return re.findall(rf"def (test_(?:\w+_)?T{number}_\w+)", _texts()[path])


def test_numbers_run_without_gaps():
    numbers = re.findall(r"^\*\*T(\d\d) ", PAGE.read_text(), re.MULTILINE)
    assert numbers == [f"{number:02}" for number in range(1, 61)]


def test_every_number_that_is_used_has_an_entry():
    entries = _entries()
    used = {(number, str(path.relative_to(ROOT))) for path, text in _texts().items() for number in NUMBER.findall(text)}
    assert len({number for number, _ in used}) > 50, "names of tests are searched, too"
    assert not sorted((number, path) for number, path in used if number not in entries)


@pytest.mark.parametrize("number", [f"{number:02}" for number in range(1, 61)])
def test_an_entry_names_tests_that_exist_or_says_that_there_is_none(number):
    entry = _entries()[number]
    tests = TEST.findall(entry)
    assert bool(tests) != ("Not tested:" in entry)
    missing = [f"{path}::{name}" for path, name in tests if name not in _functions(ROOT / path)]
    assert not missing
    # A test that has the number in its name guards the trap: the entry must not overlook all of them.
    bearers = {name for path in _texts() if path.suffix == ".py" for name in _bearers(path, number)}
    assert not bearers or bearers & {name for _, name in tests}
