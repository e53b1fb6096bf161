"""docs/exactness.md has a row for every method, and every test that it names exists."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
FOLDERS = ("gin/objectives", "gin/samplers", "gin/scoring")
NAMED = re.compile(r"`(test_\w+)`")
DEFINED = re.compile(r"^ *def (test_\w+)", re.MULTILINE)


def tables(text):
    """{folder: {file: cells}} of a page whose sections are headed by the folders."""
    found = {}
    for section in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        rows = re.findall(r"^\| `(\w+)` \|(.*)\|$", section, re.MULTILINE)
        assert len(rows) == len(dict(rows)), "a file has one row"
        found[section.split("\n", 1)[0].strip()] = {
            name: [cell.strip() for cell in cells.split("|")] for name, cells in rows
        }
    return found


def unproven(cell, tests):
    """Whether a cell names no test, or one that does not exist, and gives no reason."""
    names = NAMED.findall(cell)
    return not (names and set(names) <= tests) and not re.fullmatch(r"none: \w.{10,}", cell)


TABLES = tables((ROOT / "docs" / "exactness.md").read_text())
TESTS = {name for path in (ROOT / "tests").rglob("*_test.py") for name in DEFINED.findall(path.read_text())}


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_method_has_a_row_and_every_cell_a_test_or_a_reason(folder):
    files = {path.stem for path in (ROOT / folder).glob("*.gin")}
    assert files - set(TABLES[folder]) == set(), "methods without a row in docs/exactness.md"
    assert set(TABLES[folder]) - files == set(), "rows without a method"
    bad = {name: cell for name, cells in TABLES[folder].items() for cell in cells if unproven(cell, TESTS)}
    assert not bad


def test_missing_rows_tests_and_reasons_are_seen():
    page = tables("# x\n\n## gin/scoring\n\n| file | law |\n|---|---|\n| `a` | `test_b`, `test_c` |\n| `d` | |\n")
    assert page == {"gin/scoring": {"a": ["`test_b`, `test_c`"], "d": [""]}}
    assert unproven("`test_b`, `test_c`", {"test_b"})
    assert unproven("", {"test_b"})
    assert unproven("none:", set())
    assert not unproven("none: pseudo, it bounds no likelihood", set())
    assert not unproven("`test_b` (approximate)", {"test_b"})
